package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"coppice/internal/storage"
)

// check says why a request cannot be carried out: 0 when it can.
func (c *conn) check(r *request) (Errno, string) {
	allowed := uint16(CmdFUA)
	switch r.cmd {
	case cmdRead:
		if c.wire >= wireStructured {
			allowed |= CmdDF
		}
	case cmdWrite:
		if c.wire == wireExtended {
			allowed |= cmdPayloadLen
			if r.flags&cmdPayloadLen == 0 {
				return EINVAL, "a write has a payload"
			}
		}
	case cmdFlush:
		if r.off != 0 || r.length != 0 {
			return EINVAL, "a flush has no range"
		}
		return c.checkFlags(r, allowed)
	case cmdTrim, cmdCache:
	case cmdWriteZeroes:
		allowed |= CmdNoHole | CmdFastZero
	case cmdBlockStatus:
		allowed |= CmdReqOne
		if c.wire == wireExtended {
			allowed |= cmdPayloadLen
			if r.flags&cmdPayloadLen != 0 {
				if r.length < 8+4 || (r.length-8)%4 != 0 || r.length > 8+4*maxContexts {
					return EINVAL, "malformed payload"
				}
				return c.checkFlags(r, allowed) // the range is in the payload
			}
		}
		if len(c.meta.names) == 0 {
			return EINVAL, "no metadata context was chosen"
		}
		if r.length == 0 {
			return EINVAL, "empty range"
		}
	default:
		return EINVAL, "unknown command"
	}
	if e, text := c.checkFlags(r, allowed); e != 0 {
		return e, text
	}
	changes := r.cmd == cmdWrite || r.cmd == cmdTrim || r.cmd == cmdWriteZeroes
	if changes && c.export.ReadOnly {
		return EPERM, "the export is read-only"
	}
	if !c.within(r.off, r.length) {
		if r.cmd == cmdWrite || r.cmd == cmdWriteZeroes {
			return ENOSPC, "past the end"
		}
		return EINVAL, "past the end"
	}
	if r.length > maxRequest {
		switch {
		case r.cmd == cmdRead && r.flags&CmdDF != 0:
			return EOVERFLOW, "too long for one chunk"
		case r.cmd == cmdRead, r.cmd == cmdWrite:
			return EINVAL, "too long"
		}
	}
	return 0, ""
}

func (c *conn) checkFlags(r *request, allowed uint16) (Errno, string) {
	if r.flags&^allowed != 0 {
		return EINVAL, "unknown command flag"
	}
	return 0, ""
}

// within says whether a range lies in the export as the client knows it.
func (c *conn) within(off, n uint64) bool {
	size := uint64(c.size)
	return off <= size && n <= size-off
}

// do carries out a request that has passed check, with its payload. What it
// has to say goes to w.out, but for data of long reads, which it sends.
func (w *worker) do(r *request, p []byte) {
	c := w.c
	var err error
	switch r.cmd {
	case cmdRead:
		switch {
		case r.length <= smallSize:
			w.readShort(r)
		case c.wire == wireSimple, r.flags&CmdDF != 0:
			w.readWhole(r)
		default:
			w.readChunks(r)
		}
		return
	case cmdBlockStatus:
		w.blockStatus(r, p)
		return
	case cmdWrite:
		_, err = c.export.WriteAt(p, int64(r.off))
	case cmdTrim:
		lo := (r.off + trimGrain - 1) / trimGrain * trimGrain
		hi := (r.off + r.length) / trimGrain * trimGrain
		if lo < hi {
			err = c.export.Zero(c.ctx, int64(lo), int64(hi-lo))
		}
	case cmdWriteZeroes:
		// The store maps zeros to nothing, at the same cost for any length:
		// always fast, and there is nothing that NO_HOLE could set aside.
		err = c.export.Zero(c.ctx, int64(r.off), int64(r.length))
	case cmdCache:
		err = w.cache(int64(r.off), int64(r.length))
	case cmdFlush:
		err = c.export.Flush(c.ctx)
	}
	if err == nil && r.flags&CmdFUA != 0 && r.cmd != cmdFlush && r.cmd != cmdCache {
		err = c.export.Flush(c.ctx)
	}
	w.answer(r, err)
}

// answer says how a request ended that returns no data.
func (w *worker) answer(r *request, err error) {
	if err == nil {
		w.out = w.c.wire.appendDone(w.out, r)
		return
	}
	e := w.c.blame(r, err)
	w.out = w.c.wire.appendError(w.out, r, e, e.Error())
}

