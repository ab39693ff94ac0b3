package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"coppice/internal/api"
	"coppice/internal/server"
)

// watchers are those who hear of every call.
type watchers struct {
	metrics *server.Metrics
	audit   *server.Audit // nil: nobody asked for it
}

// openWatchers opens the audit log, if its path is not empty.
func openWatchers(version, auditLog string, log *slog.Logger) (watchers, error) {
	w := watchers{metrics: server.NewMetrics(version)}
	if auditLog == "" {
		return w, nil
	}
	var err error
	if w.audit, err = server.OpenAudit(auditLog, log); err != nil {
		return w, &hinted{err, "--audit-log names a file in a directory that the server's user may write to."}
	}
	return w, nil
}

// saw is the api.Config.OnCall.
func (w watchers) saw(r api.CallReport) {
	w.metrics.Observe(r)
	if w.audit != nil {
		w.audit.Record(r)
	}
}

func (w watchers) close() error {
	if w.audit == nil {
		return nil
	}
	return w.audit.Close()
}

// onHangup does what SIGHUP asks for, until ctx ends: everything that comes from files is read anew, and the audit
// log is opened anew. What cannot be stays as it is and is reported.
func (i *instance) onHangup(ctx context.Context, log *slog.Logger) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	i.background.Go(func() {
		defer signal.Stop(hangups)
		for {
			select {
			case <-ctx.Done():
				return
			case <-hangups:
			}
			if err := i.reload(ctx); err != nil {
				log.Error("not everything could be read anew", "err", err)
			} else {
				log.Info("certificate, users and audit log were read anew")
			}
		}
	})
}

func (i *instance) reload(ctx context.Context) error {
	err := errors.Join(i.cert.Reload(), i.api.ReloadUsers(ctx))
	if i.watchers.audit != nil {
		err = errors.Join(err, i.watchers.audit.Reopen())
	}
	return err
}

// tellManager tells the service manager that has started the server, if one has, what it is at: "READY=1" or
// "STOPPING=1". See sd_notify(3).
func tellManager(getenv func(string) string, state string) error {
	path := getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"}) // a leading @ is an abstract name, for both
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	_, err = conn.Write([]byte(state))
	return errors.Join(err, conn.Close())
}
