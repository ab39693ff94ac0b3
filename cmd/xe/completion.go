package main

import (
	_ "embed"
	"fmt"
	"os"
)

// completion is a program of bash that completes command lines of xe. It is the
// client's own, and printed without a server, as shells run it when they start:
// what a server sends must not become a program of its user.
//
//go:embed completion.bash
var completion string

// printCompletion is "xe completion" with the words after it. It returns the exit code.
func printCompletion(words []string) int {
	if len(words) > 0 {
		fmt.Fprintln(os.Stderr, "Usage: xe completion\nPrints a script with which bash completes command lines of xe: source <(xe completion)")
		return 1
	}
	if _, err := fmt.Print(completion); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
