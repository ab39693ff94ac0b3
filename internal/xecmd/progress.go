package xecmd

import (
	"fmt"
	"strings"
	"time"
)

const barCells = 55

// bar draws the progress of a transfer, in place.
type bar struct {
	started time.Time
	filled  int // cells shown so far
	drawn   int // lines so far
}

// update returns what to print for a progress between 0 and 1: nothing while
// the number of filled cells stays the same.
func (b *bar) update(progress float64, now time.Time) string {
	progress = min(max(progress, 0), 1)
	filled := int(progress * barCells)
	if filled == b.filled {
		return ""
	}
	b.filled = filled
	spinner := `-\|/`[b.drawn%4]
	b.drawn++
	elapsed := now.Sub(b.started)
	left := time.Duration(float64(elapsed)/progress) - elapsed
	cells := strings.Repeat("#", max(filled-1, 0)) + strings.Repeat(">", min(filled, 1))
	return fmt.Sprintf("\r[%c] %-*s (%3d%% ETA %s) ", spinner, barCells, cells, int(progress*100), clock(left))
}

// clock formats a duration in eight columns.
func clock(d time.Duration) string {
	d = max(d, 0)
	h, m, s := int64(d/time.Hour), int(d/time.Minute)%60, int(d/time.Second)%60
	switch {
	case h <= 99:
		return fmt.Sprintf("%02d:%02d:%02d", h, m, s)
	case h <= 99999:
		return fmt.Sprintf("%5d:%02d", h, m)
	}
	return "++:++:++"
}

// done returns what to print at the end.
func (b *bar) done(now time.Time) []string {
	return []string{"\n", "Total time: " + now.Sub(b.started).Round(10*time.Millisecond).String() + "\n"}
}
