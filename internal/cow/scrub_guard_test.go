package cow

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"coppice/internal/vfs"
)

// TestScrubKeepsUnits holds a scrub between the moment it has gathered units
// and the moment it reads them, while these are overwritten and their space is
// wanted by others.
func TestScrubKeepsUnits(t *testing.T) {
	synctest.Test(t, testScrubKeepsUnits)
}

func testScrubKeepsUnits(t *testing.T) {
	ctx := context.Background()
	var armed atomic.Bool
	reading, goOn := make(chan struct{}), make(chan struct{})
	hook := func(c vfs.Call) error {
		if c.Op == vfs.OpRead && strings.HasPrefix(c.Name, "space-") && c.Len > int64(tiny.UnitSize) && armed.CompareAndSwap(true, false) {
			close(reading)
			<-goOn
		}
		return nil
	}
	m := vfs.NewMem(0)
	s, err := Create(ctx, vfs.NewInject(m, nil, hook), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	const size = 8 << 10 // written directly, all in one class of units
	d := newDisk(t, s, 1, size, nil)
	write := func(b byte) {
		t.Helper()
		if _, err := d.WriteAt(bytes.Repeat([]byte{b}, size), 0); err != nil {
			t.Fatal(err)
		}
		if err := s.sync(ctx); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // what may be released is
	}
	write(1)
	done := make(chan []Problem)
	armed.Store(true)
	go func() {
		var found []Problem
		for p, err := range s.Scrub(ctx, ScrubOptions{}) {
			if err != nil {
				p.Detail = err.Error()
			}
			found = append(found, p)
		}
		done <- found
	}()
	<-reading
	for i := byte(2); i < 12; i++ {
		write(i)
	}
	close(goOn)
	if found := <-done; len(found) > 0 {
		t.Errorf("the scrub found %v", found)
	}
	if err := errors.Join(s.Close(), checkClean(m)); err != nil {
		t.Fatal(err)
	}
}
