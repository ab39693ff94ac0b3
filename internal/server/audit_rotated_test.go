package server

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// zipped is what gzip makes of a text.
func zipped(t *testing.T, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Files that a rotation has renamed and compressed come before the one that is
// written, in the order of their numbers, from a time on or whole.
func TestAuditLogRotated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	entry := func(day int) string {
		return fmt.Sprintf(`{"time":"2020-01-%02dT00:00:00Z","msg":"VDI.destroy"}`+"\n", day)
	}
	files := map[string][]byte{
		".10.gz": zipped(t, entry(1)+entry(2)), ".3.gz": zipped(t, entry(3)+entry(4)), ".2": []byte(entry(5) + entry(6)),
		".2.gz": []byte("being written"), ".1": nil, "": []byte(entry(7)),
		".04": []byte("not ours"), ".-1": []byte("not ours"), ".bak": []byte("not ours"), "-20200101": []byte("not ours"),
	}
	for name, content := range files {
		if err := os.WriteFile(path+name, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	get := func(since time.Time) string {
		t.Helper()
		logs, err := openAuditLogs(path)
		if err != nil {
			t.Fatal(err)
		}
		defer logs.Close()
		length, err := logs.since(t.Context(), since)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		if err := logs.send(t.Context(), &b); err != nil || int64(b.Len()) != length {
			t.Fatalf("%v; %d bytes of %d", err, b.Len(), length)
		}
		return b.String()
	}
	want := func(from, to int) (text string) {
		for day := from; day <= to; day++ {
			text += entry(day)
		}
		return text
	}
	if got := get(time.Time{}); got != want(1, 7) {
		t.Errorf("whole: %s", got)
	}
	for day := 1; day <= 8; day++ {
		if got := get(time.Date(2020, 1, day, 0, 0, 0, 0, time.UTC)); got != want(day, 7) {
			t.Errorf("from the %d on: %s", day, got)
		}
	}
	if err := os.Remove(path); err != nil { // has been renamed, and not yet made anew
		t.Fatal(err)
	}
	if got := get(time.Time{}); got != want(1, 6) {
		t.Errorf("between the two steps of a rotation: %s", got)
	}
	if err := os.WriteFile(path+".3.gz", files[".3.gz"][:20], 0o600); err != nil {
		t.Fatal(err)
	}
	logs, err := openAuditLogs(path)
	if err != nil {
		t.Fatal(err)
	}
	defer logs.Close()
	if _, err := logs.since(t.Context(), time.Time{}); !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), ".3.gz") {
		t.Errorf("a file that is cut off: %v", err)
	}
	if _, err := openAuditLogs(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no log at all: %v", err)
	}
}
