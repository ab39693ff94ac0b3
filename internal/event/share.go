package event

import (
	"context"
	"runtime"
	"sync"
	"weak"

	"coppice/internal/db"
	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// Hundreds of clients wait for the same: most watch a few classes and have
// heard of everything so far. What happens next is found out, put together and
// encoded once for all of them. One of those that wait leads: it waits for the
// database and looks whether that concerns them; the others wait for it.
//
// There is nothing in an answer that depends on who gets it.

const (
	// sharedEvents is with how many events a batch is still shared: of more,
	// such as everything that there is, each client is told record by record.
	sharedEvents = 512
	// sharedText is how long the text of a shared batch may be, and sharedTexts
	// how much memory all of them together take while they are sent, in bytes.
	sharedText  = 4 << 20
	sharedTexts = 32 << 20
)

// question is what the watchers have in common that are told the same.
type question struct {
	subs  string // see subscriptionKey
	after uint64 // the revision up to which they know everything
}

// Answer is what a call is answered with: what has happened up to one state of
// the database. It may be that of others, too, and is never changed.
type Answer struct {
	Batch *xapi.EventBatch
	Text  *rpc.Shared // of Batch; nil for one that is not shared
}

// answerKey names an answer.
type answerKey struct {
	question
	seen uint64 // revision of the state
}

// watchers is what those that wait share.
type watchers struct {
	texts *rpc.TextPool

	mu     sync.Mutex
	groups map[question]*watchGroup           // those that wait
	made   map[answerKey]weak.Pointer[Answer] // those that somebody still uses
}

func (t *watchers) init() {
	t.texts = rpc.NewTextPool(sharedText, sharedTexts)
	t.groups = map[question]*watchGroup{}
	t.made = map[answerKey]weak.Pointer[Answer]{}
}

// find returns the answer of that name, if somebody has made it and it is
// still in memory.
func (t *watchers) find(key answerKey) *Answer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.made[key].Value()
}

// keep lets others find an answer, and returns the one that they find.
func (t *watchers) keep(key answerKey, fresh *Answer) *Answer {
	t.mu.Lock()
	defer t.mu.Unlock()
	if other := t.made[key].Value(); other != nil {
		return other
	}
	t.made[key] = weak.Make(fresh)
	runtime.AddCleanup(fresh, t.forget, key)
	return fresh
}

// forget drops the entry of an answer that is not in memory any more.
func (t *watchers) forget(key answerKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.made[key].Value() == nil {
		delete(t.made, key)
	}
}

// answer says what has happened after a revision. It is nil when nothing has,
// unless even that is to be told.
func (f *Feed) answer(tx *db.Tx, subs []subscription, q question, even bool) *Answer {
	key := answerKey{q, tx.Revision()}
	if known := f.watchers.find(key); known != nil && (even || len(known.Batch.Events) > 0) {
		return known
	}
	events, _ := f.changes(tx, subs, q.after)
	if len(events) == 0 && !even {
		return nil
	}
	fresh := &Answer{Batch: &xapi.EventBatch{Events: events, ValidRefCounts: f.refCounts(tx), Token: formatToken(tx.Position())}}
	if len(events) > sharedEvents {
		return fresh
	}
	fresh.Text = f.watchers.texts.New()
	return f.watchers.keep(key, fresh)
}

// watchGroup is some calls that wait for the answer to one question.
type watchGroup struct {
	question
	subs []subscription

	members int // guarded by the table; of no interest when there is an answer

	// lead has an element while nobody leads. Who takes it waits for the
	// database on behalf of all, and alone uses seen, the revision up to which
	// nothing of interest has happened.
	lead chan struct{}
	seen uint64

	done   chan struct{} // closed when answer is set
	answer *Answer
}

// join returns the group of those that wait for the answer to q. Who does not
// get it must call leave.
func (t *watchers) join(q question, subs []subscription) *watchGroup {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.groups[q]
	if g == nil {
		g = &watchGroup{question: q, subs: subs, seen: q.after, lead: make(chan struct{}, 1), done: make(chan struct{})}
		g.lead <- struct{}{}
		t.groups[q] = g
	}
	g.members++
	return g
}

// leave ends a membership. The last one takes the group with it.
func (t *watchers) leave(g *watchGroup) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g.members--
	if g.members == 0 {
		t.remove(g)
	}
}

// remove has nobody join a group any more. The table is locked.
func (t *watchers) remove(g *watchGroup) {
	if t.groups[g.question] == g {
		delete(t.groups, g.question)
	}
}

// finish gives the members of a group their answer.
func (t *watchers) finish(g *watchGroup, told *Answer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remove(g)
	g.answer = told
	close(g.done)
}

// awaitAnswer waits for the answer to a question; nil when ctx ends first.
func (f *Feed) awaitAnswer(ctx context.Context, subs []subscription, q question) *Answer {
	g := f.watchers.join(q, subs)
	select {
	case <-g.done:
		return g.answer // and nobody counts the members any more
	case <-ctx.Done():
		f.watchers.leave(g)
		return nil
	case <-g.lead:
		return f.leadGroup(ctx, g)
	}
}

// leadGroup finds the answer for a group. When ctx ends first, somebody else
// may lead.
func (f *Feed) leadGroup(ctx context.Context, g *watchGroup) *Answer {
	var told *Answer
	defer func() {
		if told == nil {
			g.lead <- struct{}{}
			f.watchers.leave(g)
		}
	}()
	for {
		f.awaitChange(ctx, g.subs, g.seen)
		if ctx.Err() != nil {
			return nil
		}
		_ = f.db.View(func(tx *db.Tx) error {
			told = f.answer(tx, g.subs, question{g.question.subs, g.seen}, false)
			g.seen = tx.Revision()
			return nil
		})
		if told != nil {
			f.watchers.finish(g, told)
			return told
		}
	}
}
