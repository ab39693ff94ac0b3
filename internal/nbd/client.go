package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

	"coppice/internal/storage"
)

// Client is the other end of a connection in the transmission phase. It is
// safe for concurrent use: requests of several goroutines are under way at the
// same time. [Dialogue] makes one.
type Client struct {
	nc       net.Conn
	in       *bufio.Reader
	wire     wire
	size     int64
	flags    uint16
	contexts map[uint32]string

	wmu sync.Mutex // one request is written at a time

	mu      sync.Mutex // guards what follows
	cookie  uint64
	waiting map[uint64]*pendingCall
	err     error // why no more replies come

	reader sync.WaitGroup
}

// pendingCall is a request whose reply has not come yet.
type pendingCall struct {
	req    request
	data   []byte // of a READ, to be filled
	filled int64  // bytes of data that chunks have covered
	status map[string][]Status
	errno  Errno
	text   string
	at     int64 // byte of the export at which a READ failed, -1 unknown
	done   chan struct{}
	err    error // the connection's
}

// Status is a run of bytes of one status in a metadata context.
type Status struct {
	Len   int64
	Flags uint32
}

// RemoteError is what the server answered to a request that failed. It
// matches its Errno.
type RemoteError struct {
	Errno Errno
	Text  string
	At    int64 // byte of the export at which a READ failed, -1 when unknown
}

func (e *RemoteError) Error() string {
	if e.Text == "" || e.Text == e.Errno.Error() {
		return e.Errno.Error()
	}
	return e.Errno.Error() + ": " + e.Text
}

func (e *RemoteError) Unwrap() error { return e.Errno }

// ErrDisconnected is the error of requests on a connection that was closed.
var ErrDisconnected = errors.New("nbd: disconnected")

// Size returns the size of the export in bytes.
func (c *Client) Size() int64 { return c.size }

// Flags returns the transmission flags of the export.
func (c *Client) Flags() uint16 { return c.flags }

// ReadAt reads len(p) bytes; there is no partial success.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	return c.Read(p, off, 0)
}

