package api

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// eventMethods binds the messages of class event.
func eventMethods() map[string]any {
	return map[string]any{
		"event.from":           (*API).eventFrom,
		"event.inject":         (*API).eventInject,
		"event.register":       (*API).eventRegister,
		"event.unregister":     (*API).eventUnregister,
		"event.next":           (*API).eventNext,
		"event.get_current_id": (*API).eventGetCurrentID,
	}
}

// Events are not stored anywhere. Every object of the database carries the
// revisions at which it was created and last modified, and deletions leave a
// bounded number of tombstones: an event call asks for what is stamped after
// a revision, and waits for the next commit when there is nothing. A token is
// a revision. Clients that are slow get the latest state once instead of
// every step; a deletion whose tombstone is gone shows in valid_ref_counts.
// Over a restart, revisions are kept as far as the history of the database
// goes; an older token is answered as if it were the first.

const (
	// eventQuiet is how long nothing must follow the commit that woke a waiting
	// call before the call answers, and eventPause how long it collects at most
	// what does follow: of many changes in a row clients hear as often as they
	// can bear. A change that was alone for eventQuiet before is told after
	// eventBrief, in which whoever made it gets his own answer: behind those of
	// hundreds of watchers it would be late.
	eventBrief = 500 * time.Microsecond
	eventQuiet = 2 * time.Millisecond
	eventPause = 50 * time.Millisecond
	// eventLongest bounds the timeout of a client.
	eventLongest = 24 * time.Hour
	// heartbeat is how often a waiting event.next that watches pools gets a
	// pool that did not change.
	heartbeat = 30 * time.Second
)

// subscription is what an event call wants to know about.
type subscription struct {
	class *xapi.Class // nil for every class
	ref   string      // "" for every object of the class
}

// parseSubscription reads "*", "class" or "class/ref", the class in any case.
// A class that does not exist, or has no events, is watched in vain:
// wanted is false.
func (a *API) parseSubscription(text string) (sub subscription, wanted bool, err error) {
	if text == "*" {
		return subscription{}, true, nil
	}
	name, ref, object := strings.Cut(text, "/")
	if name == "" || object && ref == "" || strings.Contains(ref, "/") {
		return subscription{}, false, xapi.NewError(xapi.ErrEventSubscriptionParseFailure, text)
	}
	for _, class := range a.model.Ordered {
		if class.Events && strings.EqualFold(class.Name, name) {
			return subscription{class: class, ref: ref}, true, nil
		}
	}
	return subscription{}, false, nil
}

func (a *API) parseSubscriptions(classes []string) ([]subscription, error) {
	var subs []subscription
	for _, text := range classes {
		sub, wanted, err := a.parseSubscription(text)
		if err != nil {
			return nil, err
		}
		if wanted {
			subs = append(subs, sub)
		}
	}
	return subs, nil
}

// wants reports whether subs cover an object; the ref "" asks about any object
// of the class.
func wants(subs []subscription, class *xapi.Class, ref string) bool {
	return slices.ContainsFunc(subs, func(s subscription) bool {
		return s.class == nil || s.class == class && (ref == "" || s.ref == "" || s.ref == ref)
	})
}

