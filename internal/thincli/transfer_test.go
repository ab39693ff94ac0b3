package thincli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
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

func newWire(t *testing.T, conn net.Conn) *wire {
	return &wire{t: t, Conn: conn, r: bufio.NewReader(conn)}
}

func TestTransfers(t *testing.T) {
	const (
		ok   = "HTTP/1.1 200 OK\r\n\r\n"
		gone = "new was not complete and has not been kept.\n"
	)
	get := func(file, url string, answer Message) func(*wire) {
		return func(w *wire) {
			w.hello()
			w.send(HTTPGet{file, url})
			if answer != nil {
				w.expectMessage(answer)
				w.send(Exit{0})
			}
			w.expectEnd()
		}
	}
	put := func(file string, answer Message) func(*wire) {
		return func(w *wire) {
			w.hello()
			w.send(HTTPPut{file, "/put"})
			if answer != nil {
				w.expectMessage(answer)
				w.send(Exit{0})
			}
			w.expectEnd()
		}
	}
	reply := func(request, answer string) func(*wire) {
		return func(w *wire) {
			if got := w.head(); got != request {
				t.Errorf("request %q, want %q", got, request)
			}
			w.send(answer)
		}
	}
	for _, tc := range []struct {
		name   string
		args   string
		peer   []func(*wire)
		code   int
		stdout string
		stderr string
		dialed string
		file   string // wanted contents of the file "new"
	}{
		{
			name: "to standard output", args: "x filename=",
			peer:   []func(*wire){get("", "/ok", OK), reply("GET /ok HTTP/1.0\r\n\r\n", ok+"data")},
			stdout: "data",
		},
		{
			name: "long head", args: "x f=new",
			peer: []func(*wire){get("new", "/ok", OK), reply("GET /ok HTTP/1.0\r\n\r\n", "HTTP/1.0 200 Fine\r\nA: "+strings.Repeat("b", 9000)+"\r\n\r\ndata")},
			file: "data",
		},
		{
			name: "the same file by another path", args: "x f=sub/../new",
			peer: []func(*wire){get("./new", "/ok", OK), reply("GET /ok HTTP/1.0\r\n\r\n", ok+"data")},
			file: "data",
		},
		{
			name: "file exists", args: "x f=old",
			peer: []func(*wire){get("old", "/ok", Failed), reply("GET /ok HTTP/1.0\r\n\r\n", ok+"data")},
			code: 1, stderr: "Operation failed. Error: Sys_error(\"old: File exists\")\n",
		},
		{
			name: "two of one name", args: "x f=new",
			peer: []func(*wire){func(w *wire) {
				w.hello()
				w.send(HTTPGet{"new", "/ok"})
				w.expectMessage(OK)
				w.send(HTTPGet{"./new", "/ok"})
				w.expectMessage(Failed)
			}, reply("GET /ok HTTP/1.0\r\n\r\n", ok+"data"), reply("GET /ok HTTP/1.0\r\n\r\n", ok+"data")},
			code: 1, stderr: "Operation failed. Error: Sys_error(\"./new: File exists\")\n" + gone,
		},
		{
			name: "a device", args: "x f=/dev/null",
			peer: []func(*wire){get("/dev/null", "/ok", Failed), reply("GET /ok HTTP/1.0\r\n\r\n", ok+"data")},
			code: 1, stderr: "Operation failed. Error: Sys_error(\"/dev/null: File exists\")\n",
		},
		{
			name: "no such directory", args: "x f=no/new",
			peer: []func(*wire){get("no/new", "/ok", Failed), reply("GET /ok HTTP/1.0\r\n\r\n", ok+"data")},
			code: 1, stderr: "Operation failed. Error: Sys_error(\"no/new: No such file or directory\")\n",
		},
		{
			name: "not permitted", args: "x f=new",
			peer: []func(*wire){get("/etc/evil", "/ok", nil), reply("GET /ok HTTP/1.0\r\n\r\n", ok+"data")},
			code: 1, stderr: "File not permitted: Blocked upload/download of the file /etc/evil, which was requested by the server. " +
				"The file name was not present on the command line\n.\n",
		},
		{
			name: "refused", args: "x f=new",
			peer: []func(*wire){get("new", "/ok", Failed), reply("GET /ok HTTP/1.0\r\n\r\n", "HTTP/1.1 403 Forbidden\r\n\r\nbody")},
		},
		{
			name: "not HTTP", args: "x f=new",
			peer: []func(*wire){get("new", "/ok", Failed), reply("GET /ok HTTP/1.0\r\n\r\n", "hello\r\n\r\n")},
		},
		{
			name: "as long as announced", args: "x f=new",
			peer: []func(*wire){get("new", "/ok", OK), reply("GET /ok HTTP/1.0\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length:  4\r\n\r\ndata")},
			file: "data",
		},
		{
			name: "cut short", args: "x f=new",
			peer:   []func(*wire){get("new", "/ok", Failed), reply("GET /ok HTTP/1.0\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ndata")},
			stderr: gone,
		},
		{
			name: "failed in the end", args: "x f=new",
			peer: []func(*wire){func(w *wire) {
				w.hello()
				w.send(HTTPGet{"new", "/ok"})
				w.expectMessage(OK)
				w.send(PrintStderr{"wrong\n"}, Exit{1})
			}, reply("GET /ok HTTP/1.0\r\n\r\n", ok+"data")},
			code: 1, stderr: "wrong\n" + gone,
		},
		{
			name: "server lost behind the end", args: "x f=new",
			peer: []func(*wire){func(w *wire) {
				w.hello()
				w.send(HTTPGet{"new", "/ok"})
				w.expectMessage(OK)
			}, reply("GET /ok HTTP/1.0\r\n\r\n", ok+"data")},
			code: 1, stderr: "Lost connection to the server.\n" + gone,
		},
		{
			name: "cut short, to standard output", args: "x filename=",
			peer:   []func(*wire){get("", "/ok", Failed), reply("GET /ok HTTP/1.0\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ndata")},
			stdout: "data",
		},
		{
			name: "length is no number", args: "x f=new",
			peer: []func(*wire){get("new", "/ok", Failed), reply("GET /ok HTTP/1.0\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\ndata")},
		},
		{
			name: "redirect", args: "x f=new --nossl -p 8080",
			peer: []func(*wire){
				get("new", "/ok?a=%20b", OK),
				reply("GET /ok?a=%20b HTTP/1.0\r\n\r\n", "HTTP/1.1 302 Found\r\nlocation: https://other:99/there?a=%20b%3a\r\n\r\n"),
				reply("GET /there?a= b: HTTP/1.0\r\n\r\n", "HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n"),
				reply("GET /again HTTP/1.0\r\n\r\n", ok+"data"),
			},
			dialed: "127.0.0.1:8080 127.0.0.1:8080 other:8080 other:8080",
			file:   "data",
		},
		{
			name: "plain URL is a path", args: "x f=new",
			peer: []func(*wire){get("new", "http://h/x", OK), reply("GET http://h/x HTTP/1.0\r\n\r\n", ok)},
			file: "",
		},
		{
			name: "upload", args: "x f=old",
			peer: []func(*wire){put("old", OK), func(w *wire) {
				w.expect([]byte("PUT /put HTTP/1.0\r\nContent-length: 4\r\n\r\n"))
				w.send(ok)
				w.expect([]byte("1234"))
				w.expectEnd()
			}},
		},
		{
			name: "upload of a device", args: "x f=/dev/null",
			peer: []func(*wire){put("/dev/null", OK), func(w *wire) {
				w.expect([]byte("PUT /put HTTP/1.0\r\n\r\n"))
				w.send(ok)
				w.expectEnd()
			}},
		},
		{
			name: "upload of nothing", args: "x f=none", peer: []func(*wire){put("none", Failed)},
			code: 1, stderr: "Operation failed. Error: file 'none' does not exist\n",
		},
		{
			name: "upload not permitted", args: "x f=old", peer: []func(*wire){put("/etc/passwd", nil)},
			code: 1, stderr: "File not permitted: Blocked upload/download of the file /etc/passwd, which was requested by the server. " +
				"The file name was not present on the command line\n.\n",
		},
		{
			name: "upload refused", args: "x f=old",
			peer: []func(*wire){put("old", Failed), reply("PUT /put HTTP/1.0\r\nContent-length: 4\r\n\r\n", "HTTP/1.1 500 Internal Error\r\n\r\n")},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPeer(t, tc.peer...)
			if err := os.WriteFile(filepath.Join(p.dir, "old"), []byte("1234"), 0o600); err != nil {
				t.Fatal(err)
			}
			p.check(p.run(strings.Fields(tc.args)...), tc.code, tc.stdout, tc.stderr)
			if got := strings.Join(p.dialed, " "); tc.dialed != "" && got != tc.dialed {
				t.Errorf("connected to %s, want %s", got, tc.dialed)
			}
			got, err := os.ReadFile(filepath.Join(p.dir, "new"))
			if string(got) != tc.file {
				t.Errorf("file %q, %v, want %q", got, err, tc.file)
			}
		})
	}
}

