package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
)

// imageFormat is one of our formats, and what qemu-img makes of it.
type imageFormat struct {
	name string
	qemu string   // what qemu-img calls it, "" when it does not know it
	args []string // for it to write one
	slow bool     // a peer needs a minute for each GiB
}

var imageFormats = []imageFormat{
	{name: "raw", qemu: "raw"},
	{name: "vhd", qemu: "vpc", args: []string{"-o", "subformat=dynamic,force_size=on"}},
	{name: "qcow2", qemu: "qcow2"},
	{name: "tar"},
	{name: "vmdk", qemu: "vmdk", args: []string{"-o", "subformat=streamOptimized"}, slow: true},
}

// fewer is cfg for comparisons that move a disk: there are many of them.
func (c config) fewer() config {
	c.rounds = min(c.rounds, 3)
	return c
}

// benchDisk is a VDI, and the same contents as a raw file.
type benchDisk struct {
	name       string
	vdi, raw   string
	size, data int64 // bytes
}

func (s *server) newDisk(ctx context.Context, cfg config, name string, size, data int64) (d benchDisk, err error) {
	d = benchDisk{name: name, raw: filepath.Join(cfg.scratch, "disk.img"), size: size, data: data}
	if err := makeImage(d.raw, 1, size, data); err != nil {
		return d, err
	}
	if d.vdi, err = s.createVDI(ctx, size); err != nil {
		return d, err
	}
	if size == data {
		return d, s.importFile(ctx, d.vdi, "raw", d.raw)
	}
	image := filepath.Join(cfg.scratch, "disk.qcow2") // without the holes
	if err := command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", d.raw, image)(ctx); err != nil {
		return d, err
	}
	return d, errors.Join(s.importFile(ctx, d.vdi, "qcow2", image), os.Remove(image))
}

func (s *server) dropDisk(ctx context.Context, d benchDisk) error {
	return errors.Join(s.destroyVDI(ctx, d.vdi), os.Remove(d.raw))
}

// benchFormats moves a disk without a hole out and in, in each format.
func benchFormats(ctx context.Context, cfg config, srv *server) error {
	return cfg.onDisks(ctx, srv, func(slow bool) (benchDisk, error) {
		size := cfg.dense
		if slow {
			size /= 8
		}
		return srv.newDisk(ctx, cfg, "a full disk of "+bytesText(size), size, size)
	})
}

// benchSparse does the same with a disk of 1 TiB that is nearly empty, but for
// raw, which has no holes.
func benchSparse(ctx context.Context, cfg config, srv *server) error {
	return cfg.onDisks(ctx, srv, func(slow bool) (benchDisk, error) {
		data := cfg.dense / 2
		if slow {
			data = cfg.dense / 8
		}
		return srv.newDisk(ctx, cfg, "a disk of 1 TiB with "+bytesText(data)+" of data", tib, data)
	})
}

