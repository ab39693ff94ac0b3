package api

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// What is known to be damaged is in the records, where clients see it without
// asking: in sm_config of each disk and of its SR. It comes from reads as they
// meet it, and from scrubs, which also take back what has been made good.
const (
	// damagedKey holds, of a disk, the ranges that cannot be read as
	// "offset+length" in bytes, of an SR, the number of such disks.
	damagedKey = "coppice:damaged"
	// brokenKey counts, of an SR, problems that are not of any disk.
	brokenKey = "coppice:damaged-metadata"
	// scrubbedKey tells when the last complete scrub of an SR ended.
	scrubbedKey = "coppice:scrubbed"

	damageAlert    = "COPPICE_DISK_DAMAGED"
	brokenAlert    = "COPPICE_SR_DAMAGED"
	damagePriority = 1

	mostRanges   = 32   // listed of one disk
	mostProblems = 1000 // in the answer of a scrub
)

// damageRange is a part of a disk that cannot be read, in bytes.
type damageRange struct{ off, n int64 }

// joinRanges sorts ranges and joins those that touch.
func joinRanges(rs []damageRange) []damageRange {
	slices.SortFunc(rs, func(a, b damageRange) int { return cmp.Compare(a.off, b.off) })
	out := rs[:0]
	for _, r := range rs {
		if k := len(out) - 1; k >= 0 && r.off <= out[k].off+out[k].n {
			out[k].n = max(out[k].n, r.off+r.n-out[k].off)
			continue
		}
		out = append(out, r)
	}
	return out
}

// formatRanges writes the first ranges of a disk as damagedKey has them.
func formatRanges(rs []damageRange) string {
	text := make([]string, 0, len(rs))
	for _, r := range rs[:min(len(rs), mostRanges)] {
		text = append(text, fmt.Sprintf("%d+%d", r.off, r.n))
	}
	return strings.Join(text, " ")
}

// parseRanges reads what formatRanges wrote; what is no range is left out.
func parseRanges(s string) (rs []damageRange) {
	for f := range strings.FieldsSeq(s) {
		off, n, ok := strings.Cut(f, "+")
		r := damageRange{}
		var errs [2]error
		r.off, errs[0] = strconv.ParseInt(off, 10, 64)
		r.n, errs[1] = strconv.ParseInt(n, 10, 64)
		if ok && errors.Join(errs[:]...) == nil {
			rs = append(rs, r)
		}
	}
	return rs
}

// damage is what is known of one SR.
type damage struct {
	disks  map[storage.ID][]damageRange
	broken int // problems of no disk
}

func damageOf(problems []storage.Problem) damage {
	d := damage{disks: map[storage.ID][]damageRange{}}
	for _, p := range problems {
		if p.Volume == "" {
			d.broken++
			continue
		}
		d.disks[p.Volume] = append(d.disks[p.Volume], damageRange{p.Off, max(p.Len, storage.Unit)})
	}
	return d
}

// text is what damagedKey says of a disk, was what it has said so far. Only a
// complete scrub takes ranges back.
func (d damage) text(v *xapi.VDI, complete bool) string {
	rs := slices.Clone(d.disks[storage.ID(v.UUID)])
	if was := v.SMConfig[damagedKey]; !complete && was != "" {
		rs = append(rs, parseRanges(was)...)
	}
	for i := range rs {
		rs[i].n = min(rs[i].n, max(0, v.VirtualSize-rs[i].off))
	}
	return formatRanges(joinRanges(rs))
}

// noteDamage brings the records of an SR in line with what its storage knows,
// and raises an alert for each disk that was whole before. complete says that
// all of the storage has just been looked at.
func (a *API) noteDamage(ctx context.Context, repo *repository, complete bool) error {
	l, ok := repo.Repo.(storage.DamageLister)
	if !ok {
		return nil
	}
	problems, err := l.Damage(ctx)
	if err != nil || len(problems) == 0 && !complete {
		return err
	}
	d := damageOf(problems)
	stale := complete
	err = a.db.View(func(tx *db.Tx) error {
		sr, err := db.Get(tx, repo.sr)
		if err != nil {
			return err
		}
		stale = stale || d.broken > 0 && sr.SMConfig[brokenKey] == ""
		for id := range d.disks {
			_, v, err := db.ByUUID[xapi.VDI](tx, string(id))
			stale = stale || err == nil && v.SR == repo.sr && d.text(v, false) != v.SMConfig[damagedKey]
		}
		return nil
	})
	if err != nil || !stale {
		return err
	}
	return a.db.Update(ctx, func(tx *db.Tx) error { return a.recordDamage(tx, repo.sr, d, complete) })
}

