package script_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"coppice/internal/rpc"
)

var update = flag.Bool("update", false, "rewrite expected outputs inside the scripts")

// patience bounds every wait for a server; it is never reached in a test that passes.
const patience = 60 * time.Second

// bin is the directory with the binaries under test.
var bin string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "coppice-bin")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() { _ = os.RemoveAll(dir) }()
		bin = dir
		build := exec.Command("go", "build", "-buildvcs=false", "-o", dir, "coppice/cmd/coppice", "coppice/cmd/xe")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                "testdata",
		UpdateScripts:      *update,
		RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH"))
			e.Setenv("HOME", e.WorkDir)
			e.Setenv("XE_EXTRA_ARGS", "")
			e.Values[fixtureKey{}] = new(fixture)
			return nil
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "ci":
				return os.Getenv("CI") == "true", nil // where a missing tool is a failure
			case "mount":
				return mayMount(), nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"small":    cmdSmall,
			"serve":    cmdServe,
			"shutdown": cmdShutdown,
			"crash":    cmdCrash,
			"coppice":  program("coppice"),
			"xe":       program("xe"),
			"login":    cmdLogin,
			"set":      cmdSet,
			"http":     cmdHTTP,
			"raw":      cmdRaw,
			"npm":      cmdNPM,
		},
	})
}

// fixtureKey finds the fixture of a script.
type fixtureKey struct{}

// fixture is the server of a script, if one runs.
type fixture struct {
	small  []string // what becomes a small file system for the server: directory, size, directory, size …
	server *exec.Cmd
	exited chan struct{} // closed after the server's exit
	err    error         // of Wait, after exited
}

func fixtureOf(ts *testscript.TestScript) *fixture {
	return ts.Value(fixtureKey{}).(*fixture)
}

// inWork returns the path of a file of the harness in the script's work directory.
func inWork(ts *testscript.TestScript, name string) string {
	return filepath.Join(ts.Getenv("WORK"), name)
}

// inNamespace runs a program with file systems of its own: those that small wants,
// each a directory and its size, then --. Nobody else sees them, and they go with
// the program.
var inNamespace = []string{"unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", `
	while test "$1" != --; do
		mount -t tmpfs -o size=$2 small "$1"
		shift 2
	done
	shift
	exec "$@"`, "sh"}

// mayMount reports whether inNamespace works here.
var mayMount = sync.OnceValue(func() bool {
	dir, err := os.MkdirTemp("", "mount")
	if err != nil {
		return false
	}
	defer func() { _ = os.RemoveAll(dir) }()
	command := slices.Concat(inNamespace, []string{dir, "1M", "--", "true"})
	return exec.Command(command[0], command[1:]...).Run() == nil
})

func cmdSmall(ts *testscript.TestScript, neg bool, args []string) {
	f := fixtureOf(ts)
	if neg || len(args) != 2 || f.server != nil {
		ts.Fatalf("usage, before serve: small DIR SIZE")
	}
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	f.small = append(f.small, dir, args[1])
}

// cmdServe starts the server of the script.
func cmdServe(ts *testscript.TestScript, neg bool, args []string) {
	f := fixtureOf(ts)
	if neg || f.server != nil {
		ts.Fatalf("serve: one server at a time, and it must start")
	}
	ready, password := inWork(ts, "ready"), inWork(ts, "password")
	ts.Check(os.WriteFile(password, []byte("secret\n"), 0o600))
	if err := os.Remove(ready); err != nil && !errors.Is(err, os.ErrNotExist) {
		ts.Fatalf("serve: %v", err)
	}
	log, err := os.OpenFile(inWork(ts, "server.log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	ts.Check(err)
	command := append([]string{
		filepath.Join(bin, "coppice"),
		"serve", "--data", inWork(ts, "data"), "--http", "127.0.0.1:0", "--https", "127.0.0.1:0",
		"--admin-password-file", password, "--ready-file", ready, "--log-level", "debug",
	}, args...)
	if len(f.small) > 0 {
		command = slices.Concat(inNamespace, f.small, []string{"--"}, command)
	}
	f.server = exec.Command(command[0], command[1:]...)
	f.server.Stdout, f.server.Stderr = log, log
	ts.Check(f.server.Start())
	f.exited = make(chan struct{})
	go func() {
		f.err = f.server.Wait()
		close(f.exited)
	}()
	ts.Defer(func() {
		_ = f.end(syscall.SIGKILL) // if the script left it running
		b, _ := os.ReadFile(log.Name())
		ts.Logf("[server log]\n%s", b)
		log.Close()
	})
	for deadline := time.Now().Add(patience); ; {
		if b, err := os.ReadFile(ready); err == nil {
			setEndpoints(ts, string(b))
			return
		}
		select {
		case <-f.exited:
			b, _ := os.ReadFile(log.Name())
			ts.Fatalf("the server ended: %v\n%s", f.err, b)
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			ts.Fatalf("the server did not get ready")
		}
	}
}

// setEndpoints sets the variables that lead to a server, from the lines of its ready file.
func setEndpoints(ts *testscript.TestScript, ready string) {
	for line := range strings.Lines(ready) {
		switch scheme, where, _ := strings.Cut(strings.TrimSpace(line), "://"); scheme {
		case "http":
			ts.Setenv("HTTP", where)
		case "https":
			ts.Setenv("HTTPS", where)
		case "unix":
			ts.Setenv("SOCKET", where)
		case "nbd+unix":
			_, socket, _ := strings.Cut(where, "socket=")
			ts.Setenv("NBDSOCKET", socket)
		case "nbds", "nbd":
			ts.Setenv(strings.ToUpper(scheme), where)
		}
	}
	host, port, err := net.SplitHostPort(ts.Getenv("HTTP"))
	ts.Check(err)
	ts.Setenv("PASSWORD", "secret")
	ts.Setenv("XE_EXTRA_ARGS", fmt.Sprintf("server=%s,port=%s,nossl=true,username=root,password=secret", host, port))
}

// end sends the server a signal and waits for its exit.
func (f *fixture) end(sig syscall.Signal) error {
	if f.server == nil {
		return nil
	}
	_ = f.server.Process.Signal(sig)
	select {
	case <-f.exited:
	case <-time.After(patience):
		_ = f.server.Process.Kill()
		<-f.exited
		f.err = errors.Join(errors.New("it did not stop"), f.err)
	}
	f.server = nil
	return f.err
}

func cmdShutdown(ts *testscript.TestScript, neg bool, args []string) {
	f := fixtureOf(ts)
	if f.server == nil {
		ts.Fatalf("shutdown: no server runs")
	}
	if err := f.end(syscall.SIGTERM); err != nil {
		ts.Fatalf("shutdown: %v", err)
	}
}

func cmdCrash(ts *testscript.TestScript, neg bool, args []string) {
	f := fixtureOf(ts)
	if f.server == nil {
		ts.Fatalf("crash: no server runs")
	}
	_ = f.end(syscall.SIGKILL) // that is its exit status
}

// program runs one of the binaries; ! means that it must fail.
func program(name string) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		err := ts.Exec(name, args...)
		if neg && err == nil {
			ts.Fatalf("%s: succeeded", name)
		}
		if !neg {
			ts.Check(err)
		}
	}
}

