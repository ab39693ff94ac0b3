package xecmd_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"coppice/internal/thincli"
)

// The recorded list, with the uuids of objects that exist here.
func TestListTranscript(t *testing.T) {
	s := newShell(t)
	sr := s.must("sr-list", "--minimal")
	vdi := s.must("vdi-create", "sr-uuid="+sr, "name-label=disk", "virtual-size=1073741824")
	got, stderr, code := s.xe("vdi-list", "uuid="+vdi)
	want := `uuid ( RO)                : ` + vdi + `
          name-label ( RW): disk
    name-description ( RW): 
             sr-uuid ( RO): ` + sr + `
        virtual-size ( RO): 1073741824
            sharable ( RO): false
           read-only ( RO): false


`
	if got != want || stderr != "" || code != 0 {
		t.Errorf("exit %d, %s\n%q, want\n%q", code, stderr, got, want)
	}
}

func TestMinimalEscapes(t *testing.T) {
	s := newShell(t)
	sr := s.must("sr-list", "--minimal")
	s.must("vdi-create", "sr-uuid="+sr, `name-label=a,b\c`, "virtual-size=1MiB")
	if got := s.must("vdi-list", "params=name-label", "--minimal"); got != `a\,b\\c` {
		t.Errorf("%q", got)
	}
	if got := s.must("vdi-param-get", "uuid="+s.must("vdi-list", "--minimal"), "param-name=name-label"); got != `a,b\c` {
		t.Errorf("%q", got)
	}
}

// event-wait returns when something becomes true, and at once when it is.
func TestEventWait(t *testing.T) {
	s := newShell(t)
	vdi := s.must("vdi-create", "sr-uuid="+s.must("sr-list", "--minimal"), "name-label=disk", "virtual-size=1MiB")
	s.must("event-wait", "class=vdi", "uuid="+vdi, "name-label=/=other")
	done := make(chan int)
	go func() {
		_, _, code := s.xe("event-wait", "class=vdi", "uuid="+vdi, "name-label=renamed")
		done <- code
	}()
	s.must("vdi-param-set", "uuid="+vdi, "name-label=renamed")
	if code := <-done; code != 0 {
		t.Errorf("exit %d", code)
	}
}

// A command ends with its client.
func TestHangUp(t *testing.T) {
	s := newShell(t)
	vdi := s.must("vdi-create", "sr-uuid="+s.must("sr-list", "--minimal"), "name-label=disk", "virtual-size=1MiB")
	ctx, hangUp := context.WithCancel(t.Context())
	var out strings.Builder
	env := thincli.Env{
		Stdin: strings.NewReader(""), Stdout: &out, Stderr: &out,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := s.dial(ctx, network, address)
			if err == nil {
				conn = &talkative{Conn: conn, heard: hangUp}
			}
			return conn, err
		},
	}
	code := thincli.Run(ctx, env, []string{"event-wait", "class=vdi", "uuid=" + vdi, "name-label=never", "password=" + password})
	if code != 1 {
		t.Errorf("exit %d, want 1", code)
	}
	// The session of the lost client goes with it: s.must waits for nothing,
	// and the clean-up of newShell for everything that still runs.
	s.must("vdi-destroy", "uuid="+vdi)
}

// talkative hangs up once the banners have been exchanged.
type talkative struct {
	net.Conn
	heard  func()
	writes int
}

func (c *talkative) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if c.writes++; c.writes == 2 {
		c.heard()
	}
	return n, err
}

// A client may bring its own session; it stays open.
func TestOwnSession(t *testing.T) {
	s := newShell(t)
	if err := os.WriteFile(filepath.Join(s.dir, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, stderr, code := s.xe("session_id=OpaqueRef:none", "vdi-list")
	if code != 1 || !strings.Contains(stderr, "handle: OpaqueRef:none") {
		t.Errorf("exit %d, %q", code, stderr)
	}
}
