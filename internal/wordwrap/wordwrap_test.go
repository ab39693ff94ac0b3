package wordwrap

import "testing"

func TestFold(t *testing.T) {
	for _, tt := range []struct{ name, text, indent, want string }{
		{"nothing", "", "  ", ""},
		{"one line", "as wide as", "", "as wide as"},
		{"one too many", "as wide as it", "", "as wide as\nit"},
		{"room for the indent", "as wide as it", "  ", "as wide\n  as it"},
		{"runes", "äs wide äs it", "", "äs wide äs\nit"},
		{"indent of runes", "as wide as it", "· ", "as wide\n· as it"},
		{"long words", "a extraordinary one", "  ", "a\n  extraordinary\n  one"},
		{"long words first", "extraordinary", "  ", "extraordinary"},
		{"blanks", "  a \t b  ", "  ", "a b"},
		{"paragraphs", "one two three\nfour five\n\nsix", "  ", "one two\n  three\n  four\n  five\n\n  six"},
		{"only blanks between", "a\n \nb", "  ", "a\n\n  b"},
		{"line feeds around", "\na\n", "  ", "\n  a\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Fold(tt.text, 10, tt.indent); got != tt.want {
				t.Errorf("got\n%q, want\n%q", got, tt.want)
			}
		})
	}
}
