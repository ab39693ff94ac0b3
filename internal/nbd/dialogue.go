package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

// Dialogue is the client's side of the negotiation, one method per option. It
// is for one goroutine.
type Dialogue struct {
	nc       net.Conn
	in       *bufio.Reader
	wire     wire
	noZeroes bool
	contexts map[uint32]string
}

// Begin starts the negotiation over a new connection.
func Begin(nc net.Conn) (*Dialogue, error) {
	d := &Dialogue{nc: nc, in: bufio.NewReaderSize(nc, inputBuffer)}
	var b [18]byte
	if _, err := io.ReadFull(d.in, b[:]); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	if be.Uint64(b[:]) != magicServer || be.Uint64(b[8:]) != magicOption {
		return nil, errors.New("nbd: the server does not negotiate in the new style")
	}
	flags := be.Uint16(b[16:])
	if flags&flagFixedNewstyle == 0 {
		return nil, errors.New("nbd: the server does not negotiate in the fixed new style")
	}
	d.noZeroes = flags&flagNoZeroes != 0
	_, err := nc.Write(be.AppendUint32(nil, uint32(flags&(flagFixedNewstyle|flagNoZeroes))))
	return d, err
}

// OptionReply is one reply to an option.
type OptionReply struct {
	Type uint32
	Data []byte
}

