package cow

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"

	"coppice/internal/vfs"
)

// TestWriteBulk watches what of bulk writes is left in the host's cache: the
// newest, up to the limit, of all volumes together, and everything of others.
func TestWriteBulk(t *testing.T) {
	ctx := context.Background()
	u := tiny.UnitSize
	var trace strings.Builder
	dir := vfs.NewTrace(vfs.NewMem(0), &trace)
	o := tinyOptions()
	s, err := Create(ctx, dir, o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	disks := []*Disk{newDisk(t, s, 1, int64(64*u), nil), newDisk(t, s, 2, int64(64*u), nil)}
	// evicted returns how many units have been evicted since the last call.
	evicted := func() (units int) {
		for line := range strings.Lines(trace.String()) {
			var name string
			var off, n int
			if k, _ := fmt.Sscanf(line, "evict %s %d+%d", &name, &off, &n); k == 3 && strings.HasPrefix(name, "space-") {
				units += n / u
			}
		}
		trace.Reset()
		return units
	}
	evicted() // of Open
	most, step := int(o.Limits.BulkCache)/u, int(o.Limits.DirectMin)/u
	p := noise(step * u)
	left, full := 0, false
	for i := range 16 {
		d, off := disks[i%2], int64(i/2*step*u)
		if i%4 == 3 {
			if _, err := d.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			if n := evicted(); n != 0 {
				t.Errorf("write %d evicts %d units", i, n)
			}
			continue
		}
		if _, err := d.WriteBulk(p, off); err != nil {
			t.Fatal(err)
		}
		left += step - evicted()
		full = full || left > most-step
		if left > most || full && left <= most-step {
			t.Errorf("after bulk write %d there are %d units left, want %d or a few less", i, left, most)
		}
	}
	if !full {
		t.Error("nothing was evicted")
	}
	for i, d := range disks {
		got := make([]byte, len(p))
		if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
			t.Errorf("disk %d reads back: %v, equal %t", i, err, bytes.Equal(got, p))
		}
	}
}
