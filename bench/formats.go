package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
)

// qemuFormats are our formats and what qemu-img calls them and needs.
var qemuFormats = []struct {
	name string
	args []string
}{
	{"qcow2", []string{"-O", "qcow2"}},
	{"vmdk", []string{"-O", "vmdk", "-o", "subformat=streamOptimized"}},
}

// benchFormats moves a 4 GiB disk with 1 GiB of noise out and in, in each
// format but VHD, which has a section of its own.
func benchFormats(ctx context.Context, cfg config, srv *server) (err error) {
	raw, image, out := filepath.Join(cfg.scratch, "disk.img"), filepath.Join(cfg.scratch, "disk.image"), filepath.Join(cfg.scratch, "out")
	if err := makeImage(raw, 1, 4*gib, gib); err != nil {
		return err
	}
	vdi, err := srv.createVDI(ctx, 4*gib)
	if err != nil {
		return err
	}
	if err := srv.importFile(ctx, vdi, "raw", raw); err != nil {
		return err
	}
	lim, err := startLimit()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lim.Close()) }()
	for _, f := range qemuFormats {
		if err := srv.downloadFile(ctx, srv.exportURL(vdi, f.name, ""), image); err != nil {
			return err
		}
		st, err := os.Stat(image)
		if err != nil {
			return err
		}
		if err := srv.resetPeak(); err != nil {
			return err
		}
		convert := append([]string{"convert", "-f", "raw"}, f.args...)
		err = compare(ctx, cfg, f.name+" export of a 4 GiB disk with 1 GiB of data, to a file",
			contestant{"coppice", st.Size(), func(ctx context.Context) error {
				return srv.downloadFile(ctx, srv.exportURL(vdi, f.name, ""), out)
			}, remove(out)},
			contestant{"coppice, to a sink", st.Size(), func(ctx context.Context) error {
				return srv.download(ctx, srv.exportURL(vdi, f.name, ""), io.Discard)
			}, nil},
			contestant{"limit (HTTP + CRC32C, same client)", st.Size(), func(ctx context.Context) error {
				return srv.downloadFile(ctx, lim.base+image, out)
			}, remove(out)},
			contestant{"qemu-img convert", st.Size(), command("qemu-img", append(convert, raw, out)...), remove(out)},
		)
		if err != nil {
			return err
		}
		if err := printPeak(srv); err != nil {
			return err
		}
		var target string
		err = compare(ctx, cfg, f.name+" import of the same file into an empty disk (ours and the limit are on disk at the end)",
			contestant{"coppice", st.Size(), func(ctx context.Context) (err error) {
				if target, err = srv.createVDI(ctx, 4*gib); err != nil {
					return err
				}
				return srv.importFile(ctx, target, f.name, image)
			}, func() error { return srv.destroyVDI(ctx, target) }},
			contestant{"limit (HTTP + CRC32C + fdatasync)", st.Size(), func(ctx context.Context) error {
				return srv.uploadFile(ctx, lim.base+out, image)
			}, remove(out)},
			contestant{"qemu-img convert → raw (-t writeback)", st.Size(), command("qemu-img", "convert", "-t", "writeback", "-f", f.name, "-O", "raw", image, out), remove(out)},
		)
		if err != nil {
			return err
		}
		if err := os.Remove(image); err != nil {
			return err
		}
	}
	sink := func(format, coding string) func(context.Context) error {
		return func(ctx context.Context) error { return srv.drain(ctx, srv.exportURL(vdi, format, ""), coding) }
	}
	err = compare(ctx, cfg, "Export of the same disk to a sink, bytes of the disk's data",
		contestant{"raw (4 GiB)", gib, sink("raw", ""), nil},
		contestant{"raw, zstd", gib, sink("raw", "zstd"), nil},
		contestant{"raw, gzip", gib, sink("raw", "gzip"), nil},
		contestant{"vhd", gib, sink("vhd", ""), nil},
		contestant{"qcow2", gib, sink("qcow2", ""), nil},
		contestant{"tar", gib, sink("tar", ""), nil},
		contestant{"vmdk", gib, sink("vmdk", ""), nil},
	)
	if err != nil {
		return err
	}
	eight := func(ctx context.Context) error {
		errs := make([]error, 8)
		var all sync.WaitGroup
		for i := range errs {
			all.Go(func() { errs[i] = srv.drain(ctx, srv.exportURL(vdi, "qcow2", ""), "") })
		}
		all.Wait()
		return errors.Join(errs...)
	}
	if err := srv.resetPeak(); err != nil {
		return err
	}
	err = compare(ctx, cfg, "qcow2 export to a sink, one client and eight at once",
		contestant{"one", gib, sink("qcow2", ""), nil},
		contestant{"eight", 8 * gib, eight, nil},
	)
	if err != nil {
		return err
	}
	return errors.Join(printPeak(srv), srv.destroyVDI(ctx, vdi), os.Remove(raw))
}

// drain GETs url with a content coding and throws the body away as it came.
func (s *server) drain(ctx context.Context, url, coding string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if coding == "" {
		coding = "identity"
	}
	req.Header.Set("Accept-Encoding", coding)
	req.Header.Set("User-Agent", "coppice-bench") // Go's own name gets no gzip
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && resp.ContentLength >= 0 && n != resp.ContentLength {
		err = fmt.Errorf("%d of %d bytes came", n, resp.ContentLength)
	}
	return err
}
