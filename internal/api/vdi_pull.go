package api

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// Sources reaches other servers that speak XenAPI. Its errors are what clients
// are told.
type Sources interface {
	// Connect logs in to a server.
	Connect(ctx context.Context, s Source) (SourceSession, error)
}

// Source is a server that a disk is pulled from, and how it is recognised.
type Source struct {
	URL            string
	User, Password string
	Session        string // instead of the two
	Fingerprints   string // SHA-256 of certificates, with commas
	CA             string // PEM of certificates
	Insecure       bool   // whoever answers
}

// SourceSession is a session with a server. Close ends it.
type SourceSession interface {
	// Disk looks a VDI up by its uuid or reference.
	Disk(ctx context.Context, vdi string) (SourceDisk, error)
	// Fetch writes the contents of a VDI to a volume, all of them, or has
	// failed; it returns how many bytes came. It is called once.
	Fetch(ctx context.Context, f Fetch) (received int64, err error)
	// Close may take a moment, but not when ctx has ended.
	Close(ctx context.Context)
}

// SourceDisk is a VDI of a server.
type SourceDisk struct {
	UUID, Label, Description string
	Size                     int64 // bytes
	Snapshot                 bool  // so its contents stay what they are
}

// Fetch says what is wanted of a server and where it goes.
type Fetch struct {
	VDI    string // uuid
	Size   int64  // of it, bytes
	Base   string // uuid of a VDI there whose contents the volume has; "" when the volume is empty
	Format string

	Volume   storage.Volume
	Scratch  func(size int64) (storage.Volume, *storage.CloneBatch, error)
	Progress func(done, total int64)
}

// pullFormats are the formats in which disks are pulled, the usual one first,
// and whether they have deltas that can be told from the whole.
var pullFormats = []struct {
	name   string
	deltas bool
}{{"vhd", true}, {"raw", false}, {"qcow2", true}}

// pull is the pull of a disk from another server.
type pull struct {
	source Source
	remote string // the VDI there, uuid or reference
	vdi    string // the disk here, reference or uuid; "" makes one
	sr     string // where it is made; "" for the pool's default
	format string
	deltas bool // the format has them
	full   bool // replace all contents of vdi, whatever they are

	disk SourceDisk
	base pulled // what vdi has and the source too, zero for nothing
}

// parsePull reads the arguments of vdi-pull.
func parsePull(args map[string]string) (*pull, error) {
	p := &pull{}
	texts := map[string]*string{
		"remote-url": &p.source.URL, "remote-username": &p.source.User, "remote-password": &p.source.Password,
		"remote-session": &p.source.Session, "remote-fingerprint": &p.source.Fingerprints, "remote-ca": &p.source.CA,
		"remote-vdi": &p.remote, "vdi": &p.vdi, "sr": &p.sr, "format": &p.format,
	}
	flags := map[string]*bool{"remote-insecure": &p.source.Insecure, "full": &p.full}
	for key, value := range args {
		if text, ok := texts[key]; ok {
			*text = value
			continue
		}
		flag, ok := flags[key]
		if !ok {
			return nil, invalidValue("args", key) // its value may be a password
		}
		if value != "true" && value != "false" {
			return nil, invalidValue(key, value)
		}
		*flag = value == "true"
	}
	for _, key := range []string{"remote-url", "remote-vdi"} {
		if *texts[key] == "" {
			return nil, invalidValue(key, "")
		}
	}
	switch {
	case p.vdi != "" && p.sr != "":
		return nil, invalidValue("sr", p.sr)
	case p.vdi == "" && p.full:
		return nil, invalidValue("full", "true")
	}
	if p.format == "" {
		p.format = pullFormats[0].name
	}
	for _, f := range pullFormats {
		if strings.EqualFold(f.name, p.format) {
			p.format, p.deltas = f.name, f.deltas
			return p, nil
		}
	}
	return nil, invalidValue("format", p.format)
}

