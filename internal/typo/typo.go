// Package typo finds out what a mistyped word was meant to be. It hides what
// makes two words alike; what the words are is its callers' business.
package typo

import (
	"slices"
	"strings"
)

// Nearly reports whether a word of more than two bytes is another with one byte
// wrong, too many or missing, or with its bytes in another order. Underscores,
// as the names of XenAPI have them, are hyphens, as those of parameters do.
// A word is nearly itself.
func Nearly(a, b string) bool {
	a, b = strings.ReplaceAll(a, "_", "-"), strings.ReplaceAll(b, "_", "-")
	return len(a) > 2 && (Distance(a, b) <= 1 || slices.Equal(sorted(a), sorted(b)))
}

func sorted(s string) []byte { return slices.Sorted(slices.Values([]byte(s))) }

// Distance is how many bytes must be inserted, removed or replaced to make one
// word of another (Levenshtein); for words of very different lengths, how
// different these are.
func Distance(a, b string) int {
	if d := max(len(a)-len(b), len(b)-len(a)); d > 2 {
		return d
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
