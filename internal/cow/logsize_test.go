package cow

import (
	"context"
	"testing"

	"coppice/internal/vfs"
)

// TestOddLogSizes fills frames to their last byte in logs whose quarter is no
// multiple of what a frame begins at.
func TestOddLogSizes(t *testing.T) {
	ctx := context.Background()
	least := minLogBytes(tiny)
	for n := least; n < least+int64(minLogFrames*tiny.UnitSize)*2; n += int64(tiny.UnitSize) {
		o := tinyOptions()
		o.LogBytes = n
		m := vfs.NewMem(0)
		s, err := Create(ctx, m, o)
		if err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		attrs := noise(tiny.maxAttrs())
		if _, err := s.Create(ctx, ID{1}, 16<<10, attrs); err != nil {
			t.Fatalf("%d bytes: create: %v", n, err)
		}
		d, err := s.OpenDisk(ctx, ID{1}, Live)
		if err != nil {
			t.Fatal(err)
		}
		// Every length of a payload around a full frame: attributes, then units.
		for i := range byte(24) {
			if _, err := d.WriteAt(noise(5<<10), 0); err != nil {
				t.Fatalf("%d bytes: write: %v", n, err)
			}
			pairs := []Pair{{ID{1}, ID{2, i}, attrs[:len(attrs)-int(i)*100]}, {ID{1}, ID{3, i}, attrs}}
			if _, err := s.Snapshot(ctx, pairs); err != nil {
				t.Fatalf("%d bytes: snapshot %d: %v", n, i, err)
			}
			for _, p := range pairs {
				if err := s.Delete(ctx, p.New); err != nil {
					t.Fatalf("%d bytes: delete: %v", n, err)
				}
			}
		}
		if err := s.Close(); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if err := checkClean(m); err != nil {
			t.Fatal(err)
		}
	}
	o := tinyOptions()
	o.LogBytes = least - int64(tiny.UnitSize)
	if _, err := Create(ctx, vfs.NewMem(0), o); err == nil {
		t.Errorf("a log of %d bytes, less than %d, was made", o.LogBytes, least)
	}
}
