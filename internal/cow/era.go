package cow

import "sync/atomic"

// eras tells when the readers that may still use something have gone. A read
// runs inside the era that was current when it began; [eras.retire] starts a
// new one. Readers never wait.
type eras struct {
	cur atomic.Pointer[era]
}

// era counts the reads running in it.
type era struct {
	n       atomic.Int64
	retired atomic.Bool
	closed  atomic.Bool
	over    chan struct{} // closed when the era is retired and its last read has ended
}

func (es *eras) init() { es.cur.Store(&era{over: make(chan struct{})}) }

// enter begins a read.
func (es *eras) enter() *era {
	for {
		e := es.cur.Load()
		e.n.Add(1)
		if es.cur.Load() == e {
			return e
		}
		e.leave()
	}
}

// leave ends a read.
func (e *era) leave() {
	if e.n.Add(-1) == 0 && e.retired.Load() {
		e.finish()
	}
}

func (e *era) finish() {
	if e.closed.CompareAndSwap(false, true) {
		close(e.over)
	}
}

// retire starts a new era and returns the old one. Reads of still older eras
// may be running: whoever waits for eras waits for them in order.
func (es *eras) retire() *era {
	old := es.cur.Swap(&era{over: make(chan struct{})})
	old.retired.Store(true)
	if old.n.Load() == 0 {
		old.finish()
	}
	return old
}
