package xecmd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// selection says which objects a command works on by filters instead of a uuid.
type selection struct {
	noun      string // "vm", "host" or "sr"; empty for none
	templates bool   // VMs: templates and snapshots too
	dom0      bool   // VMs: control domains too
	single    bool   // one object only, even with --multiple
}

func (s selection) explain() string {
	what := map[string]string{"vm": "VMs", "host": "hosts", "sr": "SRs"}[s.noun]
	return fmt.Sprintf("The %[1]s can be specified by filtering the full list of %[1]s on the values of zero or more fields. "+
		"For example, specifying 'uuid=<some_uuid>' selects only the one with that uuid, and '%[2]s=<name or uuid>' the one with that name or uuid. "+
		"If more than one matches, the operation is performed on all of them if '--multiple' is given.", what, s.noun)
}

// selected returns the objects that the command line selects.
func (r *run) selected(ctx context.Context) ([]row, error) {
	s := r.cmd.selects
	n := r.table.nouns[s.noun]
	var conditions []parameter
	if s.noun == "vm" {
		if !s.templates {
			conditions = append(conditions, parameter{"is-a-template", "false"})
		}
		if !s.dom0 {
			conditions = append(conditions, parameter{"is-control-domain", "false"})
		}
	}
	var named []string
	for _, p := range r.args.params {
		switch {
		case reserved[p.key] || r.cmd.declares(p.key):
		case p.key == s.noun:
			named = append(named, p.value)
		default:
			conditions = append(conditions, p)
		}
	}
	rows, err := n.find(ctx, r, conditions, n.pick([]string{"uuid", "name-label", "hostname"}), false)
	if err != nil {
		return nil, err
	}
	for _, name := range named {
		rows = slices.DeleteFunc(rows, func(row row) bool {
			return !slices.ContainsFunc(row.cells, func(c cell) bool { return c.value == name })
		})
	}
	none, many := "No matching VMs found", "Multiple matches VMs found."
	switch s.noun {
	case "host":
		none, many = "No matching hosts found", "Multiple matching hosts found."
	case "sr":
		none, many = "No matching hosts found", "Multiple matching SRs found."
	}
	switch {
	case len(rows) == 0:
		return nil, failf("%s", none)
	case len(rows) > 1 && s.single:
		return nil, failf("%s Operation can only be performed on one %s at a time", many, map[string]string{"vm": "VM", "host": "host", "sr": "SR"}[s.noun])
	case len(rows) > 1 && !r.args.flag("multiple"):
		return nil, failf("%s --multiple required to complete the operation", many)
	}
	return rows, nil
}

// errSomeFailed ends a command whose failures have been listed.
var errSomeFailed = errors.New("xecmd: some operations failed")

// each runs fn on all selected objects, whatever becomes of the ones before.
func (r *run) each(ctx context.Context, fn func(row row) error) error {
	rows, err := r.selected(ctx)
	if err != nil {
		return err
	}
	if len(rows) == 1 {
		return fn(rows[0])
	}
	failed := false
	for _, row := range rows {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := fn(row); err != nil {
			failed = true
			lines, unknown := r.explain(err)
			if unknown != nil {
				lines = []string{unknown.Error()}
			}
			r.out.message(fmt.Sprintf("operation failed on %s: %s", row.cells[0].value, strings.Join(lines, " ")))
		}
	}
	if failed {
		return errSomeFailed
	}
	return nil
}

// on makes a command that sends a message about each selected object.
func on(method string, params ...any) func(ctx context.Context, r *run) error {
	return func(ctx context.Context, r *run) error {
		return r.each(ctx, func(row row) error {
			return r.do(ctx, method, append([]any{row.ref}, params...)...)
		})
	}
}