// pluginPull makes a disk of one of another server, or brings one that was
// made so up to date with what has changed there since: see doc/extensions.md.
// The contents appear at one instant, when all have come; a failure, a
// cancellation and a crash leave nothing.
func (a *API) pluginPull(ctx context.Context, c *Call, args map[string]string) (string, error) {
	p, err := parsePull(args)
	if err != nil {
		return "", err
	}
	if a.cfg.Sources == nil {
		return "", xapi.NewError(xapi.ErrNotImplemented, "vdi-pull")
	}
	if err := a.checkPull(p); err != nil {
		return "", err
	}
	src, err := a.cfg.Sources.Connect(ctx, p.source)
	if err != nil {
		return "", err
	}
	// Nobody waits for the other side to take note.
	defer a.background.Go(func() { src.Close(a.ctx) })
	if p.disk, err = src.Disk(ctx, p.remote); err != nil {
		return "", err
	}
	x := &Import{Task: c.Task(), Ref: xapi.NullRef, call: c}
	if err := a.openPull(x, p); err != nil {
		return "", err
	}
	received := int64(0)
	if p.base.source != p.disk.UUID {
		received, err = src.Fetch(ctx, Fetch{
			VDI: p.disk.UUID, Size: p.disk.Size, Base: p.base.source, Format: p.format,
			Volume: x.Volume, Scratch: x.Scratch, Progress: c.Progress,
		})
	}
	ref, err := x.end(err)
	a.syncAttrs(context.WithoutCancel(ctx), ref) // what failed may have come after the commit
	if err != nil {
		return "", err
	}
	answer, err := json.Marshal(map[string]any{
		"vdi": x.VDI.UUID, "source": p.disk.UUID, "base": p.base.source, "bytes": received, "snapshot": p.disk.Snapshot,
	})
	return string(answer), err
}

// checkPull refuses, before another server hears of it, what cannot work here.
func (a *API) checkPull(p *pull) error {
	if p.vdi == "" {
		_, err := a.targetSR(VMImportRequest{SR: p.sr})
		return err
	}
	ref, err := a.findDisk(p.vdi)
	if err != nil {
		return err
	}
	return a.db.View(func(tx *db.Tx) error {
		if err := a.vdiWritable(tx, ref, importOp); err != nil {
			return err
		}
		v, err := db.Get(tx, ref)
		if err == nil && !p.full && len(pulledOf(v)) == 0 {
			err = notPulled(v)
		}
		return err
	})
}

// openPull opens what a pull writes to: a new disk, or a shadow of the one
// that is brought up to date.
func (a *API) openPull(x *Import, p *pull) (err error) {
	size, err := diskSize(p.disk.Size)
	if err != nil {
		return err
	}
	if p.vdi == "" {
		rec := xapi.New[xapi.VDI]()
		rec.Type, rec.NameLabel, rec.NameDescription, rec.VirtualSize = xapi.VDITypeUser, p.disk.Label, p.disk.Description, size
		if rec.SR, err = a.targetSR(VMImportRequest{SR: p.sr}); err != nil {
			return err
		}
		x.sealed = func(ctx context.Context) error {
			version, err := versionOf(ctx, x.dst.repo, storage.ID(rec.UUID))
			p.note(rec, version)
			return err
		}
		return a.openNew(x, rec)
	}
	ref, err := a.findDisk(p.vdi)
	if err != nil {
		return err
	}
	if x.dst, err = a.openWriter(x.call.Context(), x.call, ref, importOp); err != nil {
		return err
	}
	x.Ref, x.VDI, x.Volume, x.Repo = ref, x.dst.rec, x.dst.Volume, x.dst.repo.Repo
	if err := a.shadowPull(x, p, size); err != nil {
		_, err = x.end(err)
		return err
	}
	x.sealed = func(ctx context.Context) error { return a.notePull(ctx, x, p) }
	return nil
}