// onDisks compares each format on the disks that prepare makes.
func (c config) onDisks(ctx context.Context, srv *server, prepare func(slow bool) (benchDisk, error)) (err error) {
	cfg := c.fewer()
	lim, err := startLimit()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lim.Close()) }()
	for _, slow := range []bool{false, true} {
		d, err := prepare(slow)
		if err != nil {
			return err
		}
		for _, f := range imageFormats {
			if f.slow != slow || f.name == "raw" && d.size != d.data {
				continue
			}
			if err := compareFormat(ctx, cfg, srv, lim, f, d); err != nil {
				return err
			}
		}
		if err := srv.dropDisk(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

// compareFormat moves a disk out, to a file and to a sink, and in again. The
// limit sends and takes the same image.
func compareFormat(ctx context.Context, cfg config, srv *server, lim *limit, f imageFormat, d benchDisk) error {
	image, out := filepath.Join(cfg.scratch, "disk.image"), filepath.Join(cfg.scratch, "out")
	url := srv.exportURL(d.vdi, f.name, "")
	if err := srv.downloadFile(ctx, url, image, nil); err != nil {
		return err
	}
	st, err := os.Stat(image)
	if err != nil {
		return err
	}
	convert := append([]string{"convert", "-f", "raw", "-O", f.qemu}, append(f.args, d.raw, out)...)
	// A digest is remembered, so the disk changes before the next one.
	change := func() error { return srv.touch(ctx, d.vdi) }
	plain, name := map[string]string(nil), "coppice"
	if f.slow { // is chunked, and has a digest unless it is declined
		plain, name = noDigest, "coppice, no digest"
	}
	toFile := []contestant{
		{name, d.data, func(ctx context.Context) error { return srv.downloadFile(ctx, url, out, plain) }, remove(out)},
		{"coppice, with a digest", d.data, func(ctx context.Context) error { return srv.downloadFile(ctx, url, out, aDigest) }, func() error { return errors.Join(os.Remove(out), change()) }},
		{"limit (HTTP + CRC32C, same client)", d.data, func(ctx context.Context) error { return srv.downloadFile(ctx, lim.base+image, out, nil) }, remove(out)},
	}
	toSink := []contestant{
		{name, d.data, func(ctx context.Context) error { return srv.drain(ctx, url, plain) }, nil},
		{"coppice, with a digest", d.data, func(ctx context.Context) error { return srv.drain(ctx, url, aDigest) }, change},
		{"limit (HTTP + CRC32C, same client)", d.data, func(ctx context.Context) error { return srv.drain(ctx, lim.base+image, nil) }, nil},
		{"reading and verifying the same, no network", d.data, func(context.Context) error { return lim.read(image) }, nil},
	}
	if f.name == "raw" {
		toFile = append(toFile, contestant{"nbdcopy raw → raw", d.data, command("nbdcopy", d.raw, out), remove(out)})
		toSink = append(toSink,
			contestant{"nbdcopy raw → nowhere", d.data, command("nbdcopy", d.raw, "null:"), nil},
			contestant{"coppice, zstd, no digest", d.data, func(ctx context.Context) error { return srv.drain(ctx, url, coded("zstd")) }, nil},
			contestant{"coppice, gzip, no digest", d.data, func(ctx context.Context) error { return srv.drain(ctx, url, coded("gzip")) }, nil},
		)
	}
	if f.qemu != "" {
		toFile = append(toFile, contestant{"qemu-img convert raw → " + f.qemu, d.data, command("qemu-img", convert...), remove(out)})
		if !f.slow {
			toSink = append(toSink, contestant{"qemu-img convert raw → " + f.qemu + " file", d.data, command("qemu-img", convert...), remove(out)})
		}
	}
	if err := compare(ctx, cfg, f.name+" export of "+d.name+", to a file", toFile...); err != nil {
		return err
	}
	if err := compare(ctx, cfg, f.name+" export of "+d.name+", to a sink", toSink...); err != nil {
		return err
	}

	var target string
	in := []contestant{
		{"coppice", d.data, func(ctx context.Context) (err error) {
			if target, err = srv.createVDI(ctx, d.size); err != nil {
				return err
			}
			return srv.importFile(ctx, target, f.name, image)
		}, func() error { return srv.destroyVDI(ctx, target) }},
		{"limit (HTTP + CRC32C + fdatasync)", d.data, func(ctx context.Context) error { return srv.uploadFile(ctx, lim.base+out, image) }, remove(out)},
	}
	if f.qemu != "" {
		in = append(in, contestant{
			"qemu-img convert -t writeback " + f.qemu + " → raw", d.data,
			command("qemu-img", "convert", "-t", "writeback", "-f", f.qemu, "-O", "raw", image, out), remove(out),
		})
	}
	if f.name == "raw" {
		in = append(in, contestant{"nbdcopy --flush raw → raw", d.data, command("nbdcopy", "--flush", d.raw, out), remove(out)})
	}
	err = compare(ctx, cfg, fmt.Sprintf("%s import of %s into an empty disk (%d bytes; ours and the limit are on disk at the end)", f.name, d.name, st.Size()), in...)
	return errors.Join(err, os.Remove(image))
}

// benchTablesLast imports a qcow2 image that has been made larger: its first
// table is then behind all of its data, which has to be put aside.
func benchTablesLast(ctx context.Context, cfg config, srv *server) (err error) {
	cfg = cfg.fewer()
	lim, err := startLimit()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lim.Close()) }()
	raw, out := filepath.Join(cfg.scratch, "disk.img"), filepath.Join(cfg.scratch, "out")
	first, last := filepath.Join(cfg.scratch, "first.qcow2"), filepath.Join(cfg.scratch, "last.qcow2")
	if err := makeImage(raw, 1, cfg.dense, cfg.dense); err != nil {
		return err
	}
	size := cfg.dense + 100*gib
	for _, args := range [][]string{
		{"convert", "-f", "raw", "-O", "qcow2", raw, first},
		{"convert", "-f", "raw", "-O", "qcow2", raw, last},
		{"resize", last, strconv.FormatInt(size, 10)},
	} {
		if err := command("qemu-img", args...)(ctx); err != nil {
			return err
		}
	}
	var target string
	in := func(name, image string) contestant {
		return contestant{name, cfg.dense, func(ctx context.Context) (err error) {
			if target, err = srv.createVDI(ctx, size); err != nil {
				return err
			}
			return srv.importFile(ctx, target, "qcow2", image)
		}, func() error { return srv.destroyVDI(ctx, target) }}
	}
	err = compare(ctx, cfg, "qcow2 import of "+bytesText(cfg.dense)+" of data into an empty disk",
		in("coppice, tables last", last),
		in("coppice, tables first", first),
		contestant{"limit (HTTP + CRC32C + fdatasync)", cfg.dense, func(ctx context.Context) error { return srv.uploadFile(ctx, lim.base+out, last) }, remove(out)},
		contestant{
			"qemu-img convert -t writeback qcow2 → raw", cfg.dense,
			command("qemu-img", "convert", "-t", "writeback", "-f", "qcow2", "-O", "raw", last, out), remove(out),
		},
	)
	return errors.Join(err, os.Remove(raw), os.Remove(first), os.Remove(last))
}

