package server

import (
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An audit log is the file that is written, and before it what a rotation has
// renamed away, as logrotate does without dateext: FILE.1, FILE.2.gz and so on,
// the higher the older.

// auditLogs are the files of an audit log, opened, the oldest first.
type auditLogs []*auditPart

// auditPart is one file of an audit log, and what is wanted of its text.
type auditPart struct {
	*os.File
	gzip     bool
	from, to int64 // of the text, set by since
}

// auditTries is how often the files are opened anew because they were renamed meanwhile.
const auditTries = 10

// openAuditLogs opens all files of the log at a path as they are at one instant:
// a rotation meanwhile neither hides one nor shows it twice.
func openAuditLogs(path string) (logs auditLogs, err error) {
	for range auditTries {
		logs, err = tryAuditLogs(path)
		if err == nil {
			var again auditLogs
			again, err = tryAuditLogs(path)
			same := err == nil && slices.EqualFunc(logs, again, func(a, b *auditPart) bool { return a.same(b) })
			err = errors.Join(err, again.Close())
			if same && err == nil {
				return logs, nil
			}
			err = errors.Join(err, logs.Close())
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return nil, cmp.Or(err, errors.New("it is being rotated all the time"))
}

// tryAuditLogs opens the files that there are. One that is gone until it is
// opened is fs.ErrNotExist; only that which is written may be missing, when it
// has just been renamed.
func tryAuditLogs(path string) (logs auditLogs, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, logs.Close())
			logs = nil
		}
	}()
	names, err := rotatedNames(path)
	if err != nil {
		return nil, err
	}
	for _, name := range append(names, path) {
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) && name == path && len(names) > 0 {
			break
		}
		if err != nil {
			return logs, err
		}
		logs = append(logs, &auditPart{File: f, gzip: name != path && strings.HasSuffix(name, ".gz")})
	}
	return logs, nil
}

// rotatedNames are the files that a rotation has made of that of a path, the
// oldest first. Of one that is being compressed it is the plain one.
func rotatedNames(path string) (names []string, err error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	byAge := map[int]string{}
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), filepath.Base(path)+".")
		number := strings.TrimSuffix(rest, ".gz")
		n, err := strconv.Atoi(number)
		if !ok || err != nil || n < 0 || strconv.Itoa(n) != number || !e.Type().IsRegular() || rest != number && byAge[n] != "" {
			continue
		}
		byAge[n] = filepath.Join(filepath.Dir(path), e.Name())
	}
	ages := make([]int, 0, len(byAge))
	for n := range byAge {
		ages = append(ages, n)
	}
	slices.Sort(ages)
	for _, n := range slices.Backward(ages) {
		names = append(names, byAge[n])
	}
	return names, nil
}

// same tells whether two are the same file.
func (p *auditPart) same(q *auditPart) bool {
	a, err := p.Stat()
	b, other := q.Stat()
	return err == nil && other == nil && os.SameFile(a, b)
}

// since leaves out what was written before a time, and fixes how much there is
// from there: that is returned, in bytes. For a time, and in what is compressed,
// it is read for that: from the newest file back, until one has something older.
func (l auditLogs) since(ctx context.Context, since time.Time) (length int64, err error) {
	older := false
	for _, p := range slices.Backward(l) {
		if older {
			p.from, p.to = 0, 0
			continue
		}
		if err := p.measure(ctx, since); err != nil {
			return 0, p.fault(err)
		}
		length += p.to - p.from
		older = p.from > 0
	}
	return length, nil
}

// measure finds where the first entry begins that is not older than a time, and the end.
func (p *auditPart) measure(ctx context.Context, since time.Time) error {
	info, err := p.Stat()
	if err != nil {
		return err
	}
	p.from, p.to = 0, info.Size()
	if !p.gzip && since.IsZero() {
		return nil
	}
	text, err := p.text()
	if err != nil {
		return err
	}
	if !since.IsZero() {
		if p.from, err = entriesSince(ctx, text, since); err != nil || !p.gzip {
			return err
		}
		if text, err = p.text(); err != nil {
			return err
		}
	}
	p.to, err = io.Copy(io.Discard, readUntil{ctx, text})
	return err
}

// text reads a file from its beginning.
func (p *auditPart) text() (io.Reader, error) {
	if !p.gzip {
		return io.NewSectionReader(p, 0, p.to), nil
	}
	return gzip.NewReader(io.NewSectionReader(p, 0, math.MaxInt64))
}

// send writes what is wanted, exactly as much as since said.
func (l auditLogs) send(ctx context.Context, w io.Writer) error {
	for _, p := range l {
		if p.from == p.to {
			continue
		}
		text, err := p.text()
		if err == nil {
			_, err = io.CopyN(io.Discard, readUntil{ctx, text}, p.from)
		}
		if err == nil {
			_, err = io.CopyN(w, readUntil{ctx, text}, p.to-p.from)
		}
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("it has become shorter: %w", io.ErrUnexpectedEOF)
		}
		if err != nil {
			return p.fault(err)
		}
	}
	return nil
}

// fault says of which file an error is.
func (p *auditPart) fault(err error) error {
	return fmt.Errorf("audit log: %s: %w", filepath.Base(p.Name()), err)
}

// Close closes all files, which were only read.
func (l auditLogs) Close() error {
	var errs []error
	for _, p := range l {
		errs = append(errs, p.File.Close())
	}
	return errors.Join(errs...)
}

// readUntil reads until a context is done.
type readUntil struct {
	ctx context.Context
	r   io.Reader
}

func (r readUntil) Read(p []byte) (int, error) {
	if err := context.Cause(r.ctx); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}