// classesOf lists the classes that subs are about; none means all.
func classesOf(subs []subscription) (classes []*xapi.Class) {
	for _, s := range subs {
		if s.class == nil {
			return nil
		}
		if !slices.Contains(classes, s.class) {
			classes = append(classes, s.class)
		}
	}
	return classes
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
func (a *API) changes(tx *db.Tx, subs []subscription, after uint64) (events []*xapi.Event, complete bool) {
	var mods, dels []*xapi.Event
	complete = true
	for _, class := range a.model.Ordered {
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
func (a *API) refCounts(tx *db.Tx) map[string]int64 {
	counts := make(map[string]int64, len(a.model.Ordered))
	for _, class := range a.model.Ordered {
		if class.Stored || class.Events {
			counts[strings.ToLower(class.Name)] = int64(tx.Count(class))
		}
	}
	return counts
}

// eventFrom returns what happened after a token, and waits for something to
// happen for as long as timeout, in seconds, allows.
func (a *API) eventFrom(ctx context.Context, c *Call, classes []string, token string, timeout float64) (*xapi.EventBatch, error) {
	subs, err := a.parseSubscriptions(classes)
	if err != nil {
		return nil, err
	}
	from, err := parseToken(token)
	if err != nil {
		return nil, err
	}
	wait := eventLongest
	if d := timeout * float64(time.Second); d < float64(wait) {
		wait = max(time.Duration(d), 0)
	}
	ctx, cancel := a.eventContext(ctx, c, wait)
	defer cancel()

	for {
		q := question{subs: subscriptionKey(subs)}
		var told *answer
		_ = a.db.View(func(tx *db.Tx) error {
			q.after = a.db.Since(tx, from)
			last, even := tx.LastChange(classesOf(subs)...), ctx.Err() != nil
			if q.after < last || even {
				told = a.answer(tx, subs, q, even)
			}
			if told == nil {
				from, q.after = tx.Position(), last // up to there nothing is of interest
			}
			return nil
		})
		if told == nil {
			told = a.awaitAnswer(ctx, subs, q)
		} else if cause := context.Cause(ctx); len(told.batch.Events) == 0 && cause != errEventTimeout {
			return nil, cause
		}
		if told != nil {
			c.text = told.text
			return told.batch, nil
		}
	}
}

// errEventTimeout is the cause with which the time of an event call runs out.
var errEventTimeout = errors.New("no event in time")

// eventContext bounds the waiting of an event call: by its time, the client's
// connection, the session, and the call's own context.
func (a *API) eventContext(ctx context.Context, c *Call, wait time.Duration) (context.Context, context.CancelFunc) {
	ctx, stop := context.WithCancelCause(ctx)
	timer := time.AfterFunc(wait, func() { stop(errEventTimeout) })
	detach := context.AfterFunc(c.client, func() { stop(context.Cause(c.client)) })
	unlink := context.AfterFunc(c.Session.ctx, func() { stop(context.Cause(c.Session.ctx)) })
	if wait <= 0 {
		stop(errEventTimeout)
	}
	return ctx, func() {
		timer.Stop()
		unlink()
		detach()
		stop(nil)
	}
}

// awaitChange waits until something that subs may be about has changed after a
// revision, and then a little for what comes with it, or until ctx is done.
func (a *API) awaitChange(ctx context.Context, subs []subscription, seen uint64) {
	if len(subs) == 0 {
		<-ctx.Done()
		return
	}
	classes := classesOf(subs)
	begun := time.Now()
	if a.db.Wait(ctx, seen, classes...) != nil {
		return
	}
	pause := eventQuiet
	if time.Since(begun) >= eventQuiet {
		pause = eventBrief
	}
	ctx, cancel := context.WithTimeout(ctx, eventPause)
	defer cancel()
	for more := true; more; {
		quiet, cancel := context.WithTimeout(ctx, pause)
		more = a.db.Wait(quiet, a.db.Revision(), classes...) == nil
		cancel()
	}
}

// eventInject makes an object look modified and returns a token that precedes
// that, so that event.from with it returns at once.
func (a *API) eventInject(ctx context.Context, c *Call, class, ref string) (string, error) {
	var before db.Position
	err := a.db.Update(ctx, func(tx *db.Tx) error {
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

// registration is what a session watches with the older event calls: one
// cursor over the revisions, moved by event.next.
type registration struct {
	mu     sync.Mutex
	known  bool
	subs   map[string]subscription // by lower-case text
	cursor uint64
}

// eventRegister adds to what the session watches. What is watched for the
// first time is watched from now on.
func (a *API) eventRegister(ctx context.Context, c *Call, classes []string) error {
	if _, err := a.parseSubscriptions(classes); err != nil {
		return err
	}
	r := &c.Session.legacy
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.known {
		r.known, r.subs, r.cursor = true, map[string]subscription{}, a.db.Revision()
	}
	for _, text := range classes {
		if sub, wanted, _ := a.parseSubscription(text); wanted {
			r.subs[strings.ToLower(text)] = sub
		}
	}
	return nil
}

// eventUnregister takes away from what the session watches; "*" takes all.
func (a *API) eventUnregister(ctx context.Context, c *Call, classes []string) error {
	if _, err := a.parseSubscriptions(classes); err != nil {
		return err
	}
	r := &c.Session.legacy
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, text := range classes {
		if text == "*" {
			clear(r.subs)
		}
		delete(r.subs, strings.ToLower(text))
	}
	return nil
}

// take returns the events after the cursor and moves it. EVENTS_LOST, and the
// cursor moves to now, when deletions are missing.
func (r *registration) take(a *API, session xapi.Ref[xapi.Session]) (events []*xapi.Event, subs []subscription, seen uint64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.known {
		return nil, nil, 0, xapi.NewError(xapi.ErrSessionNotRegistered, string(session))
	}
	for _, sub := range r.subs {
		subs = append(subs, sub)
	}
	err = a.db.View(func(tx *db.Tx) error {
		var complete bool
		events, complete = a.changes(tx, subs, r.cursor)
		seen = tx.Revision()
		r.cursor = seen
		if !complete {
			return xapi.NewError(xapi.ErrEventsLost)
		}
		return nil
	})
	return events, subs, seen, err
}

// eventNext returns what happened since the last event.next of the session,
// and waits for it.
func (a *API) eventNext(ctx context.Context, c *Call) ([]*xapi.Event, error) {
	base, deadline := ctx, time.Now().Add(heartbeat)
	for {
		events, subs, seen, err := c.Session.legacy.take(a, c.Session.ref)
		if err != nil {
			return nil, err
		}
		if len(events) == 0 {
			ctx, cancel := a.eventContext(base, c, time.Until(deadline))
			a.awaitChange(ctx, subs, seen)
			cause := context.Cause(ctx)
			cancel()
			if cause != nil && cause != errEventTimeout {
				return nil, cause
			}
			if cause == errEventTimeout {
				deadline = time.Now().Add(heartbeat)
				events = a.heartbeats(subs)
			}
		}
		if len(events) > 0 {
			now := a.now()
			for _, ev := range events {
				ev.Timestamp = now
			}
			slices.SortStableFunc(events, func(x, y *xapi.Event) int { return int(min(max(x.ID-y.ID, math.MinInt32), math.MaxInt32)) })
			return events, nil
		}
	}
}

// heartbeats says that the pools of subs are as they were.
func (a *API) heartbeats(subs []subscription) (events []*xapi.Event) {
	pool := a.model.Classes["pool"]
	rows, err := a.rows(pool, func(ref string, _ any) bool { return wants(subs, pool, ref) })
	if err != nil {
		return nil
	}
	for _, x := range rows.list {
		events = append(events, &xapi.Event{
			ID: int64(a.db.Revision()), Class: pool.Name, Ref: x.ref,
			Operation: xapi.EventOperationMod, Snapshot: x.rec,
		})
	}
	return events
}

func (a *API) eventGetCurrentID(ctx context.Context, c *Call) (int64, error) {
	return int64(a.db.Revision()), nil
}
