package xecmd

import (
	"strings"

	"coppice/internal/thincli"
)

// cell is a field of a record as it is shown.
type cell struct{ key, value string }

// printer is the output of a command. With --minimal it keeps the values
// until the end and drops everything that is meant for people.
type printer struct {
	conn    *thincli.Server
	minimal bool
	parts   []string // with --minimal: values, the latest print first
	err     error
}

func (p *printer) keep(err error) {
	if p.err == nil {
		p.err = err
	}
}

// direct prints a line whatever the mode.
func (p *printer) direct(text string) { p.keep(p.conn.Print(text)) }

// message prints a line for people.
func (p *printer) message(text string) {
	if !p.minimal {
		p.direct(text)
	}
}

// list prints values.
func (p *printer) list(values ...string) {
	if p.minimal {
		p.add(values)
		return
	}
	p.direct(strings.Join(values, ", "))
}

// records prints records. With --minimal only the first cell of each counts.
func (p *printer) records(recs ...[]cell) {
	if p.minimal {
		var values []string
		for _, rec := range recs {
			if len(rec) > 0 {
				values = append(values, rec[0].value)
			}
		}
		p.add(values)
		return
	}
	for _, rec := range recs {
		p.direct(formatRecord(rec))
	}
}

func (p *printer) add(values []string) {
	escape := strings.NewReplacer(`\`, `\\`, `,`, `\,`)
	escaped := make([]string, len(values), len(values)+len(p.parts))
	for i, v := range values {
		escaped[i] = escape.Replace(v)
	}
	p.parts = append(escaped, p.parts...)
}

// flush prints what --minimal has kept, and returns the first error of all printing.
func (p *printer) flush() error {
	if p.minimal {
		p.direct(strings.Join(p.parts, ","))
	}
	return p.err
}

// formatRecord lays a record out in lines. The first key is aligned to the
// left, the others to the right. The text ends with two line ends; printing
// adds a third.
func formatRecord(rec []cell) string {
	width := 0
	for _, c := range rec {
		width = max(width, len(c.key))
	}
	width += 4
	var b strings.Builder
	for i, c := range rec {
		pad := strings.Repeat(" ", width-len(c.key))
		if i == 0 {
			b.WriteString(c.key + pad)
		} else {
			b.WriteString("\n" + pad + c.key)
		}
		b.WriteString(": " + c.value)
	}
	b.WriteString("\n\n")
	return b.String()
}
