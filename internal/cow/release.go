package cow

import "context"

// release is units to be freed when the reads of an era and of all eras
// before it are over.
type release struct {
	era   *era
	addrs []uint64
	done  chan struct{} // closed when it is done; may be nil
}

func (s *Store) addRelease(r release) {
	s.relMu.Lock()
	s.releases = append(s.releases, r)
	s.relPending++
	s.relMu.Unlock()
	select {
	case s.relWake <- struct{}{}:
	default:
	}
}

// awaitReleases waits until the releases that have been asked for are done.
func (s *Store) awaitReleases(ctx context.Context) error {
	done := make(chan struct{})
	s.addRelease(release{done: done})
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// releaseUnits frees units in the order of their eras.
func (s *Store) releaseUnits() {
	for {
		s.relMu.Lock()
		todo := s.releases
		s.releases = nil
		s.relMu.Unlock()
		for _, r := range todo {
			if r.era != nil {
				<-r.era.over
			}
			if err := s.space.release(r.addrs); err != nil {
				s.fail(err)
			}
			s.relMu.Lock()
			s.relPending--
			s.relMu.Unlock()
			if r.done != nil {
				close(r.done)
			}
		}
		if len(todo) > 0 {
			if s.space.hasSpare() {
				s.hurry()
			}
			continue
		}
		select {
		case <-s.relWake:
		case <-s.stop:
			return
		}
	}
}
