package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"coppice/internal/rpc"
)

// process is a coppice server in a process of its own.
type process struct {
	cmd     *exec.Cmd
	url     string
	printed string // up to and with "ready"
	rest    chan string
}

// startProcess starts a server and waits until it says that it is ready.
func startProcess(t *testing.T, data string, flags ...string) *process {
	t.Helper()
	p := &process{rest: make(chan string, 1)}
	p.cmd = exec.Command(os.Args[0], append([]string{
		"serve", "--data", data, "--http", "127.0.0.1:0", "--https", "off", "--log-level", "warn",
	}, flags...)...)
	p.cmd.Env = append(os.Environ(), asCoppice+"=1")
	p.cmd.Stderr = os.Stderr
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	})
	lines := bufio.NewScanner(stdout)
	for lines.Scan() && lines.Text() != "ready" {
		p.printed += lines.Text() + "\n"
		if url, ok := strings.CutPrefix(strings.TrimSpace(lines.Text()), "http://"); ok {
			p.url = "http://" + url
		}
	}
	if p.url == "" {
		t.Fatalf("the server did not get ready:\n%s", p.printed)
	}
	go func() {
		var b strings.Builder
		for lines.Scan() {
			b.WriteString(lines.Text() + "\n")
		}
		p.rest <- b.String()
	}()
	return p
}

// call invokes a method and returns its result.
func (p *process) call(method string, params ...any) (any, error) {
	var body bytes.Buffer
	if err := rpc.WriteCall(&body, rpc.JSONRPC2, 1, method, params...); err != nil {
		return nil, err
	}
	resp, err := http.Post(p.url+"/jsonrpc", "application/json", &body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return rpc.ReadResponse(rpc.JSONRPC2, resp.Body, 16<<20)
}

func (p *process) login(t *testing.T) string {
	t.Helper()
	session, err := p.call("session.login_with_password", "root", "secret")
	if err != nil {
		t.Fatal(err)
	}
	return session.(string)
}

func writePassword(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestFirstStart(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	p := startProcess(t, data)
	_, after, ok := strings.Cut(p.printed, "User root, password ")
	password, _, _ := strings.Cut(after, "\n")
	if !ok || !strings.Contains(p.printed, "export XE_EXTRA_ARGS=server=127.0.0.1,port=") ||
		!strings.Contains(p.printed, "password="+password) {
		t.Fatalf("printed:\n%s", p.printed)
	}
	if _, err := p.call("session.login_with_password", "root", password); err != nil {
		t.Errorf("with the printed password: %v", err)
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if rest := <-p.rest; rest != "stopped\n" {
		t.Errorf("printed at the end: %q", rest)
	}
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("stop: %v", err)
	}
	p = startProcess(t, data)
	if strings.Contains(p.printed, password) || !strings.Contains(p.printed, "password as set before") {
		t.Errorf("second start printed:\n%s", p.printed)
	}
	if _, err := p.call("session.login_with_password", "root", password); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// TestKill: whatever a server acknowledged before it was killed is there
// again, what it did not may be, and the store is sound.
func TestKill(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	password := writePassword(t)
	acknowledged := make(map[string]bool) // VDI uuids
	for round := range 3 {
		p := startProcess(t, data, "--admin-password-file", password)
		session := p.login(t)
		records, err := p.call("VDI.get_all_records", session)
		if err != nil {
			t.Fatal(err)
		}
		found := make(map[string]bool)
		for _, r := range records.(map[string]any) {
			found[r.(map[string]any)["uuid"].(string)] = true
		}
		for uuid := range acknowledged {
			if !found[uuid] {
				t.Errorf("round %d: disk %s is lost", round, uuid)
			}
		}
		acknowledged = found
		pools, err := p.call("pool.get_all_records", session)
		if err != nil {
			t.Fatal(err)
		}
		var sr any
		for _, r := range pools.(map[string]any) {
			sr = r.(map[string]any)["default_SR"]
		}
		created := make(chan string)
		go func() {
			defer close(created)
			for n := 0; ; n++ {
				ref, err := p.call("VDI.create", session, map[string]any{
					"SR": sr, "virtual_size": 4 << 20, "type": "user", "sharable": false, "read_only": false,
					"other_config": map[string]any{}, "name_label": fmt.Sprintf("disk %d", n),
				})
				if err != nil {
					return
				}
				if n%2 == 1 {
					if ref, err = p.call("VDI.snapshot", session, ref); err != nil {
						return
					}
				}
				uuid, err := p.call("VDI.get_uuid", session, ref)
				if err != nil {
					return
				}
				created <- uuid.(string)
			}
		}()
		n := 0
		for uuid := range created {
			acknowledged[uuid] = true
			if n++; n == 10 {
				if err := p.cmd.Process.Signal(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
		}
		if n < 10 {
			t.Fatalf("only %d disks were made", n)
		}
		_ = p.cmd.Wait()
		if got := runCommand(t, "check", "--data", data); got.code != exitOK || !strings.Contains(got.stdout, "no problems") {
			t.Fatalf("check: exit code %d\n%s%s", got.code, got.stdout, got.stderr)
		}
	}
}

// TestUnwritable: the message says what is wrong and what to do.
func TestUnwritable(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may write anywhere")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	got := runCommand(t, "serve", "--data", filepath.Join(dir, "data"))
	if got.code != exitUnusable || !strings.Contains(got.stderr, "Change its owner") {
		t.Errorf("exit code %d\n%s", got.code, got.stderr)
	}
}

// TestDoctorFindings: damage and carelessness are named, with a way out.
func TestDoctorFindings(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	p := startProcess(t, data)
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	<-p.rest
	if err := p.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	args := []string{"doctor", "--data", data, "--http", "127.0.0.1:0", "--https", off}
	if got := runCommand(t, args...); got.code != exitOK || strings.Contains(got.stdout, "→") {
		t.Fatalf("a fresh directory: exit code %d\n%s", got.code, got.stdout)
	}
	err := errors.Join(
		os.Chmod(data, 0o755),
		os.Chmod(filepath.Join(data, passwordFile), 0o644),
		os.WriteFile(filepath.Join(data, "tls", "cert.pem"), []byte("junk"), 0o644),
	)
	if err != nil {
		t.Fatal(err)
	}
	got := runCommand(t, args...)
	if got.code != exitBadNews {
		t.Errorf("exit code %d", got.code)
	}
	for _, want := range []string{"→ chmod 700 " + data, "→ chmod 600 ", "→ Remove both files"} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("no %q in:\n%s", want, got.stdout)
		}
	}
}
