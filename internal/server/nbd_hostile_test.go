package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"coppice/internal/nbd"
)

// A hostile client puts its bytes together itself. The numbers are those of the
// protocol.
const (
	wireOption          = 0x49484156454f5054
	wireRequest         = 0x25609513
	wireExtendedRequest = 0x21e41c71
	wireSimpleReply     = 0x67446698

	wireStartTLS = 5
	wireGo       = 7
	wireExtended = 11
)

// rawConn is a connection to the server behind its greeting, which was
// answered. It does not wait for ever.
func (r *faultRig) rawConn(network string) net.Conn {
	r.t.Helper()
	nc, err := net.Dial(network, map[string]string{"tcp": r.nbdFixture.tcp, "unix": r.socket}[network])
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(5 * patience)); err != nil {
		r.t.Fatal(err)
	}
	var hello [18]byte
	if _, err := io.ReadFull(nc, hello[:]); err != nil {
		r.t.Fatal(err)
	}
	if _, err := nc.Write([]byte{0, 0, 0, 3}); err != nil {
		r.t.Fatal(err)
	}
	return nc
}

// rawOption is the bytes of an option.
func rawOption(opt uint32, data string) []byte {
	b := binary.BigEndian.AppendUint64(nil, wireOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// rawGo is the data of GO, which asks for no information.
func rawGo(export string) string {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	return string(b) + export + "\x00\x00"
}

// rawReplies reads the replies to an option up to the last one and returns its
// type.
func rawReplies(nc io.Reader) (uint32, error) {
	for {
		var h [20]byte
		if _, err := io.ReadFull(nc, h[:]); err != nil {
			return 0, err
		}
		typ := binary.BigEndian.Uint32(h[12:])
		if _, err := io.CopyN(io.Discard, nc, int64(binary.BigEndian.Uint32(h[16:]))); err != nil {
			return 0, err
		}
		if typ == 1 || typ >= 1<<31 {
			return typ, nil
		}
	}
}

// rawRequest is the header of a request without extended headers.
func rawRequest(cmd, flags uint16, cookie, off uint64, n uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, wireRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, n)
}

// rawExtended is one with them.
func rawExtended(cmd, flags uint16, cookie, off, n uint64) []byte {
	b := binary.BigEndian.AppendUint32(nil, wireExtendedRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint64(b, n)
}

// openRaw opens an export and returns the connection.
func (r *faultRig) openRaw(export string, extended bool) net.Conn {
	r.t.Helper()
	nc := r.rawConn("unix")
	if extended {
		r.wantReply(nc, rawOption(wireExtended, ""), 1)
	}
	r.wantReply(nc, rawOption(wireGo, rawGo(export)), 1)
	return nc
}

func (r *faultRig) wantReply(nc net.Conn, option []byte, want uint32) {
	r.t.Helper()
	if _, err := nc.Write(option); err != nil {
		r.t.Fatal(err)
	}
	if got, err := rawReplies(nc); err != nil || got != want {
		r.t.Fatalf("reply to option %d: %#x, %v, want %#x", binary.BigEndian.Uint32(option[8:]), got, err, want)
	}
}

// wantCut expects the server to end a connection, whatever it says before.
func wantCut(t *testing.T, what string, nc net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, nc); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: %v, want the end of the connection", what, err)
	}
}

