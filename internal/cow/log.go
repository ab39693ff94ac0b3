package cow

import (
	"errors"
	"fmt"
	"io"

	"coppice/internal/vfs"
)

const logName = "log"

// logPos is a place between two frames.
type logPos struct {
	off  uint64 // byte of the ring
	seq  uint64 // of the next frame
	prev uint32 // payload checksum of the frame before
	virt uint64 // bytes of all laps before it; not on disk
}

// redoLog is the ring of frames. Only the holder of the commit role uses it.
//
// A frame does not wrap: it begins at byte 0 when less than maxFrame is left
// behind the one before.
type redoLog struct {
	file  vfs.File
	codec frameCodec
	size  uint64 // bytes of the ring
	align uint64 // of frames
	head  logPos
	tail  uint64 // virtual position from which a recovery would replay

	buf []byte // aligned memory that one frame leaves to the next
}

// maxReused is how many bytes one frame may leave to the next: what a flush
// of a few dozen writes takes.
const maxReused = 1 << 20

// createLog makes a log of n bytes, all of them written: space that has only
// been allocated would cost the host a commit of its own journal with each
// sync of a frame.
func createLog(dir vfs.FS, n int64) error {
	f, err := dir.Create(logName)
	if err != nil {
		return err
	}
	return errors.Join(fillLog(f, 0, n), f.Close())
}

// fillLog writes the zeros of a new log of n bytes, or of one that ends before,
// from off on and makes it durable.
func fillLog(f vfs.File, off, n int64) error {
	if off < n {
		if err := f.Allocate(off, n-off); err != nil {
			return err
		}
	}
	zeros := make([]byte, min(n, 1<<20))
	for ; off < n; off += int64(len(zeros)) {
		zeros = zeros[:min(int64(len(zeros)), n-off)]
		if _, err := f.WriteAt(zeros, off); err != nil {
			return err
		}
	}
	return f.Datasync()
}

// maxFrame is the greatest size of a frame with its header: a quarter of the
// ring, at most 8 MiB, and whole multiples of what frames begin at.
func (l *redoLog) maxFrame() uint64 { return min(8<<20, l.size/minLogFrames) / l.align * l.align }

// frameSize is what a frame with n bytes of payload takes.
func (l *redoLog) frameSize(n uint64) uint64 {
	return (frameHeader + n + l.align - 1) / l.align * l.align
}

// room is how many bytes of frames can be written for certain.
func (l *redoLog) room() uint64 {
	used := l.head.virt - l.tail + l.maxFrame() + l.align // the end of the ring may have to be skipped
	return l.size - min(l.size, used)
}

// cost is the room that n bytes of records in records of at most a frame
// each need at most.
func (l *redoLog) cost(n uint64) uint64 {
	frames := 2 + 2*n/(l.maxFrame()-frameHeader)
	return n + frames*(frameHeader+l.align)
}

// next is where the frame behind p begins.
func (l *redoLog) next(p logPos) logPos {
	if l.size-p.off < l.maxFrame() {
		p.virt += l.size - p.off
		p.off = 0
	}
	return p
}

// begin returns the place for a payload: what is appended to it and fits need
// not be copied by write.
func (l *redoLog) begin() []byte {
	if len(l.buf) < frameHeader {
		return nil
	}
	return l.buf[frameHeader:frameHeader]
}

// around returns aligned memory for a frame of n bytes that has the payload,
// and only zeros behind it.
func (l *redoLog) around(payload []byte, n int) []byte {
	b := l.buf
	inPlace := n <= len(b) && len(payload) > 0 && &payload[0] == &b[frameHeader]
	if n > len(b) {
		b = vfs.Aligned(n)
		if n <= maxReused {
			l.buf = b
		}
	}
	if b = b[:n]; !inPlace {
		copy(b[frameHeader:], payload)
	}
	clear(b[frameHeader+len(payload):])
	return b
}

