package xecmd

import (
	"context"
	_ "embed"
	"strings"
)

// completion is a program of bash that completes command lines of xe. It lives
// here, and not in the client, because it asks what this package answers, also
// through the stock client.
//
//go:embed completion.bash
var completion string

func completionCommands() []command {
	return []command{{
		name: "completion",
		help: "Print a script with which bash completes the command lines of xe: source <(xe completion). An extension of this server.",
		run: func(_ context.Context, r *run) error {
			r.out.message(strings.TrimSuffix(completion, "\n"))
			return nil
		},
	}}
}
