package thincli

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestOptions(t *testing.T) {
	const creds = " username=root password=null"
	for _, tc := range []struct {
		name    string
		args    string
		extra   string
		rc      string
		address string // "": TLS, so that no request is readable
		body    string // with spaces for newlines
	}{
		{"defaults", "vdi-list", "", "", "127.0.0.1:80", "vdi-list" + creds},
		{"in the middle", "a -u U b -pw P --minimal -p 81 c", "", "", "127.0.0.1:81", "a b --minimal c username=U password=P"},
		{"as parameters", "a username=U password=P=Q port=81 x=y", "", "", "127.0.0.1:81", "a x=y username=U password=P=Q"},
		{"the last wins", "a -u U -u V username=W", "", "", "127.0.0.1:80", "a username=W password=null"},
		{"plain host", "-s h --nossl a", "", "", "h:80", "a" + creds},
		{"plain host by parameter", "server=h nossl=true -p 8080 a", "", "", "h:8080", "a" + creds},
		{"IPv6", "-s [::1] --nossl a", "", "", "[::1]:80", "a" + creds},
		{"option without value", "a -s", "", "", "127.0.0.1:80", "a -s" + creds},
		{"extra arguments", "a b=c", `port=8080,username=u\,v,d=e\x,,--minimal`, "", "127.0.0.1:8080", "a b=c d=ex --minimal username=u,v password=null"},
		{"rc file", "a", "", "port=8080\n\npassword=p=q\nkey=v w\r\n", "127.0.0.1:8080", "a key=v w username=root password=p=q"},
		{"precedence", "a -p 1", "port=2,username=extra", "port=3\nusername=rc\npassword=rc\n", "127.0.0.1:1", "a username=extra password=rc"},
		{"command in the extra arguments", "", "vdi-list", "", "127.0.0.1:80", "vdi-list" + creds},
		{"password file", "-pwf pw -u ignored a", "", "", "127.0.0.1:80", "a username=fu password=fp"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var body string
			p := newPeer(t, func(w *wire) {
				body = w.hello()
				w.send(Exit{0})
			})
			p.rc, p.environ["XE_EXTRA_ARGS"] = tc.rc, tc.extra
			if err := os.WriteFile(filepath.Join(p.dir, "pw"), []byte("fu\nfp\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			p.check(p.run(strings.Fields(tc.args)...), 0, "", "")
			if got := strings.ReplaceAll(body, "\n", " "); got != tc.body {
				t.Errorf("body %q, want %q", got, tc.body)
			}
			if got := strings.Join(p.dialed, " "); got != tc.address {
				t.Errorf("connected to %s, want %s", got, tc.address)
			}
		})
	}
}

func TestTracingHeaders(t *testing.T) {
	for _, tc := range []struct{ args, extra, environ, want string }{
		{"a", "traceparent=x", "", "x"},
		{"a", "traceparent=x", "e", "e"},
		{"a --traceparent c", "traceparent=x", "e", "c"},
	} {
		p := newPeer(t, func(w *wire) {
			head := w.head()
			want := "traceparent: " + tc.want + "\r\nbaggage: b=1\r\ncontent-length: "
			if !strings.Contains(head, want) {
				t.Errorf("head %q lacks %q", head, want)
			}
		})
		p.environ = map[string]string{"XE_EXTRA_ARGS": tc.extra, "TRACEPARENT": tc.environ, "BAGGAGE": "b=1"}
		p.run(strings.Fields(tc.args)...)
	}
}

// What the client says by itself.
func TestLocalMessages(t *testing.T) {
	const contact = "Unable to contact server. Please check server and port settings.\n"
	for _, tc := range []struct {
		name   string
		args   string
		rc     string
		peer   func(*wire)
		code   int
		stdout string
		stderr string
	}{
		{name: "no arguments", stderr: usage},
		{name: "only options", args: "-u root", stderr: usage},
		{name: "help option", args: "vdi-list --help", stderr: usage},
		{name: "version", args: "vdi-list -version", stdout: "ThinCLI protocol: 0.2\n"},
		{name: "bad port", args: "-p 65536 a", stderr: "Port number must be an integer (0-65535)\n" + usage},
		{name: "bad switch", args: "nossl=yes a", code: 1, stderr: "Error: nossl must be true or false, not \"yes\"\n"},
		{name: "no password file", args: "-pwf f a", code: 1, stderr: "Error opening password file 'f'\n"},
		{
			name: "comment in rc file", args: "a", rc: "port=1\n# comment\n", peer: func(w *wire) { w.hello(); w.send(Exit{0}) },
			stderr: "Error parsing rc file. No defaults loaded\n",
		},
		{name: "closed at once", args: "a", peer: func(w *wire) { w.head() }, code: 1, stderr: contact},
		{
			name: "web server", args: "a", peer: func(w *wire) { w.send("HTTP/1.1 404 Not Found\r\n\r\n"); w.head() },
			code: 1, stderr: "Server internal error.\n" + notXE,
		},
		{name: "short web server", args: "a", peer: func(w *wire) { w.send("HTTP/1.1 404\r\n\r\n"); w.head() }, code: 1, stderr: "Server internal error.\n" + notXE},
		{
			name: "garbage", args: "a", peer: func(w *wire) { w.send(strings.Repeat("x", 40)); w.head() },
			code: 1, stderr: "Failed to contact a running management agent.\nTry specifying a server name and port.\n" + usage,
		},
		{
			name: "other version", args: "a", peer: func(w *wire) { w.send(banner, unhex("01000000 07000000")); w.head() }, code: 1,
			stderr: "Protocol version mismatch: Server has protocol version 1.7. Client has 0.2.\n" +
				"Try specifying a server name and port on the command-line.\n" + usage,
		},
		{name: "lost", args: "a", peer: func(w *wire) { w.hello() }, code: 1, stderr: "Lost connection to the server.\n"},
		{
			name: "lost in a frame", args: "a", peer: func(w *wire) { w.hello(); w.send(Print{"x"}, []byte{8, 0}) },
			code: 1, stdout: "x\n", stderr: "Lost connection to the server.\n",
		},
		{
			name: "response from the server", args: "a", peer: func(w *wire) { w.hello(); w.send(OK) },
			code: 1, stderr: "Unexpected message from server: Response OK",
		},
		{
			name: "unknown tag", args: "a", peer: func(w *wire) { w.hello(); w.send(unhex("08000000 09000000 63000000")) },
			code: 1, stderr: "Unhandled exception\nCli_protocol.Unknown_tag(\"command\", 99)\n",
		},
		{name: "prompt without input", args: "a", peer: func(w *wire) { w.hello(); w.send(Prompt{}); w.expectEnd() }, code: 1, stderr: "There is no answer on standard input. Commands that ask for confirmation do without with --force.\n"},
		{name: "large exit code", args: "a", peer: func(w *wire) { w.hello(); w.send(Exit{300}) }, code: 300},
		{name: "verbatim", args: "a", peer: func(w *wire) { w.hello(); w.send(PrintStderr{"a"}, Debug{"no"}, PrintStderr{"b\n"}, Exit{0}) }, stderr: "ab\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPeer(t, tc.peer)
			p.rc = tc.rc
			p.check(p.run(strings.Fields(tc.args)...), tc.code, tc.stdout, tc.stderr)
		})
	}
}

