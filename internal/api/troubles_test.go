package api

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"testing"
)

// What fails again and again is logged once, and once when it is over.
func TestTroubles(t *testing.T) {
	var out bytes.Buffer
	ctx, stop := context.WithCancel(t.Context())
	plain := slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})
	lasting := troubles{ctx: ctx, log: slog.New(plain)}
	full := errors.New("full")
	for _, err := range []error{nil, full, full, nil, nil, full} {
		lasting.note("late", "", err)
	}
	lasting.note("late", "sr", full)
	stop()
	lasting.note("late", "", nil)
	want := `level=WARN msg=late err=full
level=INFO msg="no longer: late"
level=WARN msg=late err=full
level=WARN msg=late sr=sr err=full
`
	if out.String() != want {
		t.Errorf("logged\n%s, want\n%s", out.String(), want)
	}
}
