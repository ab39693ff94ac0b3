package xapi

import (
	"testing"
	"time"
)

func TestParseTime(t *testing.T) {
	want := time.Date(2026, 1, 31, 23, 59, 59, 0, time.UTC)
	for _, s := range []string{
		"2026-01-31T23:59:59Z", "2026-01-31T23:59:59", "20260131T23:59:59Z", "20260131T23:59:59",
		"20260131T11:59:59-12:00", "20260201T01:59:59+02:00", "2026-02-01T01:59:59+0200",
	} {
		got, err := ParseTime(s)
		if err != nil || !got.Equal(want) || got.Location() != time.UTC {
			t.Errorf("ParseTime(%q) = %v, %v, want %v", s, got, err, want)
		}
	}
	if got, err := ParseTime("20260131T23:59:59.5Z"); err != nil || !got.Equal(want.Add(500*time.Millisecond)) {
		t.Errorf("with a fraction: %v, %v", got, err)
	}
	for _, s := range []string{
		"", "T", "111T0:0:0", "2026013T23:59:59Z", "20261331T23:59:59Z", "2026-0131T23:59:59Z", "20260131 23:59:59",
		"20260131T23:59:59+", "20260131T23:59:59+2:00", "20260131T23:59:59+15:00", "20260131T23:59:59+01:60",
		"20260131T23:59:59ZZ", "20260131T23:59", "20260131T23:59:59+-1:0", "202601é1T23:59:59",
	} {
		if got, err := ParseTime(s); err == nil {
			t.Errorf("ParseTime(%q) = %v, want an error", s, got)
		}
	}
}

func FuzzParseTime(f *testing.F) {
	for _, s := range []string{"20260131T23:59:59Z", "2026-01-31T23:59:59-12:00", "111T0:0:0", "T", "20260131T23:59:59.25"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseTime(s)
		if err != nil || d.Year() < 0 || d.Year() > 9999 {
			return
		}
		again, err := ParseTime(FormatTime(d))
		if err != nil {
			t.Fatalf("%q was read as %v and cannot be read back: %v", s, d, err)
		}
		if want := d.Truncate(time.Second); !again.Equal(want) && !d.IsZero() {
			t.Errorf("%q: got %v, want %v", s, again, want)
		}
	})
}
