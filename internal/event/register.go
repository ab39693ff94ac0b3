package event

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// ErrNotRegistered says that nothing was ever registered.
var ErrNotRegistered = errors.New("event: nothing is registered")

// heartbeat is how often a waiting Next that watches pools gets a pool that did
// not change.
const heartbeat = 30 * time.Second

// Registration is what a session watches with the older event calls: one
// cursor over the revisions, moved by Next. The zero Registration watches
// nothing yet.
type Registration struct {
	mu     sync.Mutex
	known  bool
	subs   map[string]subscription // by lower-case text
	cursor uint64
}

// Register adds to what is watched. What is watched for the first time is
// watched from now on. Classes are those of From.
func (f *Feed) Register(r *Registration, classes []string) error {
	if _, err := f.subscriptions(classes); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.known {
		r.known, r.subs, r.cursor = true, map[string]subscription{}, f.db.Revision()
	}
	for _, text := range classes {
		if sub, wanted, _ := f.subscription(text); wanted {
			r.subs[strings.ToLower(text)] = sub
		}
	}
	return nil
}

// Unregister takes away from what is watched; "*" takes all.
func (f *Feed) Unregister(r *Registration, classes []string) error {
	if _, err := f.subscriptions(classes); err != nil {
		return err
	}
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
func (f *Feed) take(r *Registration) (events []*xapi.Event, subs []subscription, seen uint64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.known {
		return nil, nil, 0, ErrNotRegistered
	}
	for _, sub := range r.subs {
		subs = append(subs, sub)
	}
	err = f.db.View(func(tx *db.Tx) error {
		var complete bool
		events, complete = f.changes(tx, subs, r.cursor)
		seen = tx.Revision()
		r.cursor = seen
		if !complete {
			return xapi.NewError(xapi.ErrEventsLost)
		}
		return nil
	})
	return events, subs, seen, err
}

// Next returns what has happened to what is watched since the last Next, in the
// order in which it has, and waits for it. The error is ErrNotRegistered,
// EVENTS_LOST, or the cause for which ctx ended.
func (f *Feed) Next(ctx context.Context, r *Registration) ([]*xapi.Event, error) {
	deadline := time.Now().Add(heartbeat)
	for {
		events, subs, seen, err := f.take(r)
		if err != nil {
			return nil, err
		}
		if len(events) == 0 {
			waiting, cancel := context.WithDeadlineCause(ctx, deadline, errTimeout)
			f.awaitChange(waiting, subs, seen)
			cause := context.Cause(waiting)
			cancel()
			if cause != nil && cause != errTimeout {
				return nil, cause
			}
			if cause == errTimeout {
				deadline = time.Now().Add(heartbeat)
				events = f.heartbeats(subs)
			}
		}
		if len(events) > 0 {
			now := f.now()
			for _, ev := range events {
				ev.Timestamp = now
			}
			slices.SortStableFunc(events, func(x, y *xapi.Event) int { return cmp.Compare(x.ID, y.ID) })
			return events, nil
		}
	}
}

// heartbeats says that the pools of subs are as they were.
func (f *Feed) heartbeats(subs []subscription) (events []*xapi.Event) {
	pool := f.model.Classes["pool"]
	_ = f.db.View(func(tx *db.Tx) error {
		for ref, rec := range tx.Each(pool) {
			if wants(subs, pool, ref) {
				events = append(events, &xapi.Event{
					ID: int64(tx.Revision()), Class: pool.Name, Ref: ref,
					Operation: xapi.EventOperationMod, Snapshot: rec,
				})
			}
		}
		return nil
	})
	return events
}
