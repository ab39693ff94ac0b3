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
		{"user", "list | add NAME | passwd NAME | role NAME | remove NAME", "look after the users beside root, also while the server runs", user},
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
	if name == "help" || name == "-h" || name == "-help" || name == "--help" {
		usage(e.stdout)
		return exitOK
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
	case errors.Is(err, errFlags):
		return exitUnusable // the flag package has said it
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

func usage(w io.Writer) {
	fmt.Fprint(w, "Usage: coppice COMMAND [FLAGS]\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-9s %s\n", c.name, c.summary)
	}
	fmt.Fprint(w, "\nWithout flags every command uses the default data directory.\n\"coppice COMMAND -h\" explains the flags of a command.\n")
}

// errFlags says that the command line was bad and that the user knows.
var errFlags = errors.New("bad flags")

// parse parses the flags of command name. It returns flag.ErrHelp when help
// was asked for and given, errFlags when the flags were bad.
func parse(e env, fs *flag.FlagSet, args []string, maxArgs int) error {
	for _, c := range commands() {
		if c.name == fs.Name() {
			fs.Usage = func() {
				fmt.Fprintf(fs.Output(), "Usage: coppice %s\n\n%s.\n\n", strings.TrimSpace(c.name+" [FLAGS] "+c.args), capital(c.summary))
				fs.PrintDefaults()
			}
		}
	}
	fs.SetOutput(e.stderr)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errFlags
	}
	if maxArgs >= 0 && fs.NArg() > maxArgs {
		return fmt.Errorf("unexpected argument %q", fs.Arg(maxArgs))
	}
	return nil
}

func capital(s string) string { return strings.ToUpper(s[:1]) + s[1:] }