// blame translates and logs an error of the device. Clients learn only the
// number: texts may name files.
func (c *conn) blame(r *request, err error) Errno {
	e := errnoOf(err)
	if e == EIO {
		c.log.Error("nbd: request failed", "command", r.cmd, "off", r.off, "len", r.length, "err", err)
	}
	return e
}

// readAt fills p.
func (c *conn) readAt(p []byte, off int64) error {
	n, err := c.export.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: the device has become smaller", EINVAL)
	}
	return err
}

// readPiece fills p for a long read, and notes how long that took.
func (c *conn) readPiece(p []byte, off int64) error {
	begun := time.Now()
	err := c.readAt(p, off)
	c.note(classLongRead, time.Since(begun)*portionSize/time.Duration(len(p)))
	return err
}

// readShort answers a READ of up to smallSize in one go.
func (w *worker) readShort(r *request) {
	c, n := w.c, int(r.length)
	if n == 0 {
		w.answer(r, nil)
		return
	}
	start := len(w.out)
	w.out = slices.Grow(w.out, headroom+n)
	if c.wire == wireSimple {
		w.out = appendSimple(w.out, r.cookie, 0)
	} else {
		w.out = c.wire.appendChunk(w.out, r, chunkDone, chunkData, 8+n)
		w.out = binary.BigEndian.AppendUint64(w.out, r.off)
	}
	at := len(w.out)
	w.out = w.out[:at+n]
	if err := c.readAt(w.out[at:], int64(r.off)); err != nil {
		w.out = w.out[:start]
		w.answer(r, err)
	}
}

// readWhole answers a long READ with data only, in a simple reply or in one
// chunk. What is longer than a piece is announced before all of it has been
// read. An error then is told behind the chunk, the rest of which is zeros; a
// simple reply has no place for it, which leaves ending the connection.
func (w *worker) readWhole(r *request) {
	c := w.c
	left, off := int(r.length), int64(r.off)
	piece := func() ([]byte, error) {
		n := min(left, pieceSize)
		b := w.grab(n)
		err := c.readPiece(b[headroom:], off)
		left, off = left-n, off+int64(n)
		return b, err
	}
	b, err := piece()
	if err != nil {
		w.answer(r, err)
		return
	}
	head := make([]byte, 0, headroom)
	var end []byte // what follows the data
	switch {
	case c.wire == wireSimple:
		head = appendSimple(head, r.cookie, 0)
	case left == 0:
		head = c.wire.appendChunk(head, r, chunkDone, chunkData, 8+int(r.length))
	default:
		head = c.wire.appendChunk(head, r, 0, chunkData, 8+int(r.length))
		end = c.wire.appendChunk(nil, r, chunkDone, chunkNone, 0)
	}
	if c.wire != wireSimple {
		head = binary.BigEndian.AppendUint64(head, r.off)
	}
	b = b[headroom-len(head):]
	copy(b, head)
	failed := false
	c.sent(c.out.stream(nil, b, func() []byte {
		if left == 0 {
			last := end
			end = nil
			return last
		}
		if failed {
			n := min(left, pieceSize)
			left -= n
			b := w.grab(n)[headroom:]
			clear(b)
			return b
		}
		at := off
		b, err := piece()
		switch {
		case err == nil:
		case c.wire == wireSimple:
			c.fail(fmt.Errorf("read at %d: %w", at, err))
			c.cut()
			return nil
		default:
			failed = true
			no := c.blame(r, err)
			end = c.wire.appendErrorAt(nil, r, no, no.Error(), at)
			clear(b[headroom:])
		}
		return b[headroom:]
	}))
}

// holeMin is the shortest hole that is worth a chunk of its own, in bytes.
const holeMin = 16 << 10

// readChunks answers a long READ with a chunk for each run of data and hole,
// and for each portionSize of data.
func (w *worker) readChunks(r *request) {
	c := w.c
	off, end := int64(r.off), int64(r.off+r.length)
	for off < end {
		n := min(end-off, pieceSize)
		send := func(e storage.Extent) error { return w.chunk(r, e, e.End() == end) }
		var err error
		if c.looksDense() {
			err = send(storage.Extent{Off: off, Len: n})
		} else {
			err = c.pieces(off, n, send)
		}
		if ce, ok := errors.AsType[*chunkFault](err); ok {
			no := c.blame(r, ce.err)
			w.out = c.wire.appendErrorAt(w.out, r, no, no.Error(), ce.at)
			return
		}
		if err != nil {
			no := c.blame(r, err)
			w.out = c.wire.appendErrorAt(w.out, r, no, no.Error(), off)
			return
		}
		off += n
	}
}

