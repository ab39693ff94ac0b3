package nbd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// selection is what SET_META_CONTEXT chose. The id of a context is its
// position, from 1 on.
type selection struct {
	export string
	names  []string
}

// errEnded is how a handshake ends in which the client has changed its mind.
var errEnded = fmt.Errorf("the client has ended the negotiation: %w", io.EOF)

// handshake negotiates until an export is open. On an error the connection is
// of no more use; c.export may be open nevertheless.
func (c *conn) handshake(ctx context.Context) error {
	hello := binary.BigEndian.AppendUint64(nil, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if _, err := c.nc.Write(hello); err != nil {
		return err
	}
	var b [16]byte
	if _, err := io.ReadFull(c.in, b[:4]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&flagFixedNewstyle == 0 || flags&^uint32(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("client flags %#x: fixed newstyle is the only negotiation spoken", flags)
	}
	for {
		if _, err := io.ReadFull(c.in, b[:]); err != nil {
			return err
		}
		if m := binary.BigEndian.Uint64(b[:]); m != magicOption {
			return fmt.Errorf("option with magic %#x", m)
		}
		opt, n := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
		if n > maxOption {
			if n > maxSkip || opt == optExportName {
				return fmt.Errorf("option %d with %d bytes", opt, n)
			}
			if _, err := c.in.Discard(int(n)); err != nil {
				return err
			}
			if err := c.refuse(opt, &Refusal{repErrTooBig, "too long"}); err != nil {
				return err
			}
			continue
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(c.in, data); err != nil {
			return err
		}
		if done, err := c.option(ctx, opt, data, flags&flagNoZeroes != 0); done || err != nil {
			return err
		}
	}
}

// option answers one option. done is true when transmission begins.
func (c *conn) option(ctx context.Context, opt uint32, data []byte, noZeroes bool) (done bool, err error) {
	if c.tls != nil && !c.secure && opt != optStartTLS && opt != optAbort {
		if opt == optExportName {
			return false, errors.New("export wanted before TLS")
		}
		return false, c.refuse(opt, &Refusal{repErrTLSRequired, "begin with TLS"})
	}
	switch opt {
	case optExportName:
		return true, c.exportName(ctx, string(data), noZeroes)
	case optAbort:
		// The client need not wait for the answer.
		if err := c.reply(opt, repAck, nil); err != nil {
			return false, errEnded
		}
		return false, errEnded
	case optStartTLS:
		return false, c.startTLS(ctx, data)
	case optList:
		if len(data) > 0 {
			return false, c.refuse(opt, errMalformed)
		}
		return false, c.list(ctx)
	case optInfo, optGo:
		return c.infoOrGo(ctx, opt, data)
	case optStructuredReply:
		return false, c.frame(opt, data, wireStructured)
	case optExtendedHeaders:
		return false, c.frame(opt, data, wireExtended)
	case optListMetaContext, optSetMetaContext:
		return false, c.metaContext(ctx, opt, data)
	}
	return false, c.refuse(opt, &Refusal{repErrUnsupported, "unknown option"})
}

var errMalformed = &Refusal{repErrInvalid, "malformed option"}

// appendOptionReply encodes one reply to an option.
func appendOptionReply(b []byte, opt, typ uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOptionReply)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, typ)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// reply sends one reply to an option.
func (c *conn) reply(opt, typ uint32, data []byte) error {
	_, err := c.nc.Write(appendOptionReply(nil, opt, typ, data))
	return err
}

// refuse answers an option with an error, of which the client learns no more
// than a Refusal says.
func (c *conn) refuse(opt uint32, err error) error {
	r, ok := errors.AsType[*Refusal](err)
	if !ok {
		c.log.Warn("nbd: negotiation", "option", opt, "err", err)
		r = &Refusal{repErrPolicy, "the export cannot be opened; the server's log says why"}
	}
	text := strings.ToValidUTF8(r.Message, "?")
	return c.reply(opt, r.Code, []byte(text[:min(len(text), maxErrorText)]))
}

// startTLS forgets what was said in the clear and goes on over TLS.
func (c *conn) startTLS(ctx context.Context, data []byte) error {
	switch {
	case c.secure:
		return c.refuse(optStartTLS, &Refusal{repErrInvalid, "TLS is in use already"})
	case c.tls == nil:
		return c.refuse(optStartTLS, ErrPolicy.Because("no TLS on this listener"))
	case len(data) > 0:
		return c.refuse(optStartTLS, errMalformed)
	case c.in.Buffered() > 0:
		// A client waits for the answer. These bytes are somebody else's, who
		// wants them to pass for what the client says over TLS.
		return errors.New("bytes in the clear behind STARTTLS")
	}
	if err := c.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	t := tls.Server(c.raw, c.tls)
	if err := t.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	c.nc, c.in, c.secure = t, bufio.NewReaderSize(t, inputBuffer), true
	c.wire, c.meta = wireSimple, selection{}
	return nil
}

// list names the exports, many with each call.
func (c *conn) list(ctx context.Context) error {
	var out, entry []byte
	for name, err := range c.backend.List(ctx) {
		if err != nil {
			if len(out) > 0 {
				if _, err := c.nc.Write(out); err != nil {
					return err
				}
			}
			return c.refuse(optList, err)
		}
		entry = binary.BigEndian.AppendUint32(entry[:0], uint32(len(name)))
		out = appendOptionReply(out, optList, repServer, append(entry, name...))
		if len(out) >= batchBytes {
			if _, err := c.nc.Write(out); err != nil {
				return err
			}
			out = out[:0]
		}
	}
	_, err := c.nc.Write(appendOptionReply(out, optList, repAck, nil))
	return err
}

// frame agrees on richer replies.
func (c *conn) frame(opt uint32, data []byte, w wire) error {
	switch {
	case len(data) > 0:
		return c.refuse(opt, errMalformed)
	case c.wire == wireExtended && w == wireStructured:
		return c.refuse(opt, &Refusal{repErrExtRequired, "extended headers are in use"})
	case c.wire == w:
		return c.refuse(opt, &Refusal{repErrInvalid, "agreed already"})
	}
	c.wire = w
	return c.reply(opt, repAck, nil)
}

// validString says whether b is a string as the protocol wants them.
func validString(b []byte) bool {
	return len(b) <= maxString && utf8.Valid(b) && bytes.IndexByte(b, 0) < 0
}

// take cuts a counted string off the front of an option's data.
func take(data []byte) (s string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	n, data := binary.BigEndian.Uint32(data), data[4:]
	if uint64(n) > uint64(len(data)) || !validString(data[:n]) {
		return "", nil, false
	}
	return string(data[:n]), data[n:], true
}

// infoOrGo describes an export, and with GO opens it.
func (c *conn) infoOrGo(ctx context.Context, opt uint32, data []byte) (done bool, err error) {
	name, rest, ok := take(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return false, c.refuse(opt, errMalformed)
	}
	wanted := map[uint16]bool{}
	for rest = rest[2:]; len(rest) > 0; rest = rest[2:] {
		wanted[binary.BigEndian.Uint16(rest)] = true
	}
	d, err := c.backend.Describe(ctx, name)
	if err != nil {
		return false, c.refuse(opt, err)
	}
	if opt == optGo {
		if err := c.open(ctx, name); err != nil {
			return false, c.refuse(opt, err)
		}
		d.Size, d.ReadOnly = c.size, c.export.ReadOnly
	}
	be := binary.BigEndian
	info := be.AppendUint16(nil, infoExport)
	info = be.AppendUint64(info, uint64(d.Size))
	infos := [][]byte{be.AppendUint16(info, c.transmissionFlags(d.ReadOnly))}
	if wanted[infoName] {
		infos = append(infos, append(be.AppendUint16(nil, infoName), name...))
	}
	if wanted[infoDescription] && d.Text != "" {
		text := strings.ToValidUTF8(d.Text, "?")
		infos = append(infos, append(be.AppendUint16(nil, infoDescription), text[:min(len(text), maxString)]...))
	}
	b := be.AppendUint16(nil, infoBlockSize)
	b = be.AppendUint32(b, 1)
	b = be.AppendUint32(b, preferred)
	infos = append(infos, be.AppendUint32(b, maxRequest))
	for _, b := range infos {
		if err := c.reply(opt, repInfo, b); err != nil {
			return false, err
		}
	}
	return opt == optGo, c.reply(opt, repAck, nil)
}

// exportName opens an export the old way, in which a refusal is the end of
// the connection.
func (c *conn) exportName(ctx context.Context, name string, noZeroes bool) error {
	if !validString([]byte(name)) {
		return errors.New("malformed export name")
	}
	if err := c.open(ctx, name); err != nil {
		return fmt.Errorf("export: %w", err)
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(c.size))
	b = binary.BigEndian.AppendUint16(b, c.transmissionFlags(c.export.ReadOnly))
	if !noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	_, err := c.nc.Write(b)
	return err
}

// open attaches the export. Metadata contexts that were chosen for another
// one are forgotten.
func (c *conn) open(ctx context.Context, name string) error {
	if c.meta.export != name {
		c.meta = selection{}
	}
	var others []string
	for _, n := range c.meta.names {
		if n != ContextAllocation {
			others = append(others, n)
		}
	}
	e, err := c.backend.Open(ctx, name, others)
	if err != nil {
		return err
	}
	c.export, c.size = e, e.Size()
	return nil
}

// transmissionFlags are those of an export in this connection.
func (c *conn) transmissionFlags(readOnly bool) uint16 {
	f := uint16(FlagHasFlags | FlagSendFlush | FlagMultiConn | FlagSendCache)
	if readOnly {
		f |= FlagReadOnly
	} else {
		f |= FlagSendFUA | FlagSendTrim | FlagSendWriteZeroes | FlagSendFastZero
	}
	if c.wire >= wireStructured {
		f |= FlagSendDF
	}
	if c.wire == wireExtended {
		f |= FlagStatusPayload
	}
	return f
}

// metaContext lists or chooses metadata contexts.
func (c *conn) metaContext(ctx context.Context, opt uint32, data []byte) error {
	if opt == optSetMetaContext {
		c.meta = selection{} // whatever comes of it
	}
	if c.wire == wireSimple {
		return c.refuse(opt, &Refusal{repErrInvalid, "structured replies come first"})
	}
	name, rest, ok := take(data)
	if !ok || len(rest) < 4 {
		return c.refuse(opt, errMalformed)
	}
	n := binary.BigEndian.Uint32(rest)
	rest = rest[4:]
	var queries []string
	for range n {
		var q string
		if q, rest, ok = take(rest); !ok {
			return c.refuse(opt, errMalformed)
		}
		queries = append(queries, q)
	}
	if len(rest) > 0 {
		return c.refuse(opt, errMalformed)
	}
	if _, err := c.backend.Describe(ctx, name); err != nil {
		return c.refuse(opt, err)
	}
	if opt == optListMetaContext && n == 0 {
		queries = []string{"base:", ""}
	}
	var names []string
	for _, q := range queries {
		found, err := c.contexts(ctx, opt, name, q)
		if err != nil {
			return c.refuse(opt, err)
		}
		for _, f := range found {
			if !slices.Contains(names, f) {
				names = append(names, f)
			}
		}
	}
	if opt == optSetMetaContext {
		if len(names) > maxContexts {
			return c.refuse(opt, &Refusal{repErrTooBig, "too many metadata contexts"})
		}
		c.meta = selection{name, names}
	}
	for i, n := range names {
		id := uint32(0)
		if opt == optSetMetaContext {
			id = uint32(i + 1)
		}
		if err := c.reply(opt, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), n...)); err != nil {
			return err
		}
	}
	return c.reply(opt, repAck, nil)
}

// contexts returns the names that one query selects.
func (c *conn) contexts(ctx context.Context, opt uint32, export, query string) ([]string, error) {
	switch leaf, base := strings.CutPrefix(query, "base:"); {
	case query == "" && opt == optSetMetaContext:
		return nil, nil
	case query == ContextAllocation, base && leaf == "" && opt == optListMetaContext:
		return []string{ContextAllocation}, nil
	case base:
		return nil, nil
	}
	names, err := c.backend.Contexts(ctx, export, query)
	if opt == optSetMetaContext {
		names = slices.DeleteFunc(names, func(name string) bool { return strings.HasSuffix(name, ":") })
	}
	return names, err
}

// begin ends the time limit of the handshake. It reports whether a stop has
// come meanwhile.
func (c *conn) begin() (ok bool) {
	_ = c.raw.SetDeadline(time.Time{}) // fails when it is closed, which the next read tells
	return !c.stopping.Load()
}