// TestFailureBesideError has a server that answers a failed transfer at once:
// what the client knows of it counts.
func TestFailureBesideError(t *testing.T) {
	for range 50 {
		p := newPeer(t, func(w *wire) {
			w.hello()
			w.send(HTTPGet{"old", "/ok"})
			w.expectMessage(Failed)
			w.send(Error{"CLIENT_ERROR", nil}, Exit{1})
			w.expectEnd()
		}, func(w *wire) {
			w.head()
			w.send("HTTP/1.1 200 OK\r\n\r\ndata")
		})
		if err := os.WriteFile(filepath.Join(p.dir, "old"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		p.check(p.run("x", "f=old"), 1, "", "Operation failed. Error: Sys_error(\"old: File exists\")\n")
	}
}

// Text from the server appears while a transfer runs.
func TestProgressDuringTransfer(t *testing.T) {
	seen := make(chan struct{})
	p := newPeer(
		t,
		func(w *wire) {
			w.hello()
			w.send(HTTPGet{"f", "/x"}, PrintStderr{"half"})
			w.expectMessage(OK)
			w.send(PrintStderr{" done"}, Exit{0})
		},
		func(w *wire) {
			w.head()
			w.send("HTTP/1.1 200 OK\r\n\r\n1")
			<-seen
			w.send("2")
		},
	)
	p.stderr.written = func(all string) {
		if all == "half" {
			close(seen)
		}
	}
	p.check(p.run("x", "f=f"), 0, "", "half done")
}

// A server that gives up does not wait for the copy, and neither does the client.
func TestExitDuringTransfer(t *testing.T) {
	for _, last := range []Message{Exit{1}, nil} {
		stuck := make(chan struct{})
		p := newPeer(
			t,
			func(w *wire) {
				w.hello()
				w.send(HTTPGet{"f", "/x"})
				<-stuck
				if last != nil {
					w.send(last)
				}
			},
			func(w *wire) {
				w.head()
				w.send("HTTP/1.1 200 OK\r\n\r\n1")
				close(stuck)
				_, _ = io.Copy(io.Discard, w.r)
			},
		)
		stderr := ""
		if last == nil {
			stderr = "Lost connection to the server.\n"
		}
		code := p.run("x", "f=f")
		if strings.Contains(p.stderr.String(), "kept") { // unless it did not even get to make the file
			stderr += "f was not complete and has not been kept.\n"
		}
		p.check(code, 1, "", stderr)
		if _, err := os.Stat(filepath.Join(p.dir, "f")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a part of the file is left: %v", err)
		}
	}
}

// Neither a pipe that nobody writes to nor one that nobody opens keeps the
// client from noticing that the server is gone.
func TestServerLostDuringUpload(t *testing.T) {
	for _, opened := range []bool{true, false} {
		uploading := make(chan struct{})
		p := newPeer(
			t,
			func(w *wire) {
				w.hello()
				w.send(HTTPPut{"pipe", "/x"})
				if opened {
					<-uploading
				}
			},
			func(w *wire) {
				w.head()
				w.send("HTTP/1.1 200 OK\r\n\r\n")
				close(uploading)
				_, _ = io.Copy(io.Discard, w.r)
			},
		)
		name := filepath.Join(p.dir, "pipe")
		if err := syscall.Mkfifo(name, 0o600); err != nil {
			t.Fatal(err)
		}
		if opened {
			keep, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer keep.Close()
		}
		p.check(p.run("x", "f=pipe"), 1, "", "Lost connection to the server.\n")
		if !opened {
			// Let go of the goroutine that is still trying to open the pipe.
			if f, err := os.OpenFile(name, os.O_RDWR, 0); err == nil {
				f.Close()
			}
		}
	}
}

func TestHeartbeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []Message
		dials := 0
		env := Env{
			Stdin: strings.NewReader(""), Stdout: new(bytes.Buffer), Stderr: new(bytes.Buffer), Dir: t.TempDir(),
			Dial: func(_ context.Context, network, _ string) (net.Conn, error) {
				if network == "unix" {
					return nil, os.ErrNotExist
				}
				dials++
				client, server := net.Pipe()
				w := newWire(t, server)
				if dials == 1 {
					go func() {
						w.hello()
						w.send(HTTPGet{"f", "/x"})
						for len(got) == 0 || got[len(got)-1] == Wait {
							m, err := ReadMessage(w.r, 100)
							if err != nil {
								t.Error(err)
							}
							got = append(got, m)
						}
						w.send(Exit{0})
					}()
				} else {
					go func() {
						defer server.Close()
						w.head()
						w.send("HTTP/1.1 200 OK\r\n\r\nx")
						time.Sleep(2*heartbeat + time.Second)
					}()
				}
				return client, nil
			},
		}
		if code := Run(t.Context(), env, []string{"x", "f=f"}); code != 0 {
			t.Errorf("exit %d, %s", code, env.Stderr)
		}
		if len(got) != 3 || got[0] != Wait || got[1] != Wait || got[2] != OK {
			t.Errorf("messages %v, want two heartbeats and OK", got)
		}
	})
}

func TestConsole(t *testing.T) {
	p := newPeer(
		t,
		func(w *wire) {
			w.hello()
			w.send(HTTPConnect{"/console"})
			w.expectMessage(OK)
			w.send(Exit{0})
		},
		func(w *wire) {
			w.expect([]byte("CONNECT /console HTTP/1.0\r\ncontent-length: 0\r\n\r\n"))
			w.send("HTTP/1.1 200 OK\r\n\r\nlogin: ")
			w.expect([]byte("root"))
			w.expectEnd()
		},
	)
	p.stdin = "root\x1dnot sent"
	p.check(p.run("console", "vm=x"), 0, "login: ", "")
}