// Option sends an option and returns its replies up to the final one: an ACK,
// which is left out, or an error, which is a [*Refusal].
func (d *Dialogue) Option(opt uint32, data []byte) ([]OptionReply, error) {
	be := binary.BigEndian
	b := be.AppendUint64(nil, magicOption)
	b = be.AppendUint32(b, opt)
	b = be.AppendUint32(b, uint32(len(data)))
	if _, err := d.nc.Write(append(b, data...)); err != nil {
		return nil, err
	}
	var replies []OptionReply
	for {
		var h [20]byte
		if _, err := io.ReadFull(d.in, h[:]); err != nil {
			return replies, err
		}
		if be.Uint64(h[:]) != magicOptionReply || be.Uint32(h[8:]) != opt {
			return replies, errors.New("nbd: malformed reply to an option")
		}
		typ, n := be.Uint32(h[12:]), be.Uint32(h[16:])
		if n > maxSkip {
			return replies, fmt.Errorf("nbd: reply of %d bytes to an option", n)
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(d.in, data); err != nil {
			return replies, err
		}
		switch {
		case typ == repAck:
			return replies, nil
		case typ >= repErrSmallestCode:
			return replies, &Refusal{typ, string(data)}
		}
		replies = append(replies, OptionReply{typ, data})
	}
}

// StartTLS goes over to TLS.
func (d *Dialogue) StartTLS(ctx context.Context, config *tls.Config) error {
	if _, err := d.Option(optStartTLS, nil); err != nil {
		return err
	}
	t := tls.Client(d.nc, config)
	if err := t.HandshakeContext(ctx); err != nil {
		return err
	}
	d.nc, d.in, d.wire = t, bufio.NewReaderSize(t, inputBuffer), wireSimple
	return nil
}

// Structured agrees on structured replies.
func (d *Dialogue) Structured() error {
	_, err := d.Option(optStructuredReply, nil)
	if err == nil {
		d.wire = wireStructured
	}
	return err
}

// Extended agrees on extended headers.
func (d *Dialogue) Extended() error {
	_, err := d.Option(optExtendedHeaders, nil)
	if err == nil {
		d.wire = wireExtended
	}
	return err
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

// List returns the names of the exports.
func (d *Dialogue) List() ([]string, error) {
	replies, err := d.Option(optList, nil)
	var names []string
	for _, r := range replies {
		name, _, ok := take(r.Data)
		if !ok || r.Type != repServer {
			return nil, errors.New("nbd: malformed list")
		}
		names = append(names, name)
	}
	return names, err
}

// ListContexts returns the metadata contexts of an export that queries
// select, all without queries.
func (d *Dialogue) ListContexts(export string, queries ...string) ([]string, error) {
	found, err := d.metaContexts(optListMetaContext, export, queries)
	names := make([]string, len(found))
	for i, r := range found {
		names[i] = string(r.Data[4:])
	}
	return names, err
}

// SetContexts chooses metadata contexts of an export and returns those that it
// has.
func (d *Dialogue) SetContexts(export string, queries ...string) ([]string, error) {
	found, err := d.metaContexts(optSetMetaContext, export, queries)
	d.contexts = map[uint32]string{}
	var names []string
	for _, r := range found {
		names = append(names, string(r.Data[4:]))
		d.contexts[binary.BigEndian.Uint32(r.Data)] = string(r.Data[4:])
	}
	return names, err
}

func (d *Dialogue) metaContexts(opt uint32, export string, queries []string) ([]OptionReply, error) {
	b := appendString(nil, export)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = appendString(b, q)
	}
	replies, err := d.Option(opt, b)
	for _, r := range replies {
		if r.Type != repMetaContext || len(r.Data) < 5 {
			return nil, errors.New("nbd: malformed metadata context")
		}
	}
	return replies, err
}

// Info is what a server says of an export.
type Info struct {
	Name, Description    string
	Size                 int64
	Flags                uint16
	Minimum, Best, Limit uint32 // block sizes in bytes, 0 when not told
}

// Info asks about an export.
func (d *Dialogue) Info(export string) (Info, error) { return d.info(optInfo, export) }

// Go opens an export.
func (d *Dialogue) Go(export string) (*Client, error) {
	i, err := d.info(optGo, export)
	if err != nil {
		return nil, err
	}
	return d.client(i.Size, i.Flags), nil
}

// ExportName opens an export the old way: a refusal is the end of the
// connection.
func (d *Dialogue) ExportName(export string) (*Client, error) {
	be := binary.BigEndian
	b := be.AppendUint64(nil, magicOption)
	b = be.AppendUint32(b, optExportName)
	if _, err := d.nc.Write(appendString(b, export)); err != nil {
		return nil, err
	}
	var r [10 + 124]byte
	n := len(r)
	if d.noZeroes {
		n = 10
	}
	if _, err := io.ReadFull(d.in, r[:n]); err != nil {
		return nil, err
	}
	return d.client(int64(be.Uint64(r[:])), be.Uint16(r[8:])), nil
}

// Abort ends the negotiation.
func (d *Dialogue) Abort() error {
	_, err := d.Option(optAbort, nil)
	return errors.Join(err, d.nc.Close())
}

func (d *Dialogue) info(opt uint32, export string) (i Info, err error) {
	b := appendString(nil, export)
	b = binary.BigEndian.AppendUint16(b, 3)
	for _, item := range []uint16{infoName, infoDescription, infoBlockSize} {
		b = binary.BigEndian.AppendUint16(b, item)
	}
	replies, err := d.Option(opt, b)
	if err != nil {
		return i, err
	}
	be := binary.BigEndian
	seen := false
	for _, r := range replies {
		if r.Type != repInfo || len(r.Data) < 2 {
			return i, errors.New("nbd: malformed information")
		}
		switch item, v := be.Uint16(r.Data), r.Data[2:]; {
		case item == infoExport && len(v) == 10:
			i.Size, i.Flags, seen = int64(be.Uint64(v)), be.Uint16(v[8:]), true
		case item == infoName:
			i.Name = string(v)
		case item == infoDescription:
			i.Description = string(v)
		case item == infoBlockSize && len(v) == 12:
			i.Minimum, i.Best, i.Limit = be.Uint32(v), be.Uint32(v[4:]), be.Uint32(v[8:])
		}
	}
	if !seen {
		return i, errors.New("nbd: the server says nothing about the export")
	}
	return i, nil
}

// client begins the transmission phase.
func (d *Dialogue) client(size int64, flags uint16) *Client {
	c := &Client{
		nc: d.nc, in: d.in, wire: d.wire, size: size, flags: flags,
		contexts: d.contexts, waiting: map[uint64]*pendingCall{},
	}
	c.reader.Go(c.run)
	return c
}