// noDigest declines the SHA-256 of a body, aDigest asks for it.
var (
	noDigest = map[string]string{"Want-Content-Digest": "sha-256=0"}
	aDigest  = map[string]string{"Want-Content-Digest": "sha-256=1"}
)

func coded(name string) map[string]string {
	return map[string]string{"Accept-Encoding": name, "Want-Content-Digest": "sha-256=0"}
}

// touch changes the first block of a disk.
func (s *server) touch(ctx context.Context, vdi string) error {
	s.touched++
	le := binary.LittleEndian
	body := le.AppendUint32(le.AppendUint64(nil, 0), block) // a chunk at 0
	body = append(body, bytes.Repeat(le.AppendUint64(nil, s.touched), block/8)...)
	body = append(body, make([]byte, 12)...) // the end
	return s.importFrom(ctx, vdi, "raw&chunked", bytes.NewReader(body), int64(len(body)))
}

// drain GETs url and throws the body away as it came.
func (s *server) drain(ctx context.Context, url string, header map[string]string) error {
	return s.download(ctx, url, io.Discard, header)
}

// bytesText says a number of bytes in the largest unit that divides it.
func bytesText(n int64) string {
	switch {
	case n%tib == 0:
		return strconv.FormatInt(n/tib, 10) + " TiB"
	case n%gib == 0:
		return strconv.FormatInt(n/gib, 10) + " GiB"
	case n%mib == 0:
		return strconv.FormatInt(n/mib, 10) + " MiB"
	}
	return strconv.FormatInt(n, 10) + " bytes"
}
