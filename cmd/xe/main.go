// Command xe is the command line of a XenAPI server: Coppice, XCP-ng or
// XenServer. All commands live in the server, except `xe completion`, which
// prints a script for bash; see package thincli for what is left to do here.
//
// Connection settings come from options, XE_EXTRA_ARGS and ~/.xe, in this
// order. `xe -s 127.0.0.1 -p 8080` reaches a Coppice server on its default
// port; `xe -s /path/of/its/socket` needs no password.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"coppice/internal/thincli"

	"golang.org/x/term"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "completion" {
		os.Exit(printCompletion(os.Args[2:]))
	}
	ctx, interrupt := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signal.Notify(signals, syscall.SIGHUP)
	}
	go func() {
		s := (<-signals).(syscall.Signal)
		signal.Stop(signals) // another one ends it at once
		interrupt(interrupted(s))
	}()
	dir, err := os.Getwd()
	if err != nil {
		dir = "/" // relative file names will not be found, absolute ones work
	}
	code := thincli.Run(ctx, thincli.Env{
		Stdin:       os.Stdin,
		Stdout:      survived(os.Stdout),
		Stderr:      survived(os.Stderr),
		Getenv:      os.Getenv,
		Dir:         dir,
		RawTerminal: rawTerminal,
	}, os.Args[1:])
	if s, ok := errors.AsType[interrupted](context.Cause(ctx)); ok && code != 0 {
		code = 128 + int(s) // what shells make of an end by a signal
	}
	os.Exit(code)
}

// survived is standard output or standard error by another descriptor. Where
// nobody reads it any more, as behind a pipe that Ctrl-C or a lost connection has
// ended first, a write to the one of the system would end the program (see os/signal),
// and lose the file that is being received, or leave half of it.
func survived(standard *os.File) *os.File {
	fd, err := syscall.Dup(int(standard.Fd()))
	if err != nil {
		return standard
	}
	return os.NewFile(uintptr(fd), standard.Name())
}

// interrupted is the signal that ended the run.
type interrupted syscall.Signal

func (s interrupted) Error() string { return syscall.Signal(s).String() }

// rawTerminal puts the terminal at standard input into raw mode, if it is one.
func rawTerminal() (restore func()) {
	fd := int(os.Stdin.Fd())
	state, err := term.MakeRaw(fd)
	if err != nil {
		return func() {}
	}
	return func() { _ = term.Restore(fd, state) }
}
