package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"coppice/internal/api"
	"coppice/internal/db"
	"coppice/internal/db/bolt"
	"coppice/internal/remote"
	"coppice/internal/server"
	"coppice/internal/storage/all"
	"coppice/internal/users"
	"coppice/internal/vfs"
	"coppice/internal/xapi"
)

// minProcs is the least number of goroutines that may run at once. A file
// operation that blocks occupies one of them until the runtime notices, and
// on a small machine that would hold up everybody else.
const minProcs = 4

// startGCPercent is the garbage collector's percentage, as in GOGC, while the server starts.
const startGCPercent = 400

// The values of --revert.
const (
	revertInPlace = "in-place"
	revertClone   = "clone"
)

// serveOptions are the flags of serve.
type serveOptions struct {
	data         *string
	addresses    addresses
	nbd          nbdAddresses
	passwordFile string
	hostAddress  string
	tlsCert      string
	tlsKey       string
	readyFile    string
	auditLog     string
	grace        time.Duration
	idle         time.Duration
	pullFrom     remote.Networks
	logLevel     slog.Level
	revert       string
}

func (o *serveOptions) flags() *flag.FlagSet {
	fs := flag.NewFlagSet("serve", flag.ContinueOnError)
	o.data = dataFlag(fs)
	fs.StringVar(&o.addresses.http, "http", "127.0.0.1:8080", "loopback `address` for plain HTTP, or off")
	fs.StringVar(&o.addresses.https, "https", "127.0.0.1:8443", "`address` for HTTPS, or off")
	fs.Func("listen", "further `URL` to listen at, such as https://0.0.0.0:443; may be repeated", func(s string) error {
		o.addresses.more = append(o.addresses.more, s)
		return nil
	})
	fs.StringVar(&o.nbd.tls, "nbd", "", "`address` for NBD, always with TLS, or off (default "+defaultNBD+", unless the port is in use)")
	fs.StringVar(&o.nbd.plain, "nbd-plain", off, "loopback `address` for NBD without TLS, or off")
	fs.StringVar(&o.passwordFile, "admin-password-file", "", "`file` with the password to give to root (default: one is made up at the first start and printed once)")
	fs.StringVar(&o.hostAddress, "host-address", "", "`address` that clients are told for this host (default: that of the first listener)")
	fs.StringVar(&o.tlsCert, "tls-cert", "", "`file` with the certificate chain in PEM form (default: a self-signed one is made)")
	fs.StringVar(&o.tlsKey, "tls-key", "", "`file` with the RSA key of --tls-cert in PEM form")
	fs.StringVar(&o.readyFile, "ready-file", "", "`file` that gets the URLs, one a line, when the server is ready")
	fs.StringVar(&o.auditLog, "audit-log", "", "`file` to which is appended, as JSON, who did what (default: it is not written)")
	fs.DurationVar(&o.idle, "transfer-idle", 0, "`duration`, such as 30m, for which the client of a transfer may neither send nor take a byte; 0, for ever, without it")
	fs.Func("pull-from", "`networks`, such as 10.0.0.0/8,127.0.0.1, of the servers from which disks can be pulled, or off (default: all but those of this machine, its links and the metadata services of clouds)", func(s string) (err error) {
		o.pullFrom, err = remote.ParseNetworks(s)
		return err
	})
	fs.DurationVar(&o.grace, "grace", server.DefaultGrace, "`duration`, such as 30s, for which a stop waits for running work")
	fs.StringVar(&o.revert, "revert", revertInPlace, "`how` VMs are reverted: in-place puts contents back, clone replaces disks by clones, as other_config:coppice:revert=clone of the pool does, too")
	fs.TextVar(&o.logLevel, "log-level", slog.LevelInfo, "`level` from which on things are logged: debug, info, warn or error")
	return fs
}

func (o *serveOptions) validate() error {
	var errs []error
	if (o.tlsCert == "") != (o.tlsKey == "") {
		errs = append(errs, errors.New("--tls-cert and --tls-key go together"))
	}
	if o.addresses.http == off && o.addresses.https == off && len(o.addresses.more) == 0 {
		errs = append(errs, errors.New("--http off and --https off leave nothing to listen at; add --listen"))
	}
	if o.revert != revertInPlace && o.revert != revertClone {
		errs = append(errs, fmt.Errorf("--revert %s: want %s or %s", o.revert, revertInPlace, revertClone))
	}
	if o.grace <= 0 {
		errs = append(errs, errors.New("--grace must be more than 0s"))
	}
	errs = append(errs, o.addresses.validate(), o.nbd.validate())
	return errors.Join(errs...)
}

