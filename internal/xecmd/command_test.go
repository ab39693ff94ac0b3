package xecmd_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"coppice/internal/api"
	"coppice/internal/db"
	"coppice/internal/login"
	"coppice/internal/server"
	"coppice/internal/storage"
	"coppice/internal/storage/mem"
	"coppice/internal/thincli"
	"coppice/internal/users"
	"coppice/internal/xapi"

	"github.com/cockroachdb/datadriven"
)

const password = "secret"

// verifier is made once: it is slow on purpose.
var verifier = login.Hash(password)

// shell is a server with disks in memory, and the client that talks to it.
type shell struct {
	t     *testing.T
	dir   string // where the client is
	url   string // of the server
	nbd   string // socket on which it serves disks
	dial  thincli.DialFunc
	stdin string
	vars  map[string]string
}

func newShell(t *testing.T) *shell {
	t.Helper()
	return newShellOn(t, mem.Driver())
}

// newShellOn is newShell with SRs of a driver.
func newShellOn(t *testing.T, driver storage.Driver) *shell {
	t.Helper()
	d, err := db.Open(t.Context(), xapi.Datamodel(), db.NewMemStore())
	if err != nil {
		t.Fatal(err)
	}
	sockets, err := os.MkdirTemp("", "xe") // the names of sockets must be short
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(sockets, "nbd.sock")
	a, err := api.New(t.Context(), api.Config{
		DB: d, Storage: storage.Registry{driver.Type: driver}, RootPassword: verifier, DataDir: t.TempDir(),
		Users: users.At(filepath.Join(t.TempDir(), "users.json")),
		NBD:   func() api.NBDEndpoints { return api.NBDEndpoints{Socket: socket} },
	})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	disks, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	nbd := server.NewNBD(a, slog.New(slog.DiscardHandler), 0)
	nbd.Serve(disks, nil)
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- server.New(server.Config{API: a}).Serve(ctx, ln) }()
	t.Cleanup(func() {
		stop()
		for _, err := range []error{<-served, nbd.Close(), a.Close(), d.Close(), os.RemoveAll(sockets)} {
			if err != nil {
				t.Error(err)
			}
		}
	})
	return &shell{
		t: t, dir: t.TempDir(), vars: map[string]string{}, url: "http://" + ln.Addr().String(), nbd: socket,
		dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			if network == "unix" {
				return nil, os.ErrNotExist
			}
			return new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
		},
	}
}

// xe runs the client as root, unless the arguments say otherwise.
func (s *shell) xe(args ...string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	env := thincli.Env{
		Stdin: strings.NewReader(s.stdin), Stdout: &out, Stderr: &errs, Dir: s.dir, Dial: s.dial,
		Getenv: func(k string) string {
			if k == "XE_EXTRA_ARGS" {
				return "password=" + password
			}
			return ""
		},
	}
	code = thincli.Run(s.t.Context(), env, args)
	return out.String(), errs.String(), code
}

// must is xe for commands that succeed; it returns what they print.
func (s *shell) must(args ...string) string {
	s.t.Helper()
	stdout, stderr, code := s.xe(args...)
	if code != 0 {
		s.t.Fatalf("xe %s: exit %d\n%s", strings.Join(args, " "), code, stderr)
	}
	return strings.TrimSpace(stdout)
}

var (
	uuids   = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	dates   = regexp.MustCompile(`20[0-9]{6}T[0-9:]{8}Z`)
	slots   = regexp.MustCompile(`20[0-9]{2}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}`)
	allowed = regexp.MustCompile(`(allowed-operations \(SRO\)): .*`)
)

// settle replaces what differs from run to run.
func (s *shell) settle(text string) string {
	for name, value := range s.vars {
		if value != "" {
			text = strings.ReplaceAll(text, value, "$"+name)
		}
	}
	text = strings.ReplaceAll(text, "OpaqueRef:", "ref:")
	text = uuids.ReplaceAllString(text, "<uuid>")
	text = slots.ReplaceAllString(text, "<slot>")
	text = allowed.ReplaceAllString(text, "$1: <operations>")
	return dates.ReplaceAllString(text, "<date>")
}

// words splits a line at blanks that are not in single quotes and expands $NAME.
func (s *shell) words(line string) []string {
	names := slices.SortedFunc(mapKeys(s.vars), func(a, b string) int { return cmp.Compare(len(b), len(a)) })
	for _, name := range names {
		line = strings.ReplaceAll(line, "$"+name, s.vars[name])
	}
	var out []string
	var cur strings.Builder
	quoted, started := false, false
	for _, c := range line {
		switch {
		case c == '\'':
			quoted, started = !quoted, true
		case c == ' ' && !quoted:
			if started {
				out = append(out, cur.String())
			}
			cur.Reset()
			started = false
		default:
			cur.WriteRune(c)
			started = true
		}
	}
	if started {
		out = append(out, cur.String())
	}
	return out
}

func mapKeys(m map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// show is what a run printed, in one text.
func show(stdout, stderr string, code int) string {
	var b strings.Builder
	b.WriteString(stdout)
	for line := range strings.Lines(stderr) {
		b.WriteString("! " + strings.TrimRight(line, "\n") + "\n")
	}
	if code != 0 {
		fmt.Fprintf(&b, "exit %d\n", code)
	}
	return b.String()
}

// The scripts in testdata/commands run against a whole server:
//
//	xe            run each line; lines of standard error get a "! "
//	let NAME      run a line and keep what it prints for $NAME
//	stdin         the text that later commands read
//	write NAME    a file in the client's directory
//	digest NAME…  sizes and SHA-256 of such files
func TestCommands(t *testing.T) {
	datadriven.Walk(t, "testdata/commands", func(t *testing.T, path string) {
		s := newShell(t)
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			name := func() string { return d.CmdArgs[0].Key }
			switch d.Cmd {
			case "xe":
				var b strings.Builder
				for line := range strings.Lines(d.Input) {
					b.WriteString(show(s.xe(s.words(strings.TrimSuffix(line, "\n"))...)))
				}
				return s.settle(b.String())
			case "let":
				stdout, stderr, code := s.xe(s.words(d.Input)...)
				if code == 0 {
					s.vars[name()] = strings.TrimSpace(stdout)
				}
				return s.settle(show(stdout, stderr, code))
			case "stdin":
				s.stdin = d.Input + "\n"
				return ""
			case "write":
				if err := os.WriteFile(filepath.Join(s.dir, name()), []byte(d.Input), 0o600); err != nil {
					t.Fatal(err)
				}
				return ""
			case "digest":
				var b strings.Builder
				for _, a := range d.CmdArgs {
					data, err := os.ReadFile(filepath.Join(s.dir, a.Key))
					if err != nil {
						t.Fatal(err)
					}
					fmt.Fprintf(&b, "%d bytes, %x\n", len(data), sha256.Sum256(data))
				}
				return b.String()
			}
			d.Fatalf(t, "unknown command %q", d.Cmd)
			return ""
		})
	})
}