// shadowPull makes the shadow of an existing disk that a pull writes to: what
// the disk has, when that is known to be a base at the source, or nothing.
func (a *API) shadowPull(x *Import, p *pull, size int64) error {
	ctx := x.call.Context()
	if p.full {
		return x.replace(size)
	}
	version, err := versionOf(ctx, x.dst.repo, storage.ID(x.VDI.UUID))
	if err != nil {
		return err
	}
	all := pulledOf(x.VDI)
	i := slices.IndexFunc(all, func(b pulled) bool { return b.version == version })
	switch {
	case i < 0:
		return notPulled(x.VDI)
	case !p.deltas:
		return invalidValue("format", p.format)
	}
	p.base = all[i]
	if err := x.Shadow(); err != nil || x.Volume.Size() == size {
		return err
	}
	resizer, ok := x.Repo.(storage.Resizer)
	if !ok {
		return xapi.NewError(xapi.ErrSROperationNotSupported, string(x.VDI.SR))
	}
	if _, err := resizer.Resize(ctx, x.shadow.id, size); err != nil {
		return fmt.Errorf("resize the shadow of VDI %s: %w", x.VDI.UUID, err)
	}
	return nil
}

// notPulled refuses a delta onto a disk that is not known to be its base.
func notPulled(v *xapi.VDI) error {
	return xapi.NewError(xapi.ErrOperationNotAllowed, fmt.Sprintf(
		"VDI %s is not what was pulled of a snapshot: it has been changed since, or never was. full=true replaces all of its contents.", v.UUID))
}

// notePull notes what the disk is going to have, just before it has it. What
// it has until then stays noted, so that a crash leaves the one or the other.
func (a *API) notePull(ctx context.Context, x *Import, p *pull) error {
	version, err := versionOf(ctx, x.dst.repo, x.shadow.id)
	if err != nil {
		return err
	}
	return a.db.Update(ctx, func(tx *db.Tx) error {
		return db.Modify(tx, x.Ref, func(v *xapi.VDI) {
			delete(v.OtherConfig, receivedKey)
			p.note(v, version)
		})
	})
}

// versionOf names the contents of a volume, durably; "" when the driver cannot.
func versionOf(ctx context.Context, repo *repository, id storage.ID) (string, error) {
	pin, err := repo.Open(ctx, id, storage.Pinned)
	if err != nil {
		return "", fmt.Errorf("open VDI %s: %w", id, err)
	}
	defer func() { _ = pin.Close() }() // nothing was written
	named, ok := pin.(storage.Versioned)
	if !ok {
		return "", nil
	}
	version, err := named.Version(ctx)
	if err != nil {
		return "", fmt.Errorf("version of VDI %s: %w", id, err)
	}
	return version, nil
}

// pullKey is the key in the other_config of a disk that says which snapshot of
// another server it equals: the uuid of that, the disk's own, so that the entry
// means nothing in a copy of the record, and the version of the contents for
// which it is so. There may be two, with a comma: those of the last pull and of
// the one before, of which the disk has one.
const pullKey = "coppice:pull-base"

// pulled is an equality of a snapshot at a source and of contents here.
type pulled struct {
	source  string // uuid
	version string // see storage.Versioned
}

// pulledOf reads what is noted in the record of a disk about it.
func pulledOf(v *xapi.VDI) (all []pulled) {
	for part := range strings.SplitSeq(v.OtherConfig[pullKey], ",") {
		if f := strings.Fields(part); len(f) == 3 && f[1] == v.UUID {
			all = append(all, pulled{source: f[0], version: f[2]})
		}
	}
	return all
}

// note puts into a record what the disk equals when it has the version. A disk
// that may change at the source is nothing to be equal to.
func (p *pull) note(v *xapi.VDI, version string) {
	all := []string{}
	if p.disk.Snapshot && version != "" {
		all = append(all, p.disk.UUID+" "+v.UUID+" "+version)
	}
	if p.base.version != "" && p.base.version != version {
		all = append(all, p.base.source+" "+v.UUID+" "+p.base.version)
	}
	if v.OtherConfig == nil {
		v.OtherConfig = map[string]string{}
	}
	setOrDelete(v.OtherConfig, pullKey, strings.Join(all, ", "))
}
