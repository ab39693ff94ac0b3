package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"regexp"
	"strings"

	"coppice/internal/typo"
	"coppice/internal/wordwrap"
)

// helpWidth is how wide help is printed, in columns.
const helpWidth = 80

// usage explains the command line as a whole.
func usage(w io.Writer) {
	fmt.Fprint(w, "Usage: coppice COMMAND [FLAGS]\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-9s %s\n", c.name, c.summary)
	}
	fmt.Fprint(w, "\nWithout flags every command uses the default data directory.\n\"coppice COMMAND -h\" explains the flags of a command.\n")
}

// help explains one command with its flags.
func (c command) help(w io.Writer, fs *flag.FlagSet) {
	text := "Usage: coppice " + c.name + " [FLAGS] " + c.args + "\n\n" + capital(c.summary) + ".\n"
	fmt.Fprint(w, wordwrap.Fold(text, helpWidth, ""))
	fs.VisitAll(func(f *flag.Flag) { fmt.Fprint(w, "\n", flagHelp(f)) })
}

// flagHelp explains a flag, on lines that each end with a newline.
func flagHelp(f *flag.Flag) string {
	kind, text := flag.UnquoteUsage(f)
	switch f.DefValue {
	case "", "0", "0s", "false":
	default:
		text += " (default " + f.DefValue + ")"
	}
	const indent = "      "
	return strings.TrimRight("  --"+f.Name+" "+kind, " ") + "\n" + indent + wordwrap.Fold(text, helpWidth, indent) + "\n"
}

// flagInError finds the flag that an error of package flag is about.
var flagInError = regexp.MustCompile(`(?:for flag|flag needs an argument:|boolean value "[^"]*" for) -([^ :]+)`)

// explainFlags adds to an error about the flags of a command what the flag is for, and where the others are
// explained.
func (c command) explainFlags(fs *flag.FlagSet, err error) error {
	hint := fmt.Sprintf("\"coppice %s -h\" explains the flags.", c.name)
	if name, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: -"); ok {
		fs.VisitAll(func(f *flag.Flag) {
			if typo.Nearly(name, f.Name) {
				hint = "Did you mean --" + f.Name + "? " + hint
			}
		})
	}
	if m := flagInError.FindStringSubmatch(err.Error()); m != nil {
		if f := fs.Lookup(m[1]); f != nil {
			hint = strings.Trim(flagHelp(f), " \n") + "\n" + hint
		}
	}
	return &hinted{err, hint}
}

// parse parses the flags of the command that the flag set is named after, and
// refuses more than maxArgs words after them, if that is not negative. It
// returns flag.ErrHelp when help was asked for and given.
func parse(e env, fs *flag.FlagSet, args []string, maxArgs int) error {
	var c command
	for _, known := range commands() {
		if known.name == fs.Name() {
			c = known
		}
	}
	fs.SetOutput(io.Discard) // what it would print is in the error
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		c.help(e.stdout, fs)
		return err
	case err != nil:
		return c.explainFlags(fs, err)
	}
	if maxArgs >= 0 && fs.NArg() > maxArgs {
		return c.explainFlags(fs, fmt.Errorf("unexpected argument %q", fs.Arg(maxArgs)))
	}
	return nil
}

func capital(s string) string { return strings.ToUpper(s[:1]) + s[1:] }
