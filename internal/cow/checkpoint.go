package cow

import (
	"context"
	"time"
)

// sync returns when everything that was done before the call is durable, or
// with the failure of the store. Callers that wait at the same time share a
// checkpoint. A cancel ends the wait, not the checkpoint.
func (s *Store) sync(ctx context.Context) error {
	done := make(chan error, 1)
	s.waitMu.Lock()
	s.waiters = append(s.waiters, done)
	s.waitMu.Unlock()
	s.kick()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// kick asks for a checkpoint without waiting.
func (s *Store) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// hurry asks for a checkpoint soon: space that was given up is to come back
// without anybody waiting for it.
func (s *Store) hurry() {
	select {
	case s.freeing <- struct{}{}:
	default:
	}
}

// freeAfter is how long space that was given up may wait for others to share
// its checkpoint.
const freeAfter = 50 * time.Millisecond

// writeTrees is the tree writer: it makes one checkpoint after the other, when
// asked to and when a change has waited long enough.
func (s *Store) writeTrees() {
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	var due time.Time // zero: the timer is stopped
	within := func(d time.Duration) {
		if at := time.Now().Add(d); due.IsZero() || at.Before(due) {
			due = at
			timer.Reset(d)
		}
	}
	for {
		select {
		case <-s.wake:
		case <-timer.C:
		case <-s.armed:
			within(s.checkpointAfter())
			continue
		case <-s.freeing:
			within(freeAfter)
			continue
		case <-s.stop:
			s.answer(s.takeWaiters(), s.failure())
			return
		}
		timer.Stop()
		due = time.Time{}
		s.checkpoint()
		if !s.stuck && len(s.queue.ents) > 0 && s.failure() == nil {
			s.kick()
		}
	}
}

func (s *Store) takeWaiters() []chan error {
	s.waitMu.Lock()
	defer s.waitMu.Unlock()
	w := s.waiters
	s.waiters = nil
	return w
}

func (s *Store) answer(waiters []chan error, err error) {
	for _, w := range waiters {
		select {
		case w <- err:
		default: // it has an answer of its own
		}
	}
}

// checkpoint makes everything up to now durable and answers who waits for it.
// The first error stops the store: what is on disk stays at the generation
// before, and in the log.
func (s *Store) checkpoint() {
	s.writing.Store(true)
	waiters := s.takeWaiters()
	s.waitMu.Lock()
	ops := s.atCut
	s.atCut = nil
	s.waitMu.Unlock()
	for _, r := range ops {
		waiters = append(waiters, r.done)
	}
	err := s.failure()
	for round, more := 0, true; more && err == nil; round++ {
		var rest []*volume
		if rest, err = s.commitAll(); err == nil {
			if more = round == 0 && len(rest) > 0; more { // the next round has all of the log
				rest = nil
			}
			err = s.cutAndWrite(ops, rest)
			ops = nil
		}
		if err != nil {
			s.fail(err)
			err = s.failure()
		}
	}
	s.writing.Store(false)
	s.answer(waiters, err)
}

// cutAndWrite makes one generation. Operations, and open changes of volumes,
// that are too much for the log become part of the cut; no frame may follow
// before the generation is durable, because it might build on them.
func (s *Store) cutAndWrite(ops []*request, open []*volume) error {
	keep := len(ops) > 0 || len(open) > 0
	s.commits.role <- struct{}{}
	for _, r := range ops {
		if err := r.do(&batch{}); err != nil {
			r.done <- err
		}
	}
	for _, v := range open {
		s.mu.Lock()
		v.gate.Lock()
		if !v.removed {
			s.seal(&batch{}, v)
			s.epoch++
		}
		v.gate.Unlock()
		s.mu.Unlock()
	}
	c := s.cut()
	if !keep {
		<-s.commits.role
	}
	err := s.write(c)
	if !keep {
		s.commits.role <- struct{}{}
	}
	s.log.tail = s.super.log.virt
	<-s.commits.role
	return err
}

// commitAll has the open changes of all volumes in the log, and returns the
// volumes for which there was no room.
func (s *Store) commitAll() (rest []*volume, err error) {
	var vols []*volume
	direct := false
	for _, v := range s.changedVolumes() { // before the role is taken: small flushes go on meanwhile
		if w := v.view.Load(); w == nil || w.top == nil || w.top.empty() {
			continue
		}
		vols = append(vols, v)
		s.writeOutMuch(v)
		_, dir := v.open()
		direct = direct || dir
	}
	if len(vols) == 0 {
		return nil, nil
	}
	if direct {
		if err := s.files.sync(); err != nil {
			return nil, err
		}
	}
	s.commits.role <- struct{}{}
	defer func() { <-s.commits.role }()
	b := &batch{log: &s.log}
	for _, v := range vols {
		err := s.catch(b, v)
		if err == errNoRoom {
			rest = append(rest, v)
		} else if err != nil {
			return nil, err
		}
	}
	if len(b.items) > 0 {
		err = s.writeBatch(b)
	}
	return rest, err
}
