package nbd

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"
)

// script is a connection whose other end has said all it will say, and takes
// every answer.
type script struct {
	in  *bytes.Reader
	out int64
}

func (s *script) Read(p []byte) (int, error)       { return s.in.Read(p) }
func (s *script) Write(p []byte) (int, error)      { s.out += int64(len(p)); return len(p), nil }
func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return nil }
func (s *script) RemoteAddr() net.Addr             { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// option encodes an option.
func option(opt uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...)
}

// seeds are what clients say: every option, every command in every framing.
func seeds() [][]byte {
	be := binary.BigEndian
	hello := []byte{0, 0, 0, flagFixedNewstyle | flagNoZeroes}
	name := appendString(nil, "disk")
	info := append(be.AppendUint16(bytes.Clone(name), 2), 0, infoName, 0, infoBlockSize)
	meta := be.AppendUint32(bytes.Clone(name), 2)
	meta = appendString(appendString(meta, ContextAllocation), "base:")
	var all [][]byte
	options := [][]byte{
		option(optList, nil), option(optInfo, info), option(optStructuredReply, nil),
		option(optListMetaContext, meta), option(optSetMetaContext, meta), option(optExtendedHeaders, nil),
		option(optStartTLS, nil), option(77, []byte("what")), option(optList, make([]byte, maxOption+1)),
	}
	all = append(all,
		append(bytes.Clone(hello), bytes.Join(append(options, option(optAbort, nil)), nil)...),
		append(bytes.Clone(hello), option(optExportName, []byte("disk"))...),
		hello[:3])
	for _, w := range wires {
		b := bytes.Clone(hello)
		switch w {
		case wireStructured:
			b = append(b, option(optStructuredReply, nil)...)
		case wireExtended:
			b = append(b, option(optExtendedHeaders, nil)...)
		}
		b = append(append(b, option(optSetMetaContext, meta)...), option(optGo, info)...)
		for i, r := range []request{
			{cmd: cmdWrite, off: 4000, length: 200},
			{cmd: cmdWrite, length: 70, flags: CmdFUA},
			{cmd: cmdRead, length: 4096},
			{cmd: cmdRead, length: 1 << 20, flags: CmdDF},
			{cmd: cmdRead, length: 4 << 20},
			{cmd: cmdFlush},
			{cmd: cmdTrim, off: 1, length: 1 << 20},
			{cmd: cmdCache, length: 1 << 20},
			{cmd: cmdWriteZeroes, off: 7, length: 1 << 20, flags: CmdNoHole | CmdFastZero},
			{cmd: cmdBlockStatus, length: 1 << 20},
			{cmd: cmdBlockStatus, length: 1 << 20, flags: CmdReqOne},
			{cmd: 99, length: 5},
			{cmd: cmdRead, off: 1<<64 - 1, length: 1<<32 - 1},
			{cmd: cmdDisconnect},
		} {
			r.cookie = uint64(i)
			if r.cmd == cmdWrite && w == wireExtended {
				r.flags |= cmdPayloadLen
			}
			b = w.appendRequest(b, r)
			if r.cmd == cmdWrite {
				b = append(b, bytes.Repeat([]byte{9}, int(r.length))...)
			}
		}
		all = append(all, b)
	}
	ext := append(bytes.Clone(hello), option(optExtendedHeaders, nil)...)
	ext = append(append(ext, option(optSetMetaContext, meta)...), option(optGo, info)...)
	ext = wireExtended.appendRequest(ext, request{cmd: cmdBlockStatus, flags: cmdPayloadLen, length: 12})
	ext = be.AppendUint32(be.AppendUint64(ext, 1<<40), 1)
	cut := append(append(bytes.Clone(hello), option(optGo, info)...), wireSimple.appendRequest(nil, request{cmd: cmdWrite, length: pieceSize + 1})...)
	return append(all, ext, append(cut, "not all of it"...))
}

// FuzzServer has a client say anything. The server ends with it, has released
// the export and the memory, and the device is as large as it was.
func FuzzServer(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		const size = 8 << 20
		_, v := newVolume(t, size)
		b := &shelf{exports: map[string]*Export{"disk": {Device: v}}}
		s := NewServer(Options{Backend: func(net.Conn) Backend { return b }})
		nc := &script{in: bytes.NewReader(said)}
		s.ServeConn(nc, nil)
		if o, c := b.opened.Load(), b.closed.Load(); o != c {
			t.Errorf("%d exports opened and %d closed", o, c)
		}
		if left := s.memory.left.Load(); left != DefaultMemory {
			t.Errorf("%d bytes of the budget are lost", DefaultMemory-left)
		}
		if v.Size() != size {
			t.Errorf("the device has %d bytes", v.Size())
		}
	})
}

// FuzzClient has a server say anything.
func FuzzClient(f *testing.F) {
	for _, s := range seeds() {
		_, v := newVolume(f, 8<<20)
		b := &shelf{exports: map[string]*Export{"disk": {Device: v}}}
		rec := &recorder{script: script{in: bytes.NewReader(s)}}
		NewServer(Options{Backend: func(net.Conn) Backend { return b }}).ServeConn(rec, nil)
		f.Add(rec.said.Bytes())
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		d, err := Begin(&script{in: bytes.NewReader(said)})
		if err != nil {
			return
		}
		_, _ = d.List()
		if d.Structured() == nil {
			_, _ = d.SetContexts("disk", ContextAllocation)
		}
		c, err := d.Go("disk")
		if err != nil {
			return
		}
		_, _ = c.ReadAt(make([]byte, 1<<20), 0)
		_, _ = c.BlockStatus(0, 1<<20, 0)
		_ = c.Abort()
	})
}

// recorder keeps what the server says.
type recorder struct {
	script
	said bytes.Buffer
}

func (r *recorder) Write(p []byte) (int, error) { return r.said.Write(p) }

var (
	_ net.Conn  = (*script)(nil)
	_ io.Writer = (*recorder)(nil)
)