// serve runs the server until it gets SIGINT or SIGTERM, or ctx ends. A
// second signal ends the process at once; what was acknowledged is safe then
// too.
func serve(ctx context.Context, e env, args []string) (err error) {
	var o serveOptions
	if err := parse(e, o.flags(), args, 0); err != nil {
		return err
	}
	if err := o.validate(); err != nil {
		return err
	}
	if e.getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(minProcs, runtime.GOMAXPROCS(0)))
	}
	ctx, unhook := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer unhook()
	context.AfterFunc(ctx, unhook) // the second signal has its usual effect

	data, err := e.dataDir(*o.data)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(e.stderr, &slog.HandlerOptions{Level: o.logLevel, ReplaceAttr: server.RedactAttr}))
	// Nearly all that a start makes is there to stay: to collect garbage in it as often as later costs much and finds
	// little.
	usual := debug.SetGCPercent(startGCPercent)
	inst, err := start(ctx, data, o, log)
	debug.SetGCPercent(usual)
	if err != nil {
		return err
	}
	inst.announce(e.stdout)
	if o.readyFile != "" {
		if err := inst.writeReady(o.readyFile); err != nil {
			return errors.Join(err, inst.close())
		}
	}
	fmt.Fprintln(e.stdout, "ready")
	inst.onHangup(ctx, log)
	context.AfterFunc(ctx, func() { _ = tellManager(e.getenv, "STOPPING=1") }) // it sees that by itself, too
	if err := tellManager(e.getenv, "READY=1"); err != nil {
		log.Error("the service manager does not know that the server is ready", "err", err)
	}
	err = inst.server.Serve(ctx, inst.endpoints.listeners()...)
	unhook() // also ends what else runs until ctx does
	if err = errors.Join(err, inst.close()); err != nil {
		return badNews{err}
	}
	fmt.Fprintln(e.stdout, "stopped")
	return nil
}

// instance is a server with everything it stands on.
type instance struct {
	data      dataDir
	password  rootPassword
	cert      *server.Certificate
	endpoints endpoints
	nbd       nbdEndpoints
	api       *api.API
	watchers  watchers
	server    *server.Server
	closers   []func() error // in the order of opening

	background sync.WaitGroup
}

// close releases everything, last opened first.
func (i *instance) close() error {
	var errs []error
	for n := len(i.closers) - 1; n >= 0; n-- {
		errs = append(errs, i.closers[n]())
	}
	i.closers = nil
	return errors.Join(errs...)
}

// start opens everything a server needs, in order; on an error it leaves
// nothing open.
func start(ctx context.Context, data dataDir, o serveOptions, log *slog.Logger) (_ *instance, err error) {
	i := &instance{data: data}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.close())
		}
	}()
	opened := func(c func() error) { i.closers = append(i.closers, c) }

	dir, lock, err := data.open(true)
	if err != nil {
		return nil, err
	}
	opened(dir.Close)
	opened(lock.Close)

	if i.password, err = findPassword(dir, o.passwordFile); err != nil {
		return nil, err
	}
	if i.cert, err = o.certificate(data); err != nil {
		return nil, err
	}
	i.cert.OnReloadError(func(err error) { log.Error("the TLS certificate is the one of before", "err", err) })
	running, stop := context.WithCancel(ctx)
	opened(func() error { stop(); i.background.Wait(); return nil })
	if i.endpoints, err = o.addresses.listen(ctx, i.cert.TLS(), data.socket()); err != nil {
		return nil, err
	}
	opened(i.endpoints.close)
	if i.nbd, err = o.nbd.listen(ctx, data.nbdSocket()); err != nil {
		return nil, err
	}
	opened(i.nbd.close)
	i.background.Go(func() { reportCertificate(log, i.cert) })

	store, err := bolt.Open(data.database())
	if err != nil {
		return nil, data.explain(err)
	}
	objects, err := db.Open(ctx, xapi.Datamodel(), store)
	if err != nil {
		return nil, fmt.Errorf("object database %s: %w", data.database(), err)
	}
	opened(objects.Close)
	build := readBuild()
	if i.watchers, err = openWatchers(build.version, o.auditLog, log); err != nil {
		return nil, err
	}
	opened(i.watchers.close)
	a, err := api.New(ctx, api.Config{
		DB:           objects,
		Storage:      all.Registry(),
		RootPassword: i.password.verifier,
		SavePassword: savePassword(dir),
		Users:        users.At(data.users()),
		OnCall:       i.watchers.saw,
		Log:          log,
		Version:      build.version,
		DataDir:      string(data),
		HostAddress:  func() string { return o.address(i.endpoints) },
		Certificate:  i.cert.Current,
		NBD:          i.nbd.describe(o.address(i.endpoints), i.cert),
		Sources:      server.NewSources(o.pullFrom, o.idle),

		RevertByClone: o.revert == revertClone,
	})
	if err != nil {
		return nil, err
	}
	i.api = a
	opened(a.Close)
	if err := i.password.keep(dir); err != nil {
		return nil, data.explain(err)
	}
	i.background.Go(func() {
		if err := i.password.remember(running, dir); err != nil {
			log.Warn("the next start compares the password again", "err", err)
		}
	})
	disks := server.NewNBD(a, log, o.grace)
	i.nbd.serve(disks, i.cert)
	opened(disks.Close)
	i.server = server.New(server.Config{API: a, Log: log, Version: build.version, Grace: o.grace, TransferIdle: o.idle, Metrics: i.watchers.metrics, Audit: i.watchers.audit})
	return i, nil
}

