// Package event tells what happens to the objects of a database: all that the messages of class event are about. It
// hides that nothing is ever stored of an event, how tokens are made, and that those who wait for the same share the
// work and the answer. It knows nothing of sessions and calls: whoever waits, waits for as long as a context lasts.
//
// Every object of the database carries the revisions at which it was created
// and last modified, and deletions leave a bounded number of tombstones: a call
// asks for what is stamped after a revision, and waits for the next commit when
// there is nothing. A token is a revision. Clients that are slow get the latest
// state once instead of every step; a deletion whose tombstone is gone shows in
// valid_ref_counts. Over a restart, revisions are kept as far as the history of
// the database goes; an older token is answered as if it were the first.
package event

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

const (
	// calmPause is how long nothing must follow the commit that woke a waiting
	// call before the call answers, and fullPause how long it collects at most
	// what does follow: of many changes in a row clients hear as often as they
	// can bear. A change that was alone for calmPause before is told after
	// briefPause, in which whoever made it gets his own answer: behind those of
	// hundreds of watchers it would be late.
	briefPause = 500 * time.Microsecond
	calmPause  = 2 * time.Millisecond
	fullPause  = 50 * time.Millisecond
	// longestWait bounds the timeout of a client.
	longestWait = 24 * time.Hour
)

// errTimeout is the cause with which the time of a call runs out.
var errTimeout = errors.New("event: none in time")

// Feed tells what happens in a database. It is safe for concurrent use.
type Feed struct {
	db    *db.DB
	model *xapi.Model
	now   func() time.Time

	watchers watchers
}

// New makes the feed of a database; now is the clock of the timestamps of Next.
func New(d *db.DB, m *xapi.Model, now func() time.Time) *Feed {
	f := &Feed{db: d, model: m, now: now}
	f.watchers.init()
	return f
}

// From returns what happened after a token, "" for the beginning of time, and
// waits for something to happen for as long as timeout, in seconds, allows: then
// there is a batch without events. Classes are "*", "class" or "class/ref". The
// error is EVENT_SUBSCRIPTION_PARSE_FAILURE, EVENT_FROM_TOKEN_PARSE_FAILURE, or
// the cause for which ctx ended when there was nothing to tell by then.
func (f *Feed) From(ctx context.Context, classes []string, token string, timeout float64) (*Answer, error) {
	subs, err := f.subscriptions(classes)
	if err != nil {
		return nil, err
	}
	from, err := parseToken(token)
	if err != nil {
		return nil, err
	}
	wait := longestWait
	if d := timeout * float64(time.Second); d < float64(wait) {
		wait = max(time.Duration(d), 0)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, wait, errTimeout)
	defer cancel()

	for {
		q := question{subs: subscriptionKey(subs)}
		var told *Answer
		_ = f.db.View(func(tx *db.Tx) error {
			q.after = f.db.Since(tx, from)
			last, even := tx.LastChange(classesOf(subs)...), ctx.Err() != nil
			if q.after < last || even {
				told = f.answer(tx, subs, q, even)
			}
			if told == nil {
				from, q.after = tx.Position(), last // up to there nothing is of interest
			}
			return nil
		})
		if told == nil {
			told = f.awaitAnswer(ctx, subs, q)
		} else if cause := context.Cause(ctx); len(told.Batch.Events) == 0 && cause != errTimeout {
			return nil, cause
		}
		if told != nil {
			return told, nil
		}
	}
}

// awaitChange waits until something that subs may be about has changed after a
// revision, and then a little for what comes with it, or until ctx is done.
func (f *Feed) awaitChange(ctx context.Context, subs []subscription, seen uint64) {
	if len(subs) == 0 {
		<-ctx.Done()
		return
	}
	classes := classesOf(subs)
	begun := time.Now()
	if f.db.Wait(ctx, seen, classes...) != nil {
		return
	}
	pause := calmPause
	if time.Since(begun) >= calmPause {
		pause = briefPause
	}
	ctx, cancel := context.WithTimeout(ctx, fullPause)
	defer cancel()
	for more := true; more; {
		quiet, cancel := context.WithTimeout(ctx, pause)
		more = f.db.Wait(quiet, f.db.Revision(), classes...) == nil
		cancel()
	}
}

// Inject makes an object look modified and returns a token that precedes
// that, so that From with it returns at once. HANDLE_INVALID when the class has
// no such object.
func (f *Feed) Inject(ctx context.Context, class, ref string) (string, error) {
	var before db.Position
	err := f.db.Update(ctx, func(tx *db.Tx) error {
		actual, ok := tx.ClassOf(ref)
		if !ok || actual.Name != class {
			return xapi.NewError(xapi.ErrHandleInvalid, class, ref)
		}
		before = tx.Position()
		return tx.Touch(actual, ref)
	})
	if err != nil {
		return "", err
	}
	return formatToken(before), nil
}

// formatToken makes a token of a position. Upstream's has two numbers as well,
// but there one is for messages.
func formatToken(p db.Position) string { return fmt.Sprintf("%020d,%020d", p.Revision, p.Lasting) }

// parseToken is the reverse of formatToken; "" is the beginning of time.
func parseToken(token string) (p db.Position, err error) {
	if token == "" {
		return p, nil
	}
	first, second, ok := strings.Cut(token, ",")
	revision, err := strconv.ParseUint(first, 10, 64)
	lasting, also := strconv.ParseUint(second, 10, 64)
	if !ok || err != nil || also != nil {
		return p, xapi.NewError(xapi.ErrEventFromTokenParseFailure, token)
	}
	return db.Position{Revision: revision, Lasting: lasting}, nil
}

// changes returns what happened to the objects of subs after a revision: adds,
// then modifications, then deletions, each object once and as it is now.
// complete is false when deletions may be missing.
func (f *Feed) changes(tx *db.Tx, subs []subscription, after uint64) (events []*xapi.Event, complete bool) {
	var mods, dels []*xapi.Event
	complete = true
	for _, class := range f.model.Ordered {
		if !class.Events || !wants(subs, class, "") {
			continue
		}
		seq, whole := tx.Changes(class, after)
		complete = complete && whole
		for ch := range seq {
			if !wants(subs, class, ch.Ref) {
				continue
			}
			ev := &xapi.Event{ID: int64(ch.Modified), Class: strings.ToLower(class.Name), Ref: ch.Ref, Snapshot: ch.Rec}
			switch {
			case ch.Deleted && (ch.Created > after || after == 0):
				// It came and went unseen.
			case ch.Deleted:
				ev.Operation, ev.Snapshot = xapi.EventOperationDel, nil
				dels = append(dels, ev)
			case ch.Created > after || after == 0:
				ev.Operation = xapi.EventOperationAdd
				events = append(events, ev)
			case class.Name == "message":
				// Messages come and go but do not change.
			default:
				ev.Operation = xapi.EventOperationMod
				mods = append(mods, ev)
			}
		}
	}
	return slices.Concat(events, mods, dels), complete
}

// refCounts counts the objects of every class.
func (f *Feed) refCounts(tx *db.Tx) map[string]int64 {
	counts := make(map[string]int64, len(f.model.Ordered))
	for _, class := range f.model.Ordered {
		if class.Stored || class.Events {
			counts[strings.ToLower(class.Name)] = int64(tx.Count(class))
		}
	}
	return counts
}