// Read is ReadAt with command flags.
func (c *Client) Read(p []byte, off int64, flags uint16) (int, error) {
	_, err := c.do(request{cmd: cmdRead, flags: flags, off: uint64(off), length: uint64(len(p))}, nil, p)
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteAt writes p; it is durable after the next Flush.
func (c *Client) WriteAt(p []byte, off int64) (int, error) { return c.Write(p, off, 0) }

// Write is WriteAt with command flags.
func (c *Client) Write(p []byte, off int64, flags uint16) (int, error) {
	if c.wire == wireExtended {
		flags |= cmdPayloadLen
	}
	_, err := c.do(request{cmd: cmdWrite, flags: flags, off: uint64(off), length: uint64(len(p))}, p, nil)
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush makes every write that was answered before it durable.
func (c *Client) Flush(ctx context.Context) error {
	_, err := c.do(request{cmd: cmdFlush}, nil, nil)
	return err
}

// Trim gives up the contents of a range.
func (c *Client) Trim(off, n int64, flags uint16) error {
	_, err := c.do(request{cmd: cmdTrim, flags: flags, off: uint64(off), length: uint64(n)}, nil, nil)
	return err
}

// WriteZeroes makes a range read as zero.
func (c *Client) WriteZeroes(off, n int64, flags uint16) error {
	_, err := c.do(request{cmd: cmdWriteZeroes, flags: flags, off: uint64(off), length: uint64(n)}, nil, nil)
	return err
}

// Cache asks the server to have a range at hand.
func (c *Client) Cache(off, n int64) error {
	_, err := c.do(request{cmd: cmdCache, off: uint64(off), length: uint64(n)}, nil, nil)
	return err
}

// BlockStatus describes a front part of a range, at least one run, in every
// metadata context that was chosen.
func (c *Client) BlockStatus(off, n int64, flags uint16) (map[string][]Status, error) {
	p, err := c.do(request{cmd: cmdBlockStatus, flags: flags, off: uint64(off), length: uint64(n)}, nil, nil)
	if err != nil {
		return nil, err
	}
	return p.status, nil
}

// BlockStatusOf is BlockStatus in some of the contexts. It needs extended
// headers.
func (c *Client) BlockStatusOf(off, n int64, names ...string) (map[string][]Status, error) {
	b := binary.BigEndian.AppendUint64(nil, uint64(n))
	for id, name := range c.contexts {
		for _, want := range names {
			if name == want {
				b = binary.BigEndian.AppendUint32(b, id)
			}
		}
	}
	p, err := c.do(request{cmd: cmdBlockStatus, flags: cmdPayloadLen, off: uint64(off), length: uint64(len(b))}, b, nil)
	if err != nil {
		return nil, err
	}
	return p.status, nil
}

// Extents asks for all of a range in base:allocation.
func (c *Client) Extents(off, n int64) ([]storage.Extent, error) {
	var all []storage.Extent
	for n > 0 {
		st, err := c.BlockStatus(off, min(n, 1<<31), 0)
		if err != nil {
			return nil, err
		}
		for _, s := range st[ContextAllocation] {
			all = append(all, storage.Extent{Off: off, Len: s.Len, Hole: s.Flags&StateZero != 0})
			off, n = off+s.Len, n-s.Len
		}
	}
	return all, nil
}

// Close disconnects: the server ends what is under way and closes.
func (c *Client) Close() error {
	c.wmu.Lock()
	_, err := c.nc.Write(c.wire.appendRequest(nil, request{cmd: cmdDisconnect}))
	c.wmu.Unlock()
	return errors.Join(err, c.Abort())
}

// Abort closes the connection without a word.
func (c *Client) Abort() error {
	err := c.nc.Close()
	c.reader.Wait()
	for _, first := range []error{net.ErrClosed, syscall.EPIPE, syscall.ECONNRESET} {
		if errors.Is(err, first) { // the server was first
			return nil
		}
	}
	return err
}

// do sends a request and waits for its reply.
func (c *Client) do(r request, payload, data []byte) (*pendingCall, error) {
	p, err := c.send(r, payload, data)
	if err != nil {
		return nil, err
	}
	<-p.done
	switch {
	case p.err != nil:
		return nil, p.err
	case p.errno != 0:
		return nil, &RemoteError{p.errno, p.text, p.at}
	case r.cmd == cmdRead && p.filled != int64(len(data)):
		return nil, fmt.Errorf("nbd: the reply to a read of %d bytes has %d", len(data), p.filled)
	}
	return p, nil
}

// send sends a request.
func (c *Client) send(r request, payload, data []byte) (*pendingCall, error) {
	p := &pendingCall{data: data, at: -1, done: make(chan struct{})}
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return nil, c.err
	}
	c.cookie++
	r.cookie = c.cookie
	p.req = r
	c.waiting[r.cookie] = p
	c.mu.Unlock()

	c.wmu.Lock()
	defer c.wmu.Unlock()
	bufs := net.Buffers{c.wire.appendRequest(nil, r), payload}
	if _, err := bufs.WriteTo(c.nc); err != nil {
		c.mu.Lock()
		delete(c.waiting, r.cookie)
		c.mu.Unlock()
		return nil, ended(err)
	}
	return p, nil
}

// ended makes of the ways in which a connection is found closed the one error.
func ended(err error) error {
	for _, gone := range []error{net.ErrClosed, io.EOF, io.ErrClosedPipe, syscall.EPIPE, syscall.ECONNRESET} {
		if errors.Is(err, gone) {
			return ErrDisconnected
		}
	}
	return err
}

// run reads replies until the connection ends.
func (c *Client) run() {
	var err error
	for err == nil {
		err = c.receive()
	}
	err = ended(err)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	for _, p := range c.waiting {
		p.err = err
		close(p.done)
	}
	c.waiting = nil
	c.nc.Close()
}

// receive reads one simple reply or chunk.
func (c *Client) receive() error {
	be := binary.BigEndian
	var b [extendedReplySize]byte
	if _, err := io.ReadFull(c.in, b[:simpleReplySize]); err != nil {
		return err
	}
	switch magic := be.Uint32(b[:]); {
	case magic == magicSimpleReply && c.wire != wireExtended:
		p := c.find(be.Uint64(b[8:]))
		if p == nil {
			return errors.New("nbd: reply to nothing")
		}
		p.errno = Errno(be.Uint32(b[4:]))
		if p.req.cmd == cmdRead {
			if c.wire != wireSimple {
				return errors.New("nbd: simple reply to a read")
			}
			if p.errno == 0 {
				if _, err := io.ReadFull(c.in, p.data); err != nil {
					return err
				}
				p.filled = int64(len(p.data))
			}
		}
		c.finish(p)
		return nil
	case magic == magicChunk && c.wire == wireStructured:
		if _, err := io.ReadFull(c.in, b[simpleReplySize:chunkSize]); err != nil {
			return err
		}
		return c.chunk(be.Uint16(b[4:]), be.Uint16(b[6:]), be.Uint64(b[8:]), uint64(be.Uint32(b[16:])))
	case magic == magicExtendedReply && c.wire == wireExtended:
		if _, err := io.ReadFull(c.in, b[simpleReplySize:]); err != nil {
			return err
		}
		return c.chunk(be.Uint16(b[4:]), be.Uint16(b[6:]), be.Uint64(b[8:]), be.Uint64(b[24:]))
	default:
		return fmt.Errorf("nbd: reply with magic %#x", magic)
	}
}

func (c *Client) find(cookie uint64) *pendingCall {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.waiting[cookie]
}

func (c *Client) finish(p *pendingCall) {
	c.mu.Lock()
	delete(c.waiting, p.req.cookie)
	c.mu.Unlock()
	close(p.done)
}

// chunk reads the payload of a reply chunk.
func (c *Client) chunk(flags, typ uint16, cookie, n uint64) error {
	p := c.find(cookie)
	if p == nil {
		return errors.New("nbd: chunk of nothing")
	}
	var err error
	switch typ {
	case chunkNone:
		if n != 0 || flags&chunkDone == 0 {
			err = errors.New("nbd: malformed chunk")
		}
	case chunkData:
		err = c.dataChunk(p, n)
	case chunkHole:
		err = c.holeChunk(p, n)
	case chunkBlockStatus, chunkBlockStatusExt:
		err = c.statusChunk(p, n)
	default:
		err = c.errorChunk(p, typ, n)
	}
	if err == nil && flags&chunkDone != 0 {
		c.finish(p)
	}
	return err
}

// place returns the part of a READ's data that a chunk is about.
func (p *pendingCall) place(off, n uint64) ([]byte, error) {
	at := off - p.req.off
	if p.req.cmd != cmdRead || off < p.req.off || n == 0 || at > uint64(len(p.data)) || n > uint64(len(p.data))-at {
		return nil, fmt.Errorf("nbd: chunk of %d bytes at %d in the reply to a read of %d at %d", n, off, len(p.data), p.req.off)
	}
	p.filled += int64(n)
	return p.data[at : at+n], nil
}

func (c *Client) dataChunk(p *pendingCall, n uint64) error {
	var b [8]byte
	if n < 8 {
		return errors.New("nbd: malformed chunk")
	}
	if _, err := io.ReadFull(c.in, b[:]); err != nil {
		return err
	}
	dst, err := p.place(binary.BigEndian.Uint64(b[:]), n-8)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(c.in, dst)
	return err
}

func (c *Client) holeChunk(p *pendingCall, n uint64) error {
	var b [12]byte
	if n != 12 {
		return errors.New("nbd: malformed chunk")
	}
	if _, err := io.ReadFull(c.in, b[:]); err != nil {
		return err
	}
	dst, err := p.place(binary.BigEndian.Uint64(b[:]), uint64(binary.BigEndian.Uint32(b[8:])))
	clear(dst)
	return err
}

// statusChunk reads the answer of one metadata context.
func (c *Client) statusChunk(p *pendingCall, n uint64) error {
	if n > 1<<20 {
		return errors.New("nbd: block status too long")
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c.in, b); err != nil {
		return err
	}
	head, each := 4, 8
	if c.wire == wireExtended {
		head, each = 8, 16
	}
	if p.req.cmd != cmdBlockStatus || len(b) <= head || (len(b)-head)%each != 0 {
		return errors.New("nbd: malformed block status")
	}
	be := binary.BigEndian
	name, ok := c.contexts[be.Uint32(b)]
	if !ok || p.status[name] != nil {
		return errors.New("nbd: block status of an unknown context, or twice")
	}
	var list []Status
	for d := b[head:]; len(d) > 0; d = d[each:] {
		s := Status{int64(be.Uint32(d)), be.Uint32(d[4:])}
		if c.wire == wireExtended {
			s = Status{int64(be.Uint64(d)), uint32(be.Uint64(d[8:]))}
		}
		if s.Len <= 0 {
			return errors.New("nbd: empty extent")
		}
		list = append(list, s)
	}
	if p.status == nil {
		p.status = map[string][]Status{}
	}
	p.status[name] = list
	return nil
}

func (c *Client) errorChunk(p *pendingCall, typ uint16, n uint64) error {
	if typ&(1<<15) == 0 || n < 6 || n > 64<<10 {
		return fmt.Errorf("nbd: chunk of type %d with %d bytes", typ, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c.in, b); err != nil {
		return err
	}
	k := int(binary.BigEndian.Uint16(b[4:]))
	if 6+k > len(b) {
		return errors.New("nbd: malformed error")
	}
	p.errno, p.text = Errno(binary.BigEndian.Uint32(b)), string(b[6:6+k])
	if typ == chunkErrorOffset && len(b) == 6+k+8 {
		p.at = int64(binary.BigEndian.Uint64(b[6+k:]))
	}
	if p.errno == 0 {
		p.errno = EIO
	}
	return nil
}