func TestDialFailures(t *testing.T) {
	for _, tc := range []struct {
		err  error
		args []string
		want string
	}{
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, []string{"-s", "host", "-p", "1"}, "Error: Connection refused (calling connect )\nThat was host, port 1. Is the server running there? -s and -p say where it is.\n"},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EHOSTUNREACH)}, []string{"-s", "[::1]"}, "Error: No route to host (calling connect )\nThat was ::1, port 443. Is the server running there? -s and -p say where it is.\n"},
		{&net.DNSError{Err: "no such host", Name: "nowhere"}, []string{"-s", "nowhere"}, "No addrinfo found for host: nowhere, port: 443Host 'nowhere' not found.\n"},
		{context.DeadlineExceeded, nil, "Unable to contact server. Please check server and port settings.\n"},
	} {
		var stderr strings.Builder
		env := Env{
			Stdin: strings.NewReader(""), Stdout: &stderr, Stderr: &stderr,
			Dial: func(context.Context, string, string) (net.Conn, error) { return nil, tc.err },
		}
		if code := Run(t.Context(), env, append(tc.args, "vdi-list")); code != 1 || stderr.String() != tc.want {
			t.Errorf("%v: exit %d, %q, want %q", tc.err, code, stderr.String(), tc.want)
		}
	}
}

