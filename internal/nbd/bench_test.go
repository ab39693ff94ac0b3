package nbd

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"testing"

	"coppice/internal/storage"
	"coppice/internal/storage/cow"
)

// BenchmarkServer measures requests over a Unix socket against a store in
// the page cache, with a client that does as little as possible.
func BenchmarkServer(b *testing.B) {
	const size = 512 << 20
	d := cow.Driver()
	repo, err := d.Open(context.Background(), map[string]string{"location": b.TempDir()}, true)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { repo.Close() })
	if _, err := repo.Create(context.Background(), storage.Spec{ID: testDisk, Size: size}); err != nil {
		b.Fatal(err)
	}
	v, err := repo.Open(context.Background(), testDisk, storage.Live)
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(p)) {
		for i := range p {
			p[i] = byte(rand.Uint32())
		}
		if _, err := v.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	if err := v.Flush(context.Background()); err != nil {
		b.Fatal(err)
	}
	r := newRig(b, map[string]*Export{"disk": {Device: v}}, Options{}, nil)
	for _, bm := range []struct {
		name  string
		cmd   uint16
		bytes int
		depth int
	}{
		{"read4k", cmdRead, 4096, 1},
		{"read4k", cmdRead, 4096, 32},
		{"write4k", cmdWrite, 4096, 1},
		{"write4k", cmdWrite, 4096, 32},
		{"read1M", cmdRead, 1 << 20, 4},
		{"write1M", cmdWrite, 1 << 20, 4},
	} {
		b.Run(fmt.Sprintf("%s/depth%d", bm.name, bm.depth), func(b *testing.B) {
			nc := r.dial()
			defer nc.Close()
			if err := handshakeByHand(nc, "disk"); err != nil {
				b.Fatal(err)
			}
			in := bufio.NewReaderSize(nc, 256<<10)
			req := request{cmd: bm.cmd, length: uint64(bm.bytes)}
			reply := simpleReplySize
			if bm.cmd == cmdRead {
				reply += bm.bytes
			}
			send := func(n int) {
				var out []byte
				for range n {
					req.off = uint64(rand.IntN(size/bm.bytes)) * uint64(bm.bytes)
					out = wireSimple.appendRequest(out, req)
					if bm.cmd == cmdWrite {
						out = append(out, p[:bm.bytes]...)
					}
				}
				if _, err := nc.Write(out); err != nil {
					b.Error(err)
				}
			}
			b.SetBytes(int64(bm.bytes))
			b.ResetTimer()
			sent := min(bm.depth, b.N)
			send(sent)
			for got := 0; got < b.N; {
				if _, err := in.Discard(reply); err != nil {
					b.Fatal(err)
				}
				got++
				n := 1
				for in.Buffered() >= reply && got < b.N {
					if _, err := in.Discard(reply); err != nil {
						b.Fatal(err)
					}
					got++
					n++
				}
				n = min(n, b.N-sent)
				if n > 0 {
					send(n)
					sent += n
				}
			}
		})
	}
}

// handshakeByHand opens an export without a Client.
func handshakeByHand(nc net.Conn, name string) error {
	if _, err := io.ReadFull(nc, make([]byte, 18)); err != nil {
		return err
	}
	b := append([]byte{0, 0, 0, flagFixedNewstyle | flagNoZeroes}, option(optExportName, []byte(name))...)
	if _, err := nc.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(nc, make([]byte, 10))
	return err
}
