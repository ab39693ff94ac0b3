package cow

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"coppice/internal/vfs"
)

// TestWritesWaitForGrafts begins writes to a disk while the checkpoint goes on
// that gives it ranges of another one: a part of a unit, a whole one, one that
// is as it was before, and zeros over zeros. All of them count after the clone.
func TestWritesWaitForGrafts(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	const units = 40
	u := tiny.UnitSize
	src, dst := newDisk(t, s, 1, units*int64(u), nil), newDisk(t, s, 2, units*int64(u), nil)
	mustWrite(t, src, noise(units*u), 0)
	mustWrite(t, dst, bytes.Repeat([]byte{5}, u), 1)
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	want := bytesOf(t, src)
	s.trees <- struct{}{} // no checkpoint goes on
	cloned := make(chan error, 1)
	go func() {
		cloned <- s.commitAtCut(ctx, func(*batch) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.addGraft(dst.v, src.v, &graft{ranges: []RangeClone{unitRange(0, 0, units)}})
			return nil
		})
	}()
	for !dst.v.view.Load().grafted() {
		runtime.Gosched()
	}
	writes := make(chan error, 3)
	write := func(p []byte, off int) {
		copy(want[off:], p)
		go func() {
			_, err := dst.WriteAt(p, int64(off))
			writes <- err
		}()
	}
	write([]byte("patch"), 3)
	write(bytes.Repeat([]byte{5, 6}, u/2), 2*u)
	clear(want[9*u : 20*u])
	go func() { writes <- dst.Zero(ctx, int64(9*u), int64(11*u)) }()
	before := bytesOf(t, dst)
	<-s.trees
	if err := errors.Join(<-cloned, <-writes, <-writes, <-writes); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before[u:2*u], bytes.Repeat([]byte{5}, u)) || !bytes.Equal(before[20*u:], make([]byte, 20*u)) {
		t.Error("reads do not show the disk as it was before")
	}
	if !bytes.Equal(bytesOf(t, dst), want) {
		t.Error("a write has passed the clone, or brought back what was there before")
	}
	if err := errors.Join(s.Close(), checkClean(m)); err != nil {
		t.Error(err)
	}
}

// TestCancelledCloneIsOver cancels a clone of ranges that waits for a
// checkpoint: what is written after its return stays.
func TestCancelledCloneIsOver(t *testing.T) {
	s, err := Create(context.Background(), vfs.NewMem(0), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	u := tiny.UnitSize
	src, dst := newDisk(t, s, 1, int64(u), nil), newDisk(t, s, 2, int64(u), nil)
	mustWrite(t, src, noise(u), 0)
	if err := s.sync(context.Background()); err != nil {
		t.Fatal(err)
	}
	s.trees <- struct{}{} // a checkpoint has begun and does not go on
	mustWrite(t, src, noise(u), 0)
	s.kick()
	for !s.writing.Load() || len(s.changedVolumes()) > 0 {
		runtime.Gosched()
	}
	ctx, cancel := context.WithCancel(context.Background())
	cloned := make(chan error, 1)
	go func() {
		cloned <- s.commitAtCut(ctx, func(*batch) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.addGraft(dst.v, src.v, &graft{ranges: []RangeClone{unitRange(0, 0, 1)}})
			return nil
		})
	}()
	for waiting := 0; waiting == 0; runtime.Gosched() {
		s.waitMu.Lock()
		waiting = len(s.atCut)
		s.waitMu.Unlock()
	}
	cancel()
	if err := <-cloned; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	want := bytes.Repeat([]byte{9}, u)
	mustWrite(t, dst, want, 0)
	<-s.trees
	if err := s.sync(context.Background()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytesOf(t, dst), want) {
		t.Error("a clone that was cancelled is done later")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestClonePromiseLasts has a clone of ranges ask for space while a checkpoint
// is being made that does not have it: when that ends, the space is still
// promised.
func TestClonePromiseLasts(t *testing.T) {
	ctx := context.Background()
	var s *Store
	var armed atomic.Bool
	promised := make(chan int64, 1)
	hook := func(c vfs.Call) error {
		if c.Op == vfs.OpWrite && strings.HasPrefix(c.Name, superName) && armed.CompareAndSwap(true, false) {
			s.space.mu.Lock()
			promised <- s.space.reserved
			s.space.mu.Unlock()
		}
		return nil
	}
	s, err := Create(ctx, vfs.NewInject(vfs.NewMem(0), nil, hook), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	u := tiny.UnitSize
	src, dst, other := newDisk(t, s, 1, int64(u), nil), newDisk(t, s, 2, int64(u), nil), newDisk(t, s, 3, int64(u), nil)
	mustWrite(t, src, noise(u), 0)
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	s.commits.role <- struct{}{}
	mustWrite(t, other, noise(u), 0)
	s.kick()
	for !s.writing.Load() {
		runtime.Gosched()
	}
	cloned := make(chan error, 1)
	go func() { cloned <- s.giveRanges(ctx, dst, src, []RangeClone{unitRange(0, 0, 1)}, 1) }()
	for waiting := 0; waiting == 0; runtime.Gosched() {
		s.waitMu.Lock()
		waiting = len(s.atCut)
		s.waitMu.Unlock()
	}
	armed.Store(true)
	<-s.commits.role
	if n := <-promised; n == 0 {
		t.Error("the promise is gone")
	}
	if err := <-cloned; err != nil {
		t.Fatal(err)
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	if s.space.reserved != 0 || !bytes.Equal(bytesOf(t, dst), bytesOf(t, src)) {
		t.Errorf("%d units are promised in the end", s.space.reserved)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestCloneOfManyRangesInOneLeaf needs the space of one leaf, however many
// ranges it gets.
func TestCloneOfManyRangesInOneLeaf(t *testing.T) {
	ctx := context.Background()
	o := tinyOptions()
	o.MaxBytes = 16 * o.Geometry.regionBytes()
	s, err := Create(ctx, vfs.NewMem(0), o)
	if err != nil {
		t.Fatal(err)
	}
	u := tiny.UnitSize
	src, dst := newDisk(t, s, 1, int64(u), nil), newDisk(t, s, 2, int64(u), nil)
	mustWrite(t, src, noise(u), 0)
	many := make([]RangeClone, o.MaxBytes/int64(u))
	for i := range many {
		many[i] = unitRange(0, 0, 1)
	}
	if err := s.CloneRanges(ctx, dst, src, many); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytesOf(t, dst), bytesOf(t, src)) {
		t.Error("other bytes")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
