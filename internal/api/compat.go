package api

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"coppice/internal/xapi"
)

// ClassCoverage says what becomes of the messages of one class. Messages are
// named without their class, sorted.
type ClassCoverage struct {
	Class          string
	Mechanical     int // interpreted from the datamodel
	Written        []string
	NotImplemented []string
	Reserved       []string
	Withdrawn      []string
}

// Coverage says, of every class of the datamodel, which messages do what. It
// is computed from the tables that dispatch runs on.
func Coverage() ([]ClassCoverage, error) {
	model := xapi.Datamodel()
	methods, err := bind(model, methodTables()...)
	if err != nil {
		return nil, err
	}
	out := make([]ClassCoverage, 0, len(model.Ordered))
	for _, class := range model.Ordered {
		cov := ClassCoverage{Class: class.Name}
		for _, name := range slices.Sorted(maps.Keys(class.Methods)) {
			switch methods[class.Name+"."+name].how {
			case Mechanical:
				cov.Mechanical++
			case Written:
				cov.Written = append(cov.Written, name)
			case NotImplemented:
				cov.NotImplemented = append(cov.NotImplemented, name)
			case Reserved:
				cov.Reserved = append(cov.Reserved, name)
			case Withdrawn:
				cov.Withdrawn = append(cov.Withdrawn, name)
			}
		}
		out = append(out, cov)
	}
	return out, nil
}

// WriteCoverage writes Coverage as Markdown: a table of counts, then the names
// class by class.
func WriteCoverage(w io.Writer) error {
	cov, err := Coverage()
	if err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString("| class | mechanical | written | NOT_IMPLEMENTED | refused | withdrawn |\n|---|--:|--:|--:|--:|--:|\n")
	var sum [5]int
	line := func(name string, n [5]int) {
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d |\n", name, n[0], n[1], n[2], n[3], n[4])
	}
	for _, c := range cov {
		n := [5]int{c.Mechanical, len(c.Written), len(c.NotImplemented), len(c.Reserved), len(c.Withdrawn)}
		for i := range n {
			sum[i] += n[i]
		}
		line(c.Class, n)
	}
	line("**all**", sum)
	for _, c := range cov {
		if len(c.Written)+len(c.NotImplemented)+len(c.Reserved)+len(c.Withdrawn) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n### %s\n", c.Class)
		for _, part := range []struct {
			title string
			names []string
		}{
			{"Written", c.Written},
			{"`NOT_IMPLEMENTED`", c.NotImplemented},
			{"`PERMISSION_DENIED`, for the storage layer only", c.Reserved},
			{"`MESSAGE_REMOVED` or `MESSAGE_DEPRECATED`", c.Withdrawn},
		} {
			if len(part.names) > 0 {
				fmt.Fprintf(&b, "\n%s: %s.\n", part.title, strings.Join(part.names, ", "))
			}
		}
	}
	_, err = io.WriteString(w, b.String())
	return err
}
