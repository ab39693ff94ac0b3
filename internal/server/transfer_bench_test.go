package server

import (
	"context"
	"fmt"
	"io"
	"net"
	"testing"

	"coppice/internal/storage"
)

// loopback is both ends of a TCP connection.
func loopback(b *testing.B) (here, there net.Conn) {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	there, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	here, err = l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		here.Close()
		there.Close()
	})
	return here, there
}

const benchSize = 256 * mib

// BenchmarkDownload sends a disk to a client that discards it.
func BenchmarkDownload(b *testing.B) {
	for name, plan := range map[string]func(context.Context, *download) (image, error){"raw": planRaw, "vhd": planVHD} {
		for _, part := range []int64{1, 100} {
			b.Run(fmt.Sprintf("%s/1-of-%d", name, part), func(b *testing.B) {
				v := testDisk(b, testRepo(b), 1, random(benchSize, 1, [2]int64{0, benchSize / part}))
				here, there := loopback(b)
				go func() { _, _ = io.Copy(io.Discard, there) }()
				b.SetBytes(benchSize / part)
				for b.Loop() {
					img, err := plan(b.Context(), downloadOf(nil, v, nil))
					if err == nil {
						err = img.send(b.Context(), whole(here), func(int64) {})
					}
					if err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkUpload receives a disk, onto zeroes or onto the same contents.
func BenchmarkUpload(b *testing.B) {
	contents := random(benchSize, 1, [2]int64{0, benchSize})
	for name, dec := range map[string]decoder{"raw": readRaw, "vhd": readVHD} {
		for _, onto := range []string{"zeroes", "same"} {
			b.Run(name+"/onto-"+onto, func(b *testing.B) {
				repo := testRepo(b)
				v := testDisk(b, repo, 1, contents)
				plan := planRaw
				if name == "vhd" {
					plan = planVHD
				}
				img, err := plan(b.Context(), downloadOf(nil, v, nil))
				if err != nil {
					b.Fatal(err)
				}
				target := v
				if onto == "zeroes" {
					target = testDisk(b, repo, 2, make([]byte, benchSize))
				}
				b.SetBytes(benchSize)
				for b.Loop() {
					b.StopTimer()
					if onto == "zeroes" {
						if err := target.Zero(b.Context(), 0, benchSize); err != nil {
							b.Fatal(err)
						}
					}
					here, there := loopback(b)
					go func() { _ = img.send(b.Context(), whole(there), func(int64) {}) }()
					b.StartTimer()
					u := &upload{size: benchSize, overlay: storage.NewOverlay(target), done: func(int64, int64) {}, interrupt: func() {}}
					if err := dec(b.Context(), io.LimitReader(here, img.length()), img.length(), u); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