// TestNBDExtremes sends every command at the extremes of its numbers. Each
// request is answered, with the error that it deserves, and the next one as if
// nothing had been.
func TestNBDExtremes(t *testing.T) {
	r := newFaultRig(t, &faultHost{options: smallRegions()})
	_, uuid := r.newDisk(r.defaultSR(), 8<<20)
	const size = 8 << 20
	offsets := []uint64{0, 1, size - 1, size, size + 1, 1 << 32, math.MaxInt64, 1 << 63, math.MaxUint64 - 1, math.MaxUint64}
	lengths := []uint64{0, 1, size, size + 1, 1 << 31, math.MaxUint32, math.MaxInt64, 1 << 63, math.MaxUint64}

	// Of READ (0), FLUSH (3), TRIM (4), CACHE (5), WRITE_ZEROES (6), STATUS (7)
	// and commands that there are none of.
	commands := []uint16{0, 3, 4, 5, 6, 7, 8, 9, 0x8000, 0xffff}
	simple := r.openRaw("rw/"+uuid, false)
	extended := r.openRaw("rw/"+uuid, true)
	for _, cmd := range commands {
		for _, off := range offsets {
			for _, n := range lengths {
				inside := off <= size && n <= size-off
				if n <= math.MaxUint32 {
					if _, err := simple.Write(rawRequest(cmd, 0, 77, off, uint32(n))); err != nil {
						t.Fatal(err)
					}
					var h [16]byte
					if _, err := io.ReadFull(simple, h[:]); err != nil {
						t.Fatalf("command %d at %#x, %#x bytes: %v", cmd, off, n, err)
					}
					e := nbd.Errno(binary.BigEndian.Uint32(h[4:]))
					if binary.BigEndian.Uint32(h[:]) != wireSimpleReply || binary.BigEndian.Uint64(h[8:]) != 77 {
						t.Fatalf("command %d at %#x, %#x bytes: reply %x", cmd, off, n, h)
					}
					if e == 0 && cmd == 0 {
						if _, err := io.CopyN(io.Discard, simple, int64(n)); err != nil {
							t.Fatal(err)
						}
					}
					good := inside && (cmd == 0 || cmd >= 4 && cmd <= 6) || cmd == 3 && off == 0 && n == 0
					if (e == 0) != good {
						t.Errorf("command %d at %#x, %#x bytes: error %d", cmd, off, n, e)
					}
				}
				if cmd == 0 && inside {
					continue // a reply in chunks
				}
				if _, err := extended.Write(rawExtended(cmd, 0, 78, off, n)); err != nil {
					t.Fatal(err)
				}
				var h [32]byte
				if _, err := io.ReadFull(extended, h[:]); err != nil {
					t.Fatalf("extended command %d at %#x, %#x bytes: %v", cmd, off, n, err)
				}
				be := binary.BigEndian
				if be.Uint64(h[8:]) != 78 || be.Uint64(h[16:]) != off || be.Uint16(h[4:]) != 1 || be.Uint64(h[24:]) > 1<<10 {
					t.Fatalf("extended command %d at %#x, %#x bytes: reply %x", cmd, off, n, h)
				}
				if _, err := io.CopyN(io.Discard, extended, int64(be.Uint64(h[24:]))); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	// A payload that is announced has to be read past, or the connection goes.
	for _, n := range []uint64{1 << 33, 1 << 63, math.MaxUint64} {
		nc := r.openRaw("rw/"+uuid, true)
		if _, err := nc.Write(rawExtended(1, 1<<5, 79, 0, n)); err != nil {
			t.Fatal(err)
		}
		wantCut(t, fmt.Sprintf("a write of %#x bytes", n), nc)
	}
	c := r.open("rw/" + uuid)
	if _, err := c.Write([]byte{1}, 0, nbd.CmdFUA); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// TestNBDUpgrade has somebody meddle with the beginning of connections over TLS.
func TestNBDUpgrade(t *testing.T) {
	r := newFaultRig(t, &faultHost{options: smallRegions()})
	_, uuid := r.newDisk(r.defaultSR(), 1<<20)
	export := rawGo("rw/" + uuid + "?session_id=" + r.session)
	upgrade := rawOption(wireStartTLS, "")

	nc := r.rawConn("tcp")
	r.wantReply(nc, rawOption(wireGo, export), 1<<31+5) // TLS comes first
	r.wantReply(nc, rawOption(wireStartTLS, "data"), 1<<31+3)
	r.wantReply(nc, upgrade, 1)
	secure := tls.Client(nc, &tls.Config{InsecureSkipVerify: true}) // who it is does not matter here
	if err := secure.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := secure.Write(upgrade); err != nil {
		t.Fatal(err)
	}
	if got, err := rawReplies(secure); err != nil || got != 1<<31+3 {
		t.Errorf("TLS over TLS: %#x, %v", got, err)
	}
	if _, err := secure.Write(rawOption(wireGo, export)); err != nil {
		t.Fatal(err)
	}
	if got, err := rawReplies(secure); err != nil || got != 1 {
		t.Errorf("GO over TLS: %#x, %v", got, err)
	}

	for what, send := range map[string]func(nc net.Conn) error{
		"an option in the clear that goes with STARTTLS": func(nc net.Conn) error {
			_, err := nc.Write(slices.Concat(upgrade, rawOption(wireGo, export)))
			return err
		},
		"an option in the clear after STARTTLS": func(nc net.Conn) error {
			r.wantReply(nc, upgrade, 1)
			_, err := nc.Write(rawOption(wireGo, export))
			return err
		},
		"noise after STARTTLS": func(nc net.Conn) error {
			r.wantReply(nc, upgrade, 1)
			noise := make([]byte, 100<<10)
			_, _ = rand.NewChaCha8([32]byte{3}).Read(noise) // never fails
			_, _ = nc.Write(noise)                          // the server need not take it all
			return nil
		},
		"a record of TLS without end": func(nc net.Conn) error {
			r.wantReply(nc, upgrade, 1)
			if _, err := nc.Write([]byte{22, 3, 1, 0x40, 0, 1, 0, 0x3f}); err != nil {
				return err
			}
			return nc.(*net.TCPConn).CloseWrite()
		},
		"nothing after STARTTLS": func(nc net.Conn) error {
			r.wantReply(nc, upgrade, 1)
			return nc.(*net.TCPConn).CloseWrite()
		},
		"EXPORT_NAME in the clear": func(nc net.Conn) error {
			_, err := nc.Write(rawOption(1, uuid))
			return err
		},
	} {
		nc := r.rawConn("tcp")
		if err := send(nc); err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		wantCut(t, what, nc)
	}
}

// TestNBDCrowd has a hundred clients at once, of which each fifth is up to no
// good. Those that behave notice nothing, and in the end nothing is attached.
func TestNBDCrowd(t *testing.T) {
	r := newFaultRig(t, &faultHost{options: smallRegions()})
	const slot = 64 << 10
	ref, uuid := r.newDisk(r.defaultSR(), 8<<20)
	var held []net.Conn
	var wg sync.WaitGroup
	for i := range 100 {
		switch i % 10 {
		case 3: // stalls in the negotiation, or asks and does not listen
			nc := r.rawConn("unix")
			if i%20 == 3 {
				_, _ = nc.Write(bytes.Repeat(rawOption(wireGo, rawGo("none")), 100))
			}
			held = append(held, nc)
			continue
		case 7: // stalls in a write, or reads and does not listen
			nc := r.openRaw("rw/"+uuid, false)
			if i%20 == 7 {
				_, _ = nc.Write(rawRequest(1, 0, 1, 7<<20, 1<<20)[:20+i%8])
			} else {
				_, _ = nc.Write(bytes.Repeat(rawRequest(0, 0, 1, 0, 1<<20), 8))
			}
			held = append(held, nc)
			continue
		case 5: // asks for much and closes its side: all of it is answered
			nc := r.openRaw("rw/"+uuid, false)
			wg.Go(func() {
				const asked = 16
				if _, err := nc.Write(bytes.Repeat(rawRequest(0, 0, 1, 1<<20, slot), asked)); err != nil {
					t.Error(err)
				}
				if err := nc.(*net.UnixConn).CloseWrite(); err != nil {
					t.Error(err)
				}
				if n, err := io.Copy(io.Discard, nc); err != nil || n != asked*(16+slot) {
					t.Errorf("a client that has closed its side got %d bytes, %v", n, err)
				}
			})
			continue
		}
		wg.Go(func() {
			p := bytes.Repeat([]byte{byte(i + 1)}, slot)
			got := make([]byte, slot)
			for range 3 { // goes and comes again
				c, err := r.tryOpen("rw/" + uuid)
				if err != nil {
					t.Errorf("client %d: %v", i, err)
					return
				}
				for range 5 {
					if _, err := c.WriteAt(p, int64(i)*slot); err != nil {
						t.Errorf("client %d: %v", i, err)
					}
					if _, err := c.ReadAt(got, int64(i)*slot); err != nil || !bytes.Equal(got, p) {
						t.Errorf("client %d reads what is not its own: %v", i, err)
					}
				}
				if err := c.Close(); err != nil {
					t.Errorf("client %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
	r.wantCode("VDI_IN_USE", "VDI.destroy", ref) // by those that are held
	for _, nc := range held {
		nc.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for { // the server takes note in its own time
		if _, err := r.call("VDI.destroy", r.session, ref); err == nil {
			break
		} else if ctx.Err() != nil {
			t.Fatalf("destroy after all have gone: %v", err)
		}
	}
}