// savePassword keeps a new verifier of root's password.
func savePassword(dir vfs.FS) func(user, verifier string) error {
	return func(_, verifier string) error { return writeSmall(dir, passwordFile, verifier) }
}

// certificate loads or makes the TLS certificate.
func (o *serveOptions) certificate(data dataDir) (*server.Certificate, error) {
	if o.tlsCert != "" {
		return server.LoadCertificate(o.tlsCert, o.tlsKey)
	}
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	if name, err := os.Hostname(); err == nil && name != "localhost" {
		hosts = append(hosts, name)
	}
	if o.hostAddress != "" {
		hosts = append(hosts, o.hostAddress)
	}
	return server.OpenCertificate(data.tls(), hosts)
}

// reportCertificate logs how making the certificate ended, and the
// fingerprint by which clients may recognise it.
func reportCertificate(log *slog.Logger, cert *server.Certificate) {
	if err := cert.Wait(context.Background()); err != nil {
		log.Error("no TLS certificate, HTTPS cannot be used", "error", err)
		return
	}
	log.Info("TLS certificate", "sha256", fingerprint(cert.Leaf()), "until", cert.Leaf().NotAfter.Format(time.DateOnly))
}

// address is what host.address tells clients.
func (o *serveOptions) address(eps endpoints) string {
	if o.hostAddress != "" {
		return o.hostAddress
	}
	for _, ep := range eps {
		if ep.scheme != "unix" {
			host, _ := ep.hostPort()
			return host
		}
	}
	return "127.0.0.1"
}

// announce tells the operator where the server is and how to use it.
func (i *instance) announce(w io.Writer) {
	fmt.Fprintf(w, "Coppice %s, data in %s\n", readBuild().version, i.data)
	for _, ep := range i.endpoints {
		fmt.Fprintf(w, "  %s\n", ep.url())
	}
	for _, u := range i.nbd.urls() {
		fmt.Fprintf(w, "  %s\n", u)
	}
	switch {
	case i.password.created != "":
		fmt.Fprintf(w, "User root, password %s\n  made up now and shown only this once; --admin-password-file sets another\n", i.password.created)
	case i.password.kept:
		fmt.Fprintln(w, "User root, password as set before; --admin-password-file sets another")
	default:
		fmt.Fprintln(w, "User root, password as in the file that was given")
	}
	if args, ok := i.xeArgs(cmp.Or(i.password.created, "PASSWORD")); ok {
		fmt.Fprintf(w, "To use xe:\n  export XE_EXTRA_ARGS=%s\n", args)
	}
}

// xeArgs is the value of XE_EXTRA_ARGS with which xe finds this server.
func (i *instance) xeArgs(password string) (string, bool) {
	var args []string
	if ep, ok := i.endpoints.first("http"); ok {
		host, port := ep.hostPort()
		args = []string{"server=" + host, "port=" + port, "nossl=true"}
	} else if ep, ok := i.endpoints.first("https"); ok {
		host, port := ep.hostPort()
		if host == "127.0.0.1" {
			host = "localhost" // xe uses no TLS for 127.0.0.1
		}
		args = []string{"server=" + host, "port=" + port}
	} else {
		return "", false
	}
	return strings.Join(append(args, "username=root", "password="+password), ","), true
}

// writeReady writes the URLs of the server to path, complete or not at all.
func (i *instance) writeReady(path string) error {
	var b strings.Builder
	for _, ep := range i.endpoints {
		fmt.Fprintln(&b, ep.url())
	}
	for _, u := range i.nbd.urls() {
		fmt.Fprintln(&b, u)
	}
	tmp := path + ".new"
	return cmp.Or(os.WriteFile(tmp, []byte(b.String()), 0o644), os.Rename(tmp, path))
}
