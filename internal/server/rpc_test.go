package server

import (
	"net/http/httptest"
	"strings"
	"testing"
)

func TestRPCWriter(t *testing.T) {
	tests := []struct {
		name   string
		pieces []string
		length string // Content-Length
	}{
		{"nothing", nil, "0"},
		{"small", []string{"ab", "c"}, "3"},
		{"just fits", []string{strings.Repeat("x", replyBuffer-1), "y"}, "65536"},
		{"one too many", []string{strings.Repeat("x", replyBuffer), "y", "z"}, ""},
		{"large at once", []string{strings.Repeat("x", 3*replyBuffer)}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rec := httptest.NewRecorder()
			w := new(Server).newRPCWriter(rec)
			for _, p := range tt.pieces {
				if n, err := w.Write([]byte(p)); n != len(p) || err != nil {
					t.Fatalf("Write: %d, %v", n, err)
				}
				if held := w.held.Len(); held > replyBuffer {
					t.Fatalf("%d bytes held back", held)
				}
			}
			if err := w.finish(); err != nil {
				t.Fatal(err)
			}
			if got := rec.Header().Get("Content-Length"); got != tt.length {
				t.Errorf("Content-Length %q, want %q", got, tt.length)
			}
			if got := rec.Body.String(); got != strings.Join(tt.pieces, "") {
				t.Errorf("body of %d bytes is not what was written", len(got))
			}
		})
	}
}