func (a *API) recordDamage(tx *db.Tx, ref xapi.Ref[xapi.SR], d damage, complete bool) error {
	sr, err := db.Get(tx, ref)
	if err != nil {
		return err
	}
	damaged := 0
	for _, ref := range sr.VDIs {
		v, err := db.Get(tx, ref)
		if err != nil {
			continue
		}
		text, was := d.text(v, complete), v.SMConfig[damagedKey]
		if text != "" {
			damaged++
		}
		if text == was {
			continue
		}
		if was == "" {
			a.log.Error("a disk is damaged", "vdi", v.UUID, "name", v.NameLabel, "ranges", text)
			body := fmt.Sprintf("%s cannot be read at (offset+length in bytes): %s", v.NameLabel, text)
			if _, err := a.addMessage(tx, damageAlert, damagePriority, xapi.ClsVDI, v.UUID, body); err != nil {
				return err
			}
		}
		if err := db.Modify(tx, ref, func(v *xapi.VDI) { setOrDelete(v.SMConfig, damagedKey, text) }); err != nil {
			return err
		}
	}
	if d.broken > 0 && sr.SMConfig[brokenKey] == "" {
		a.log.Error("metadata of an SR is damaged", "sr", sr.UUID, "problems", d.broken)
		body := fmt.Sprintf("%d parts of the storage of %s that are no disk's are damaged", d.broken, sr.NameLabel)
		if _, err := a.addMessage(tx, brokenAlert, damagePriority, xapi.ClsSR, sr.UUID, body); err != nil {
			return err
		}
	}
	return db.Modify(tx, ref, func(sr *xapi.SR) {
		setOrDelete(sr.SMConfig, damagedKey, countText(damaged))
		if complete || d.broken > 0 {
			setOrDelete(sr.SMConfig, brokenKey, countText(d.broken))
		}
		if complete {
			sr.SMConfig[scrubbedKey] = a.now().Format(time.RFC3339)
		}
	})
}

// countText is a number, "" for none.
func countText(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

// setOrDelete sets a key, or deletes it when the value is empty.
func setOrDelete(m map[string]string, key, value string) {
	if value == "" {
		delete(m, key)
	} else {
		m[key] = value
	}
}

// verifyKnown reads where damage of a disk is known, so that whoever is going
// to read all of it fails before the first byte. What has been written anew
// since is no damage any more.
func (d *openDisk) verifyKnown(ctx context.Context) error {
	l, ok := d.repo.Repo.(storage.DamageLister)
	if !ok {
		return nil
	}
	problems, err := l.Damage(ctx)
	if err != nil {
		return fmt.Errorf("known damage of VDI %s: %w", d.rec.UUID, err)
	}
	for _, p := range problems {
		if p.Volume != storage.ID(d.rec.UUID) || p.Off >= d.Size() {
			continue
		}
		if err := storage.ReadFull(d, make([]byte, min(storage.Unit, d.Size()-p.Off)), p.Off); err != nil {
			return fmt.Errorf("read VDI %s: %w", d.rec.UUID, err)
		}
	}
	return nil
}

// scrubReport is the answer of the plugin function sr-scrub.
type scrubReport struct {
	SR       string         `json:"sr"` // uuid
	Problems []scrubProblem `json:"problems"`
	More     int            `json:"more"` // problems that are not listed
}

type scrubProblem struct {
	VDI    string `json:"vdi,omitempty"` // uuid
	Offset int64  `json:"offset"`        // bytes
	Length int64  `json:"length"`        // bytes, 0 when that is not known
	Detail string `json:"detail"`
	Done   string `json:"done,omitempty"` // what has been done to make it good
}

// pluginScrub verifies all of the storage of the SR whose uuid is sr, at most
// rate bytes per second, and answers what it found, in JSON. It tells its
// progress and can be cancelled; a scrub that is cut short changes nothing. One
// runs per SR at a time, beside everything else.
func (a *API) pluginScrub(ctx context.Context, c *Call, args map[string]string) (string, error) {
	rate, err := pluginNumber(args, "rate")
	if err != nil {
		return "", err
	}
	repo, drop, err := a.pluginSR(c, args, "sr-scrub")
	if err != nil {
		return "", err
	}
	defer drop()
	s, ok := repo.Repo.(storage.Scrubber)
	if !ok {
		return "", xapi.NewError(xapi.ErrSROperationNotSupported, string(repo.sr))
	}
	report := scrubReport{SR: args["sr"], Problems: []scrubProblem{}}
	for p, err := range s.Scrub(ctx, storage.ScrubOptions{BytesPerSecond: rate, Progress: c.Progress}) {
		if err != nil {
			return "", fmt.Errorf("scrub SR %s: %w", repo.sr, err)
		}
		if len(report.Problems) >= mostProblems {
			report.More++
			continue
		}
		report.Problems = append(report.Problems, scrubProblem{string(p.Volume), p.Off, p.Len, p.Detail, p.Done})
	}
	if err := a.noteDamage(ctx, repo, true); err != nil {
		return "", err
	}
	return toJSON(report)
}

// pluginSR finds the attached SR whose uuid is the argument sr, and keeps it
// attached until drop is called. A second call of the same function waits for
// nothing and is OTHER_OPERATION_IN_PROGRESS.
func (a *API) pluginSR(c *Call, args map[string]string, fn string) (repo *repository, drop func(), err error) {
	var ref xapi.Ref[xapi.SR]
	err = a.db.View(func(tx *db.Tx) (err error) {
		ref, _, err = db.ByUUID[xapi.SR](tx, args["sr"])
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	if repo, err = a.repos.get(ref); err != nil {
		return nil, nil, err
	}
	done, other := repo.alone(fn, c.Task())
	if other != "" {
		return nil, nil, otherOperation("SR", string(ref), fn, string(other))
	}
	release := repo.hold()
	return repo, func() { release(); done() }, nil
}

// pluginNumber reads an argument that is a number of at least 0, which is what
// a missing one is.
func pluginNumber(args map[string]string, key string) (int64, error) {
	if args[key] == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(args[key], 10, 64)
	if err != nil || n < 0 {
		return 0, invalidValue(key, args[key])
	}
	return n, nil
}

func toJSON(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}