// write writes one frame with the given payload and makes it durable.
func (l *redoLog) write(gen uint64, payload []byte) error {
	p := l.next(l.head)
	n := l.frameSize(uint64(len(payload)))
	if n > l.maxFrame() || p.virt+n-l.tail > l.size {
		return fmt.Errorf("log: frame of %d bytes does not fit", n)
	}
	b := l.around(payload, int(n))
	f := frameInfo{gen: gen, seq: p.seq, prev: p.prev, n: uint32(len(payload)), crc: l.codec.sum(payload)}
	l.codec.put(b, f)
	if err := l.file.WriteSync(b, int64(p.off)); err != nil {
		return fmt.Errorf("writing log: %w", err)
	}
	l.head = logPos{off: p.off + n, seq: p.seq + 1, prev: f.crc, virt: p.virt + n}
	return nil
}

// frame is a frame as it was read.
type frame struct {
	frameInfo
	off     uint64 // byte of the ring
	payload []byte
}

// scan calls f with every frame from the head on, and moves the head behind
// the last one. The first frame that does not fit ends the log; it
// is the one that was being written, if there was one. A frame of a later
// number further on means that the medium has lost the one before it.
func (l *redoLog) scan(gen uint64, f func(frame) error) error {
	if err := l.whole(); err != nil {
		return err
	}
	for {
		p := l.next(l.head)
		h, b, err := l.read(p.off)
		if err != nil {
			return err
		}
		if b == nil || h.seq != p.seq || h.prev != p.prev {
			break
		}
		if h.gen > gen {
			return &CorruptError{Detail: fmt.Sprintf("log: frame %d is of generation %d, the superblock of %d", h.seq, h.gen, gen)}
		}
		if err := f(frame{h, p.off, b}); err != nil {
			return err
		}
		n := l.frameSize(uint64(h.n))
		l.head = logPos{off: p.off + n, seq: p.seq + 1, prev: h.crc, virt: p.virt + n}
	}
	return l.nothingBehind()
}

// whole fails when a part of the ring is missing, which is written once as a
// whole before there is a superblock: what is not there is no end of the log.
func (l *redoLog) whole() error {
	n, err := l.file.Size()
	if err != nil {
		return &CorruptError{Detail: "log", Cause: err}
	}
	if uint64(max(0, n)) < l.size {
		return &CorruptError{Detail: fmt.Sprintf("log: the file has %d bytes instead of %d", n, l.size)}
	}
	return nil
}

// nothingBehind fails when a frame of a later number than the log's end is
// anywhere in the ring.
func (l *redoLog) nothingBehind() error {
	b := make([]byte, max(l.align, 256<<10))
	for at := uint64(0); at < l.size; at += uint64(len(b)) {
		n := min(uint64(len(b)), l.size-at)
		if _, err := l.file.ReadAt(b[:n], int64(at)); err != nil && !errors.Is(err, io.EOF) {
			return &CorruptError{Detail: "log", Cause: err}
		}
		for off := uint64(0); off < n; off += l.align {
			if h, ok := l.codec.get(b[off : off+frameHeader]); ok && h.seq > l.head.seq {
				return &CorruptError{Detail: fmt.Sprintf("log: ends before frame %d, but there is frame %d", l.head.seq, h.seq)}
			}
		}
	}
	return nil
}

// torn reports whether a frame with the next number has at least begun to be
// written.
func (l *redoLog) torn() (bool, error) {
	p := l.next(l.head)
	b := make([]byte, frameHeader)
	if _, err := l.file.ReadAt(b, int64(p.off)); err != nil && !errors.Is(err, io.EOF) {
		return false, &CorruptError{Detail: "log", Cause: err}
	}
	h, ok := l.codec.get(b)
	return ok && h.seq == p.seq, nil
}

// read reads the frame at off; a nil payload means that there is none.
func (l *redoLog) read(off uint64) (frameInfo, []byte, error) {
	b := make([]byte, l.align)
	if _, err := l.file.ReadAt(b, int64(off)); err != nil && !errors.Is(err, io.EOF) {
		return frameInfo{}, nil, &CorruptError{Detail: "log", Cause: err}
	}
	h, ok := l.codec.get(b)
	if !ok || uint64(h.n) > l.maxFrame()-frameHeader {
		return h, nil, nil
	}
	p := make([]byte, h.n)
	if _, err := l.file.ReadAt(p, int64(off)+frameHeader); err != nil && !errors.Is(err, io.EOF) {
		return h, nil, &CorruptError{Detail: "log", Cause: err}
	}
	if l.codec.sum(p) != h.crc {
		return h, nil, nil
	}
	return h, p, nil
}
