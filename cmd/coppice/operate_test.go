package main

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// listenUnixgram is a service manager that is told things.
func listenUnixgram(t *testing.T) (path string, next func() string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return path, func() string {
		t.Helper()
		if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, err := conn.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
}

// A server under a service manager: it says when it is ready and when it
// stops, follows what SIGHUP says, counts, and writes who did what.
func TestOperatedServer(t *testing.T) {
	data, audit := filepath.Join(t.TempDir(), "data"), filepath.Join(t.TempDir(), "audit.log")
	socket, next := listenUnixgram(t)
	t.Setenv("NOTIFY_SOCKET", socket)
	p := startProcess(t, data, "--admin-password-file", writePassword(t), "--audit-log", audit)
	if got := next(); got != "READY=1" {
		t.Errorf("the manager was told %q", got)
	}
	p.login(t)
	for path, want := range map[string]string{"/healthz": "ok", "/readyz": "ready", "/metrics": `coppice_calls_total{class="session",outcome="ok"} 1`} {
		resp, err := http.Get(p.url + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err = errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
			t.Errorf("%s: status %d, %v, without %s", path, resp.StatusCode, err, want)
		}
	}

	// A user that the command line adds can log in at once.
	if got := runCommand(t, "user", "add", "alice", "--role", "read-only", "--data", data, "--password-file", writePassword(t)); got.code != exitOK {
		t.Fatalf("user add: %+v", got)
	}
	alice, err := p.call("session.login_with_password", "alice", "secret")
	if err != nil {
		t.Fatalf("alice: %v", err)
	}
	if _, err := p.call("pool.sync_database", alice); err == nil || !strings.Contains(err.Error(), "RBAC_PERMISSION_DENIED") {
		t.Errorf("alice does what her role cannot: %v", err)
	}

	// The log is rotated.
	if err := os.Rename(audit, audit+".1"); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for {
		p.login(t)
		if _, err := os.Stat(audit); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the audit log is not opened anew")
		}
	}
	p.login(t)
	old, err := os.ReadFile(audit + ".1")
	if err != nil {
		t.Fatal(err)
	}
	now, err := os.ReadFile(audit)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(old, []byte(`"user":"alice"`)) || !bytes.Contains(old, []byte(`"outcome":"RBAC_PERMISSION_DENIED"`)) ||
		!bytes.Contains(now, []byte("session.login_with_password")) {
		t.Errorf("audit log before:\n%s\nand after:\n%s", old, now)
	}

	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := next(); got != "STOPPING=1" {
		t.Errorf("the manager was told %q", got)
	}
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("the server ended with %v", err)
	}
}

func TestAuditLogCannotBeOpened(t *testing.T) {
	got := runCommand(t, "serve", "--data", filepath.Join(t.TempDir(), "data"), "--http", "127.0.0.1:0", "--https", "off", "--nbd", "off",
		"--audit-log", filepath.Join(t.TempDir(), "no", "where"))
	if got.code != exitUnusable || !strings.Contains(got.stderr, "audit log: ") {
		t.Errorf("%+v", got)
	}
}

// systemd has nothing to complain about in our unit.
func TestUnit(t *testing.T) {
	tool, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("systemd-analyze is not installed")
	}
	unit, err := os.ReadFile("../../packaging/coppice.service")
	if err != nil {
		t.Fatal(err)
	}
	// The paths of the unit need not exist here.
	bin := filepath.Join(t.TempDir(), "coppice")
	if err := os.WriteFile(bin, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "coppice.service")
	unit = bytes.ReplaceAll(unit, []byte("/usr/local/bin/coppice"), []byte(bin))
	if err := os.WriteFile(path, unit, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, "verify", "--man=no", path).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}
