package nbd

import (
	"net"
	"slices"
	"sync"
	"sync/atomic"
)

const (
	// pieceSize is how much of a request is in memory at a time, in bytes.
	pieceSize = 2 << 20
	// portionSize is how much of a long read is read and sent at a time, in
	// bytes: what a processor's own cache keeps while it is verified and sent.
	portionSize = 256 << 10
	// smallSize is up to where a request is worth no buffer of its own.
	smallSize = 64 << 10
	// headroom is what is kept free in front of data for a reply's header.
	headroom = extendedReplySize + 8
)

// budget is memory that all connections share.
type budget struct{ left atomic.Int64 }

// take reserves n bytes if there are as many.
func (b *budget) take(n int64) bool {
	if b.left.Add(-n) >= 0 {
		return true
	}
	b.left.Add(n)
	return false
}

func (b *budget) give(n int64) { b.left.Add(n) }

// Buffers come in few sizes, so that those given back fit again.
var (
	bufferSizes = [...]int{smallSize, 256 << 10, 1 << 20, pieceSize}
	bufferPools [len(bufferSizes)]sync.Pool
)

// getBuffer returns at least n bytes, which is at most pieceSize, behind
// headroom bytes. The contents are anything.
func getBuffer(n int) *[]byte {
	for i, size := range bufferSizes {
		if n <= size {
			if b, ok := bufferPools[i].Get().(*[]byte); ok {
				return b
			}
			b := make([]byte, headroom+size)
			return &b
		}
	}
	panic("nbd: a piece that is too long")
}

// bufferSize is how many bytes a buffer for n bytes takes, which is at most
// pieceSize. As it is never little, it bounds the requests under way as well.
func bufferSize(n int) int64 {
	i, _ := slices.BinarySearch(bufferSizes[:], n)
	return int64(headroom + bufferSizes[i])
}

func putBuffer(b *[]byte) {
	for i, size := range bufferSizes {
		if len(*b) == headroom+size {
			bufferPools[i].Put(b)
		}
	}
}

// sender writes the replies of one connection, which come from several
// goroutines.
type sender struct {
	w    net.Conn
	turn sync.Mutex  // held by who writes to w
	busy atomic.Bool // somebody has the turn
	err  error       // guarded by turn; nothing is written after an error

	mu      sync.Mutex // guards pending
	pending []byte     // short replies that wait for their turn
	spare   []byte     // guarded by turn: memory for the next pending
}

// post sends short replies. When others are sending it leaves them to the
// next whose turn comes.
func (s *sender) post(p []byte) error {
	s.mu.Lock()
	s.pending = append(s.pending, p...)
	s.mu.Unlock()
	return s.send(nil, nil)
}

// send sends what is pending, then a and b.
func (s *sender) send(a, b []byte) error { return s.stream(a, b, nil) }

// stream sends what is pending, a, b, and then, with nothing in between, what
// more returns, until that is empty.
func (s *sender) stream(a, b []byte, more func() []byte) error {
	s.turn.Lock()
	s.busy.Store(true)
	defer func() {
		s.busy.Store(false)
		s.turn.Unlock()
	}()
	s.mu.Lock()
	first := s.pending
	s.pending = s.spare[:0]
	s.mu.Unlock()
	s.spare = nil
	if cap(first) <= 4*smallSize {
		s.spare = first
	}
	s.write(first, a, b)
	for more != nil && s.err == nil {
		p := more()
		if len(p) == 0 {
			break
		}
		s.write(p)
	}
	return s.err
}

// write writes to the connection, unless that has failed. turn is held.
func (s *sender) write(parts ...[]byte) {
	parts = slices.DeleteFunc(parts, func(p []byte) bool { return len(p) == 0 })
	switch {
	case s.err != nil || len(parts) == 0:
	case len(parts) == 1:
		_, s.err = s.w.Write(parts[0])
	default:
		if k, ok := s.w.(*socket); ok {
			s.err = k.writeAll(parts)
			return
		}
		bufs := net.Buffers(parts)
		_, s.err = bufs.WriteTo(s.w)
	}
}
