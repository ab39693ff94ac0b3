package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
)

// Exit codes; see the package comment.
const (
	exitOK       = 0
	exitBadNews  = 1
	exitUnusable = 2
)

// env is what a command may use of the process it runs in.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
}

// command is one verb of the command line. Its error ends up on stderr and in
// the exit code.
type command struct {
	name    string
	args    string // what follows the flags, for the usage line
	summary string
	run     func(ctx context.Context, e env, args []string) error
}

func commands() []command {
	return []command{
		{"serve", "", "run the server", serve},
		{"check", "[STORE…]", "verify the stores of a stopped server, exactly, and repair them", check},
		{"scrub", "[STORE…]", "read all of the stores of a stopped server and restore what has copies", scrub},
		{"dump", "[STORE]", "show what is inside a store of a stopped server", dump},
		{"doctor", "", "look for trouble around the server, with ways out", doctor},
		{"user", strings.Join(userForms, " | "), "look after the users beside root, also while the server runs", user},
		{"version", "", "tell what this binary is", version},
	}
}

// badNews is an error for which a command has run to its end.
type badNews struct{ error }

// hinted is an error with a way out for the operator.
type hinted struct {
	err  error
	hint string
}

func (e *hinted) Error() string { return e.err.Error() }
func (e *hinted) Unwrap() error { return e.err }

// run executes one command line and returns the exit code.
func run(ctx context.Context, e env, args []string) int {
	if len(args) == 0 {
		usage(e.stderr)
		return exitUnusable
	}
	name, args := args[0], args[1:]
	switch name {
	case "help", "-h", "-help", "--help":
		if len(args) == 0 {
			usage(e.stdout)
			return exitOK
		}
		name, args = args[0], []string{"-h"}
	case "-version", "--version":
		name = "version"
	}
	for _, c := range commands() {
		if c.name == name {
			return report(e, name, c.run(ctx, e, args))
		}
	}
	return report(e, name, &hinted{fmt.Errorf("there is no command %q", name), "coppice help lists them"})
}

// report prints the error of a command, if there is one to print, and
// returns the exit code.
func report(e env, name string, err error) int {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return exitOK
	}
	fmt.Fprintf(e.stderr, "coppice %s: %v\n", name, err)
	if h, ok := errors.AsType[*hinted](err); ok {
		fmt.Fprintf(e.stderr, "  %s\n", strings.ReplaceAll(h.hint, "\n", "\n  "))
	}
	if _, ok := errors.AsType[badNews](err); ok {
		return exitBadNews
	}
	return exitUnusable
}
