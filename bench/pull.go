package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
)

// benchPull moves a full disk from one server to another, and then what has
// changed of it, beside what a user would do without vdi-pull: an export into an
// import. The limit receives the same image from a server that does nothing, and
// has it in a file on disk at the end.
func benchPull(ctx context.Context, cfg config, from *server) (err error) {
	cfg = cfg.fewer()
	lim, err := startLimit()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lim.Close()) }()
	there := cfg
	there.scratch = filepath.Join(cfg.scratch, "second")
	if err := os.Mkdir(there.scratch, 0o700); err != nil {
		return err
	}
	to, err := startServer(ctx, there)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.stop(), os.RemoveAll(there.scratch)) }()

	d, err := from.newDisk(ctx, cfg, "", cfg.dense, cfg.dense)
	if err != nil {
		return err
	}
	first, err := from.snapshotVDI(ctx, d.vdi)
	if err != nil {
		return err
	}
	if err := comparePulls(ctx, cfg, lim, from, to, first, d.size); err != nil {
		return err
	}
	changed := cfg.dense / 100 / changedRun * changedRun
	if err := scatterNoise(d.raw, 2, changed, changedRun); err != nil {
		return err
	}
	if err := from.importFile(ctx, d.vdi, "raw", d.raw); err != nil {
		return err
	}
	second, err := from.snapshotVDI(ctx, d.vdi)
	if err != nil {
		return err
	}
	if err := compareDeltaPulls(ctx, cfg, lim, from, to, [2]string{first, second}, d.size); err != nil {
		return err
	}
	return errors.Join(from.destroyVDI(ctx, first), from.destroyVDI(ctx, second), from.dropDisk(ctx, d))
}

// comparePulls moves all of a snapshot to a new disk.
func comparePulls(ctx context.Context, cfg config, lim *limit, from, to *server, snap string, size int64) error {
	for _, format := range []string{"vhd", "raw"} {
		image, out := filepath.Join(cfg.scratch, "disk.image"), filepath.Join(cfg.scratch, "out")
		if err := from.downloadFile(ctx, from.exportURL(snap, format, ""), image, nil); err != nil {
			return err
		}
		var disk string
		pull := func(url string) func(context.Context) error {
			return func(ctx context.Context) (err error) {
				disk, err = to.pull(ctx, from, url, snap, map[string]string{"format": format})
				return err
			}
		}
		dropDisk := func() error { return to.destroyVDI(ctx, disk) }
		err := compare(ctx, cfg, fmt.Sprintf("Pull of a full disk of %s, as %s", bytesText(size), format),
			contestant{"coppice", size, pull(from.base), dropDisk},
			contestant{"coppice, over TLS", size, pull(from.secure), dropDisk},
			contestant{"curl | curl, over HTTP", size, func(ctx context.Context) (err error) {
				if disk, err = to.createVDI(ctx, size); err != nil {
					return err
				}
				return curlOver(from.exportURL(snap, format, ""), to.importURL(disk, format))(ctx)
			}, dropDisk},
			contestant{"limit, to a file", size, func(ctx context.Context) error { return lim.fetch(ctx, from, image, out) }, remove(out)},
		)
		if err := errors.Join(err, os.Remove(image)); err != nil {
			return err
		}
	}
	return nil
}

// compareDeltaPulls brings a disk from one of two snapshots to the other, and
// back, and so on: the difference is as large both ways.
func compareDeltaPulls(ctx context.Context, cfg config, lim *limit, from, to *server, snaps [2]string, size int64) error {
	for _, format := range []string{"vhd", "qcow2"} {
		delta, out := filepath.Join(cfg.scratch, "delta"), filepath.Join(cfg.scratch, "out")
		if err := from.downloadFile(ctx, from.exportURL(snaps[1], format, snaps[0]), delta, nil); err != nil {
			return err
		}
		st, err := os.Stat(delta)
		if err != nil {
			return err
		}
		var disks [2]string // that is pulled to, and the other one
		for i := range disks {
			if disks[i], err = to.pull(ctx, from, from.base, snaps[0], nil); err != nil {
				return err
			}
		}
		var at [2]int // which snapshot each has
		err = compare(ctx, cfg, fmt.Sprintf("Pull of 1 %% of a disk of %s, scattered in runs of 64 KiB (%s: %d MiB)", bytesText(size), format, st.Size()>>20),
			contestant{"coppice", st.Size(), func(ctx context.Context) error {
				at[0] = 1 - at[0]
				_, err := to.pull(ctx, from, from.base, snaps[at[0]], map[string]string{"format": format, "vdi": disks[0]})
				return err
			}, nil},
			contestant{"curl | curl", st.Size(), func(ctx context.Context) error {
				was := at[1]
				at[1] = 1 - was
				return curlOver(from.exportURL(snaps[at[1]], format, snaps[was]), to.importURL(disks[1], format))(ctx)
			}, nil},
			contestant{"limit, the same bytes to a file", st.Size(), func(ctx context.Context) error { return lim.fetch(ctx, from, delta, out) }, remove(out)},
		)
		if err := errors.Join(err, to.destroyVDI(ctx, disks[0]), to.destroyVDI(ctx, disks[1]), os.Remove(delta)); err != nil {
			return err
		}
	}
	return nil
}

// pull makes a disk of a VDI of another server, at a URL of that one, or brings
// one up to date as args say. It returns its reference.
func (s *server) pull(ctx context.Context, from *server, url, vdi string, args map[string]string) (ref string, err error) {
	all := map[string]string{
		"remote-url": url, "remote-session": from.session, "remote-vdi": vdi, "remote-insecure": "true", "sr": s.sr,
	}
	maps.Copy(all, args)
	if all["vdi"] != "" {
		delete(all, "sr")
	}
	var hosts []string
	if err := s.call(ctx, &hosts, "host.get_all", s.session); err != nil {
		return "", err
	}
	var answer string
	if err := s.call(ctx, &answer, "host.call_plugin", s.session, hosts[0], "coppice", "vdi-pull", all); err != nil {
		return "", err
	}
	_, uuid, ok := strings.Cut(answer, `"vdi":"`)
	uuid, _, _ = strings.Cut(uuid, `"`)
	if !ok {
		return "", fmt.Errorf("vdi-pull says %s", answer)
	}
	return ref, s.call(ctx, &ref, "VDI.get_by_uuid", s.session, uuid)
}

func (s *server) importURL(vdi, format string) string {
	return s.base + "/import_raw_vdi?session_id=" + s.session + "&vdi=" + vdi + "&format=" + format
}

// curlOver is what a user would type to send what one URL has to another.
func curlOver(from, to string) func(context.Context) error {
	return command("bash", "-o", "pipefail", "-c", "curl -sSf '"+from+"' | curl -sSf -T - '"+to+"'")
}