func cmdSet(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: set NAME")
	}
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
}

func cmdLogin(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: login NAME")
	}
	var call bytes.Buffer
	ts.Check(rpc.WriteCall(&call, rpc.XMLRPC, 1, "session.login_with_password", "root", ts.Getenv("PASSWORD")))
	reply := exchange(ts, dial(ts, ""), fmt.Sprintf("POST /RPC2 HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s", call.Len(), &call))
	_, body, _ := strings.Cut(reply, "\r\n\r\n")
	session, err := rpc.ReadResponse(rpc.XMLRPC, strings.NewReader(body), 1<<20)
	ts.Check(err)
	ts.Setenv(args[0], session.(string))
}

// door takes the flag that chooses how to reach the server off args.
func door(args []string) (flag string, rest []string) {
	if len(args) > 0 && (args[0] == "-tls" || args[0] == "-unix") {
		return args[0], args[1:]
	}
	return "", args
}

// dial connects to the server through one of its doors.
func dial(ts *testscript.TestScript, flag string) net.Conn {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var conn net.Conn
	var err error
	switch flag {
	case "-tls":
		d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}
		conn, err = d.DialContext(ctx, "tcp", ts.Getenv("HTTPS"))
	case "-unix":
		conn, err = new(net.Dialer).DialContext(ctx, "unix", ts.Getenv("SOCKET"))
	default:
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", ts.Getenv("HTTP"))
	}
	ts.Check(err)
	return conn
}

// exchange sends a request and returns everything that comes back.
func exchange(ts *testscript.TestScript, conn net.Conn, request string) string {
	defer conn.Close()
	ts.Check(conn.SetDeadline(time.Now().Add(patience)))
	_, err := io.WriteString(conn, request)
	ts.Check(err)
	reply, err := io.ReadAll(conn)
	ts.Check(err)
	return string(reply)
}

func cmdHTTP(ts *testscript.TestScript, neg bool, args []string) {
	flag, args := door(args)
	if neg || len(args) < 2 {
		ts.Fatalf("usage: http [-tls|-unix] METHOD PATH [HEADER: VALUE]… [@FILE]")
	}
	head := []string{args[0] + " " + args[1] + " HTTP/1.0"}
	body := ""
	for _, a := range args[2:] {
		if file, ok := strings.CutPrefix(a, "@"); ok {
			body = expand(ts, strings.TrimSuffix(ts.ReadFile(file), "\n"))
			head = append(head, fmt.Sprintf("Content-Length: %d", len(body)))
		} else {
			head = append(head, a)
		}
	}
	reply := exchange(ts, dial(ts, flag), strings.Join(head, "\r\n")+"\r\n\r\n"+body)
	_, err := io.WriteString(ts.Stdout(), strings.ReplaceAll(reply, "\r\n", "\n"))
	ts.Check(err)
}

func cmdRaw(ts *testscript.TestScript, neg bool, args []string) {
	flag, args := door(args)
	if neg || len(args) != 1 {
		ts.Fatalf("usage: raw [-tls|-unix] FILE")
	}
	head, body, _ := strings.Cut(expand(ts, ts.ReadFile(args[0])), "\n\n")
	request := strings.ReplaceAll(head, "\n", "\r\n") + "\r\n\r\n" + body
	reply := exchange(ts, dial(ts, flag), request)
	_, err := io.WriteString(ts.Stdout(), strings.ReplaceAll(reply, "\r\n", "\n"))
	ts.Check(err)
}

// expand replaces the variables in s.
func expand(ts *testscript.TestScript, s string) string { return os.Expand(s, ts.Getenv) }

// cmdNPM runs with the environment of the test, in which npm finds its
// configuration.
func cmdNPM(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: npm NAME")
	}
	dir := inWork(ts, args[0])
	ts.Check(os.CopyFS(dir, os.DirFS(filepath.Join("npm", args[0]))))
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		ts.Fatalf("npm: %v\n%s", err, out)
	}
}