// After so many long reads without a hole only some are looked at for holes:
// to find out costs a third of a read of 1 MiB.
const (
	denseAfter = 8
	denseLooks = 16 // one of so many
)

// looksDense says that holes are not worth looking for.
func (c *conn) looksDense() bool {
	n := c.dense.Add(1)
	return n > denseAfter && n%denseLooks != 0
}

// chunkFault is an error that a READ met at a byte of the export.
type chunkFault struct {
	at  int64
	err error
}

func (f *chunkFault) Error() string { return f.err.Error() }

// pieces calls do for the runs of data and hole in [off, off+n), none of them
// empty; short holes count as data.
func (c *conn) pieces(off, n int64, do func(storage.Extent) error) error {
	run := storage.Extent{Off: off}
	for e, err := range c.export.Extents(c.ctx, off, n) {
		if err != nil {
			return err
		}
		hole := e.Hole && e.Len >= holeMin
		if hole == run.Hole || run.Len == 0 {
			run.Hole = hole
			run.Len += e.Len
			continue
		}
		if err := do(run); err != nil {
			return err
		}
		run = storage.Extent{Off: run.End(), Len: e.Len, Hole: hole}
	}
	if run.End() != off+n {
		return fmt.Errorf("%w: extents end at %d instead of %d", EINVAL, run.End(), off+n)
	}
	return do(run)
}

// chunk sends one run of a READ, which is the last of it or not.
func (w *worker) chunk(r *request, e storage.Extent, last bool) error {
	c := w.c
	flags := uint16(0)
	if last {
		flags = chunkDone
	}
	if e.Hole {
		c.dense.Store(0)
		w.out = c.wire.appendChunk(w.out, r, flags, chunkHole, 12)
		w.out = binary.BigEndian.AppendUint64(w.out, uint64(e.Off))
		w.out = binary.BigEndian.AppendUint32(w.out, uint32(e.Len))
		return nil
	}
	for off := e.Off; off < e.End(); {
		n := int(min(e.End()-off, portionSize))
		b := w.grab(n)
		if err := c.readPiece(b[headroom:], off); err != nil {
			return &chunkFault{off, err}
		}
		f := flags
		if off+int64(n) < e.End() {
			f &^= chunkDone
		}
		w.sendData(r, f, off, n, b)
		off += int64(n)
	}
	return nil
}

// sendData sends a chunk of n bytes that are in b behind headroom.
func (w *worker) sendData(r *request, flags uint16, off int64, n int, b []byte) {
	c := w.c
	head := c.wire.appendChunk(make([]byte, 0, headroom), r, flags, chunkData, 8+n)
	head = binary.BigEndian.AppendUint64(head, uint64(off))
	b = b[headroom-len(head):]
	copy(b, head)
	c.sent(c.out.send(w.out, b))
	w.out = w.out[:0]
}

// writeLong carries out a WRITE that is longer than a piece, as it comes in.
// It belongs to the leader.
func (w *worker) writeLong(r *request) {
	c := w.c
	left, off := int(r.length), int64(r.off)
	c.flushes.changed.Store(true)
	var failed error
	for left > 0 {
		n := min(left, pieceSize)
		p, err := w.receive(w, n)
		if err != nil {
			return
		}
		if failed == nil {
			_, failed = c.export.WriteAt(p, off)
		}
		left, off = left-n, off+int64(n)
	}
	w.drop()
	if failed == nil && r.flags&CmdFUA != 0 {
		failed = c.export.Flush(c.ctx)
	}
	w.answer(r, failed)
	w.count++
}

// maxCached is how much of a range CACHE reads at most, in bytes.
const maxCached = 32 << 20

// cache reads data of a range, so that it is in memory for those who read it
// next.
func (w *worker) cache(off, n int64) error {
	c := w.c
	left := int64(maxCached)
	for e, err := range c.export.Extents(c.ctx, off, n) {
		if err != nil {
			return err
		}
		for !e.Hole && e.Len > 0 {
			k := min(e.Len, pieceSize, left)
			if k == 0 {
				return nil
			}
			if err := c.readAt(w.grab(int(k))[headroom:], e.Off); err != nil {
				return err
			}
			e.Off, e.Len, left = e.Off+k, e.Len-k, left-k
		}
	}
	return nil
}