func TestUnixSocket(t *testing.T) {
	for _, tc := range []struct{ server, want string }{
		{"127.0.0.1", "/var/lib/xcp/xapi"},
		{"/run/coppice.sock", "/run/coppice.sock"},
	} {
		p := newPeer(t, func(w *wire) { w.hello(); w.send(Print{"hi"}, Exit{0}) })
		var out strings.Builder
		env := Env{
			Stdin: strings.NewReader(""), Stdout: &out, Stderr: &out,
			Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
				if network != "unix" || address != tc.want {
					return nil, fmt.Errorf("unexpected %s %s", network, address)
				}
				return new(net.Dialer).DialContext(ctx, "tcp", p.ln.Addr().String())
			},
		}
		if code := Run(t.Context(), env, []string{"-s", tc.server, "a"}); code != 0 || out.String() != "hi\n" {
			t.Errorf("%s: exit %d, %q", tc.server, code, out.String())
		}
	}
}

func TestDebugOnFail(t *testing.T) {
	for _, code := range []int{0, 1} {
		p := newPeer(t, func(w *wire) { w.hello(); w.send(Debug{"detail"}, Exit{int32(code)}) })
		p.run("--debug-on-fail", "a")
		if got := strings.Contains(p.stderr.String(), "debug: detail\n"); got != (code == 1) {
			t.Errorf("exit %d: detail shown: %t", code, got)
		}
	}
}

// A command line that is interrupted ends, whatever it was doing.
func TestInterrupted(t *testing.T) {
	for _, m := range []Message{nil, Prompt{}, HTTPGet{"f", "/x"}, HTTPPut{"f", "/x"}} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			stdin, typing := net.Pipe()
			env := Env{
				Stdin: stdin, Stdout: new(strings.Builder), Stderr: new(strings.Builder), Dir: t.TempDir(),
				Dial: func(_ context.Context, network, _ string) (net.Conn, error) {
					if network == "unix" {
						return nil, os.ErrNotExist
					}
					client, server := net.Pipe()
					go func() {
						w := newWire(t, server)
						if head := w.head(); !strings.HasPrefix(head, "POST") {
							return // a transfer that nobody answers
						}
						_, _ = w.r.Discard(len("a\nf=f\nusername=root\npassword=null"))
						w.send(appendBanner(nil))
						w.expect(appendBanner(nil))
						if m != nil {
							w.send(m)
						}
						time.Sleep(time.Second)
						cancel()
					}()
					return client, nil
				},
			}
			if err := os.WriteFile(filepath.Join(env.Dir, "f"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if code := Run(ctx, env, []string{"a", "f=f"}); code != 1 {
				t.Errorf("%#v: exit %d, want 1", m, code)
			}
			if got := env.Stderr.(*strings.Builder).String(); got != "Interrupted.\n" {
				t.Errorf("%#v: says %q", m, got)
			}
			typing.Close()
		})
	}
}

// FuzzClient lets a server say anything.
func FuzzClient(f *testing.F) {
	var all []byte
	for _, v := range vectors {
		f.Add(append(appendBanner(nil), unhex(v.bytes)...))
		all = append(all, unhex(v.bytes)...)
	}
	f.Add(append(appendBanner(nil), all...))
	f.Add([]byte("HTTP/1.0 200 OK\r\n\r\n"))
	f.Fuzz(func(t *testing.T, fromServer []byte) {
		dir := t.TempDir()
		first := true
		env := Env{
			Stdin: strings.NewReader("line\n"), Stdout: new(strings.Builder), Stderr: new(strings.Builder), Dir: dir,
			Dial: func(_ context.Context, network, _ string) (net.Conn, error) {
				if network == "unix" || !first {
					return nil, os.ErrNotExist
				}
				first = false
				client, server := net.Pipe()
				go func() {
					defer server.Close()
					go func() { _, _ = io.Copy(io.Discard, server) }()
					_, _ = server.Write(fromServer)
				}()
				return client, nil
			},
		}
		Run(t.Context(), env, []string{"a", "f=permitted"})
		names, err := os.ReadDir(dir)
		if err != nil || len(names) > 0 {
			t.Fatalf("files appeared: %v, %v", names, err)
		}
	})
}
