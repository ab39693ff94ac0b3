package thincli

import (
	"bytes"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// recorded returns the bytes of a hex dump recorded from the stock client.
func recorded(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "wire", name+".hexdump"))
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for line := range strings.Lines(string(text)) {
		digits, _, _ := strings.Cut(line[4:], "|")
		b, err := hex.DecodeString(strings.Join(strings.Fields(digits), ""))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out = append(out, b...)
	}
	return out
}

const recordedVDI = "3f1d2c4b-5a69-4788-9c0d-1e2f3a4b5c6d"

func TestTranscriptList(t *testing.T) {
	p := newPeer(t, func(w *wire) {
		w.expect(recorded(t, "list-head"))
		w.expect(recorded(t, "list-body"))
		w.send(recorded(t, "banner"))
		w.expect(recorded(t, "banner"))
		w.send(recorded(t, "list-print"), recorded(t, "list-exit"))
		w.expectEnd()
	})
	code := p.run("-s", "127.0.0.1", "-p", "8080", "--nossl", "-u", "root", "-pw", "x", "vdi-list")
	p.check(code, 0, string(recorded(t, "list-print")[16:])+"\n", "")
	if got := strings.Join(p.dialed, " "); got != "127.0.0.1:8080" {
		t.Errorf("connected to %s", got)
	}
}

func TestTranscriptExport(t *testing.T) {
	image := bytes.Repeat([]byte("conectix"), 300<<10)
	p := newPeer(
		t,
		func(w *wire) {
			w.expect(bytes.Replace(recorded(t, "list-head"), []byte("33"), []byte("117"), 1))
			w.expect(recorded(t, "export-body"))
			w.send(recorded(t, "banner"))
			w.expect(recorded(t, "banner"))
			w.send(recorded(t, "export-get"))
			w.expect(recorded(t, "export-ok"))
			w.send(recorded(t, "export-bar"), recorded(t, "export-newline"), recorded(t, "export-total"), recorded(t, "export-exit"))
			w.expectEnd()
		},
		func(w *wire) {
			w.expect(recorded(t, "export-request"))
			w.send(recorded(t, "export-reply"), image)
		},
	)
	code := p.run("vdi-export", "uuid="+recordedVDI, "filename=full.vhd", "format=vhd", "--progress", "-u", "root", "-pw", "x", "-p", "8080")
	bar := "\r[-] " + strings.Repeat("#", 54) + "> (100% ETA 00:00:00) "
	p.check(code, 0, "", bar+"\nTotal time: 1.5s\n")

	name := filepath.Join(p.dir, "full.vhd")
	got, err := os.ReadFile(name)
	if err != nil || !bytes.Equal(got, image) {
		t.Errorf("file of %d bytes, %v, want %d", len(got), err, len(image))
	}
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("file mode %v, %v, want 0600", info.Mode(), err)
	}
}

func TestTranscriptImport(t *testing.T) {
	body := "thirteen byte"
	p := newPeer(
		t,
		func(w *wire) {
			w.hello()
			url := strings.Fields(string(recorded(t, "import-request")))[1]
			w.send(HTTPPut{"full.vhd", url})
			w.expectMessage(OK)
			w.send(Exit{0})
		},
		func(w *wire) {
			w.expect(recorded(t, "import-request"))
			if n := w.r.Buffered(); n > 0 {
				t.Errorf("%d bytes of body before the reply", n)
			}
			w.send("HTTP/1.1 200 OK\r\n\r\n")
			w.expect([]byte(body))
			w.expectEnd()
		},
	)
	if err := os.WriteFile(filepath.Join(p.dir, "full.vhd"), []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	code := p.run("vdi-import", "uuid="+recordedVDI, "filename=full.vhd", "format=vhd")
	p.check(code, 0, "", "")
}

// A real server end and the client understand each other without a script.
func TestBothEnds(t *testing.T) {
	var args []string
	p := newPeer(t, func(w *wire) {
		w.head()
		var err error
		body := make([]byte, len("hello\nfile=f.pem\nusername=root\npassword=null"))
		if _, err := io.ReadFull(w.r, body); err != nil {
			t.Error(err)
		}
		if args, err = ReadArgs(bytes.NewReader(body), int64(len(body))); err != nil {
			t.Error(err)
		}
		s, err := Accept(w.Conn, w.r)
		if err != nil {
			t.Error(err)
			return
		}
		defer s.Close()
		file, err := s.Load(t.Context(), "f.pem")
		if err != nil || string(file) != "pem" {
			t.Errorf("loaded %q, %v", file, err)
		}
		line, err := s.Prompt(t.Context())
		if err != nil || line != "yes" {
			t.Errorf("prompted %q, %v", line, err)
		}
		if err := s.Print("out"); err != nil {
			t.Error(err)
		}
		if err := s.Error("CODE", "a", "b"); err != nil {
			t.Error(err)
		}
		if err := s.Exit(3); err != nil {
			t.Error(err)
		}
	})
	p.stdin = "yes\nmore"
	if err := os.WriteFile(filepath.Join(p.dir, "f.pem"), []byte("pem"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.check(p.run("hello", "file=f.pem"), 3, "out\n", "Error code: CODE\nError parameters: a, b\n")
	if got := strings.Join(args, " "); got != "hello file=f.pem username=root password=null" {
		t.Errorf("arguments %q", got)
	}
}
