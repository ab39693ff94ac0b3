// Package wordwrap breaks the prose of help between words. It hides where the
// lines end; how wide they may be, and what stands in front of them, is its
// callers' business.
package wordwrap

import (
	"strings"
	"unicode/utf8"
)

// Fold breaks the lines of a text, its paragraphs, between words such that they
// fit a number of columns. Every line but the first starts with the indent, and
// the first leaves room for it; empty lines stay empty. A word that is too long
// has a line of its own. Every rune is one column wide.
func Fold(text string, columns int, indent string) string {
	columns -= utf8.RuneCountInString(indent)
	var lines []string
	for paragraph := range strings.SplitSeq(text, "\n") {
		line := ""
		for word := range strings.FieldsSeq(paragraph) {
			switch {
			case line == "":
				line = word
			case utf8.RuneCountInString(line+" "+word) > columns:
				lines = append(lines, line)
				line = word
			default:
				line += " " + word
			}
		}
		lines = append(lines, line)
	}
	for i, line := range lines {
		if i > 0 && line != "" {
			lines[i] = indent + line
		}
	}
	return strings.Join(lines, "\n")
}
