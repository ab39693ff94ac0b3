package typo

import "testing"

func TestNearly(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"base", "base", true},
		{"bas", "base", true},
		{"bsae", "base", true},
		{"Base", "base", true},
		{"sr_id", "sr-id", true},
		{"sr-id", "sr_id", true},
		{"ba", "base", false},
		{"ref", "re", true},
		{"re", "ref", false}, // too short to be sure
		{"vdi", "sr", false},
		{"format", "force", false},
		{"", "", false},
	} {
		if got := Nearly(tt.a, tt.b); got != tt.want {
			t.Errorf("%q for %q: %v", tt.a, tt.b, got)
		}
	}
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "ab", 2}, {"abc", "abc", 0}, {"abc", "abd", 1}, {"abc", "bc", 1}, {"ab", "ba", 2}, {"abcdef", "a", 5}} {
		if got := Distance(tt.a, tt.b); got != tt.want {
			t.Errorf("%q to %q: %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}
