package xecmd

import (
	"errors"
	"strings"

	"coppice/internal/wordwrap"
)

const usage = `Usage:
    xe <command>
      [ -s <server> ]            host name, address, or path of a Unix socket
      [ -p <port> ]              port number
      [ -u <username> -pw <password> | -pwf <password file> ]
                                 user authentication
      [ --nossl ]                disable TLS
      [ <other arguments> ... ]  arguments of the command

To get help on a specific command: xe help <command>
To get a full listing of commands: xe help --all
`

// help is "xe help", with or without the name of a command.
func (r *run) help() error {
	for _, p := range r.args.params {
		if p.key != "all" && !reserved[p.key] {
			r.helpCommand(p.key)
			return nil
		}
	}
	t := r.table
	shown := func(c *command) bool { return !c.hidden }
	if !r.args.flag("all") {
		names := t.names(func(c *command) bool { return c.standard })
		if r.out.minimal {
			r.out.list(names...)
			return nil
		}
		r.out.message(usage + "\nCommon command list\n-------------------\n\n" + wrap(names))
		return nil
	}
	if r.out.minimal {
		r.out.list(t.names(shown)...)
		return nil
	}
	group := func(prefixes ...string) string {
		return wrap(t.names(func(c *command) bool {
			for i, p := range prefixes {
				if strings.HasPrefix(c.name, p) {
					return len(prefixes) == 1 && shown(c)
				}
				if i == len(prefixes)-1 {
					return len(prefixes) > 1 && shown(c)
				}
			}
			return false
		}))
	}
	r.out.message(usage + "\nFull command list\n-----------------\n\n" +
		strings.Join([]string{group("host-"), group("vm-"), group("host-", "vm-")}, "\n    \n"))
	return nil
}

// helpCommand shows one command. That it does not exist is not an error.
func (r *run) helpCommand(name string) {
	c := r.table.byName[name]
	if c == nil {
		text := "Unknown command '" + name + "'"
		if e, ok := errors.AsType[*usageError](r.table.unknown(name)); ok && e.hint != "" {
			text += "\n" + e.hint
		}
		r.out.message(text)
		return
	}
	optional, description := c.optional, c.help
	if c.selects.noun != "" {
		optional = append(append([]string(nil), optional...), "<"+c.selects.noun+"-selectors>")
		description += "\n\n" + c.selects.explain()
	}
	r.out.records([]cell{
		{"command name        ", c.name},
		{"reqd params     ", strings.Join(c.required, ", ")}, // each a line, for scripts that complete command lines
		{"optional params ", strings.Join(optional, ", ")},
		{"description     ", fold(description)},
	})
}

// wrap lists names in indented lines.
func wrap(names []string) string {
	var lines []string
	line := "    "
	for i, name := range names {
		switch {
		case i == 0:
			line += name
		case len(line)+len(", ")+len(name) > 74:
			lines = append(lines, line)
			line = "    " + name
		default:
			line += ", " + name
		}
	}
	return strings.Join(append(lines, line), "\n")
}

// fold breaks what a command does such that it fits a terminal of 80 columns with
// what helpCommand and formatRecord put in front of it.
func fold(text string) string {
	return wordwrap.Fold(text, 80, strings.Repeat(" ", 26))
}
