package cow

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"

	"coppice/internal/vfs"
)

// TestLogIsWritten looks at what a creation has done to the log before it
// makes the directory a store: every byte is written, then synced.
func TestLogIsWritten(t *testing.T) {
	const logBytes = 2<<20 + 4096
	var written []byte
	synced, early := false, false
	m := vfs.NewMem(0)
	hook := func(c vfs.Call) error {
		switch {
		case c.Name == logName && c.Op == vfs.OpWrite:
			synced = false
			written = append(written, make([]byte, c.Len)...)
			if c.Off+c.Len != int64(len(written)) {
				t.Errorf("write of %d bytes at %d", c.Len, c.Off)
			}
		case c.Name == logName && c.Op == vfs.OpDatasync:
			synced = true
		case c.Op == vfs.OpRename && (len(written) != logBytes || !synced):
			early = true
		}
		return nil
	}
	o := tinyOptions()
	o.LogBytes = logBytes
	s, err := Create(context.Background(), vfs.NewInject(m, nil, hook), o)
	if err != nil {
		t.Fatal(err)
	}
	if early || len(written) != logBytes {
		t.Errorf("%d of %d bytes of the log are written, before the superblock is there: %v", len(written), logBytes, !early)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := m.Open(logName)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, logBytes)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, logBytes)) {
		t.Errorf("a fresh log is not all zero (%v)", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestCreateAfterCrash takes the power away at every call of a creation. What
// is left is no store, and the next creation does not mind it.
func TestCreateAfterCrash(t *testing.T) {
	ctx := context.Background()
	var mu sync.Mutex
	var crashed []*vfs.Mem
	m := vfs.NewMem(0)
	s, err := Create(ctx, vfs.NewInject(m, nil, func(vfs.Call) error {
		mu.Lock()
		defer mu.Unlock()
		crashed = append(crashed, m.Crash(func(int) int { return 0 }), m.Kill())
		return nil
	}), tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	stores := 0
	for i, c := range crashed {
		s, err := Open(ctx, c, tinyOptions())
		if errors.Is(err, ErrNoStore) {
			s, err = Create(ctx, c, tinyOptions())
		} else {
			stores++
		}
		if err != nil {
			t.Fatalf("crash %d of %d: %v", i, len(crashed), err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := checkClean(c); err != nil {
			t.Fatalf("crash %d of %d: %v", i, len(crashed), err)
		}
	}
	if stores == 0 || stores == len(crashed) {
		t.Errorf("%d of %d crashes left a store", stores, len(crashed))
	}
}

// TestCreateFails fails each call of a creation: the error says so, and no file
// is left unless there is a store.
func TestCreateFails(t *testing.T) {
	ctx := context.Background()
	for n := 1; ; n++ {
		m := vfs.NewMem(0)
		fault := vfs.Fault{Nth: n, Err: syscall.ENOSPC}
		s, err := Create(ctx, vfs.NewInject(m, nil, fault.Hook), tinyOptions())
		if err == nil {
			if err := s.Close(); err != nil && !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
			if n < 20 {
				t.Errorf("only %d calls were failed", n)
			}
			return
		}
		if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, ErrNoSpace) {
			t.Errorf("call %d: %v", n, err)
		}
		names, err := m.List()
		if err != nil {
			t.Fatal(err)
		}
		if present := slices.Contains(names, superName); !present && len(names) > 0 {
			t.Errorf("call %d leaves %v", n, names)
		}
		if s, err = Open(ctx, m, tinyOptions()); errors.Is(err, ErrNoStore) {
			s, err = Create(ctx, m, tinyOptions())
		}
		if err != nil {
			t.Fatalf("call %d: afterwards: %v", n, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOptionsBelowZero expects options that cannot be meant to be refused by
// all who take them, before anything is touched.
func TestOptionsBelowZero(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	for name, spoil := range map[string]func(*Options){
		"MaxBytes":        func(o *Options) { o.MaxBytes = -1 },
		"LogBytes":        func(o *Options) { o.LogBytes = -int64(tiny.UnitSize) },
		"CheckpointAfter": func(o *Options) { o.CheckpointAfter = -1 },
		"Buffers":         func(o *Options) { o.Limits.Buffers = -1 },
		"Entries":         func(o *Options) { o.Limits.Entries = -1 },
		"PageCache":       func(o *Options) { o.Limits.PageCache = -1 },
		"DirectMin":       func(o *Options) { o.Limits.DirectMin = -1 },
		"Chain":           func(o *Options) { o.Limits.Chain = -1 },
		"ReapPages":       func(o *Options) { o.Limits.ReapPages = -1 },
	} {
		o := tinyOptions()
		spoil(&o)
		if _, err := Create(ctx, m, o); !errors.Is(err, ErrInvalid) {
			t.Errorf("create with %s: %v", name, err)
		}
		if _, err := Open(ctx, m, o); !errors.Is(err, ErrInvalid) {
			t.Errorf("open with %s: %v", name, err)
		}
	}
	if names, err := m.List(); err != nil || len(names) > 0 {
		t.Errorf("there are %v, %v", names, err)
	}
}

// TestPromiseOfWaitingOperation has a generation written while an operation waits
// for the role: what the operation was promised stays its own until it is done.
func TestPromiseOfWaitingOperation(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem(0)
	s, err := Create(ctx, m, tinyOptions())
	if err != nil {
		t.Fatal(err)
	}
	reserved := func() int64 {
		s.space.mu.Lock()
		defer s.space.mu.Unlock()
		return s.space.reserved
	}
	before := reserved()
	s.commits.role <- struct{}{}
	created := make(chan error, 1)
	go func() {
		_, err := s.Create(ctx, ID{1}, 0, nil)
		created <- err
	}()
	for queued := 0; queued == 0; runtime.Gosched() {
		if len(created) > 0 {
			t.Fatalf("not even queued: %v", <-created)
		}
		s.commits.mu.Lock()
		queued = len(s.commits.todo)
		s.commits.mu.Unlock()
	}
	s.force = true
	if err := s.write(s.cut()); err != nil {
		t.Fatal(err)
	}
	if got, want := reserved()-before, s.opCost(nil); got != want {
		t.Errorf("%d units are promised, want %d", got, want)
	}
	<-s.commits.role
	if err := <-created; err != nil {
		t.Fatal(err)
	}
	if err := s.sync(ctx); err != nil {
		t.Fatal(err)
	}
	if got := reserved(); got != before {
		t.Errorf("%d units are promised when all is done, %d before", got, before)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	s.commits.role <- struct{}{}
	_, err = s.Create(cancelled, ID{2}, 0, nil)
	<-s.commits.role
	if !errors.Is(err, context.Canceled) || reserved() != before {
		t.Errorf("cancelled: %v, and %d units are promised", err, reserved()-before)
	}
	if err := errors.Join(s.Close(), checkClean(m)); err != nil {
		t.Error(err)
	}
}
