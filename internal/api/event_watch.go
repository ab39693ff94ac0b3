package api

import (
	"context"
	"runtime"
	"slices"
	"strings"
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
// There is nothing in an answer that depends on who gets it. Every role may
// read every class that has events.

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

// subscriptionKey is the same for subscriptions to the same.
func subscriptionKey(subs []subscription) string {
	texts := make([]string, 0, len(subs))
	for _, s := range subs {
		if s.class == nil {
			return "*"
		}
		texts = append(texts, s.class.Name+"/"+s.ref)
	}
	slices.Sort(texts)
	return strings.Join(slices.Compact(texts), ",")
}

// answer is what a question is answered with in one state of the database. It
// is never changed.
type answer struct {
	batch *xapi.EventBatch
	text  *rpc.Shared // of batch; nil for one that is not shared
}

// answerKey names an answer.
type answerKey struct {
	question
	seen uint64 // revision of the state
}

// watchTable holds what watchers share.
type watchTable struct {
	texts *rpc.TextPool

	mu     sync.Mutex
	groups map[question]*watchGroup           // those that wait
	made   map[answerKey]weak.Pointer[answer] // those that somebody still uses
}

func (t *watchTable) init() {
	t.texts = rpc.NewTextPool(sharedText, sharedTexts)
	t.groups = map[question]*watchGroup{}
	t.made = map[answerKey]weak.Pointer[answer]{}
}

// find returns the answer of that name, if somebody has made it and it is
// still in memory.
func (t *watchTable) find(key answerKey) *answer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.made[key].Value()
}

// keep lets others find an answer, and returns the one that they find.
func (t *watchTable) keep(key answerKey, fresh *answer) *answer {
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
func (t *watchTable) forget(key answerKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.made[key].Value() == nil {
		delete(t.made, key)
	}
}

// answer says what has happened after a revision. It is nil when nothing has,
// unless even that is to be told.
func (a *API) answer(tx *db.Tx, subs []subscription, q question, even bool) *answer {
	key := answerKey{q, tx.Revision()}
	if known := a.watching.find(key); known != nil && (even || len(known.batch.Events) > 0) {
		return known
	}
	events, _ := a.changes(tx, subs, q.after)
	if len(events) == 0 && !even {
		return nil
	}
	fresh := &answer{batch: &xapi.EventBatch{Events: events, ValidRefCounts: a.refCounts(tx), Token: formatToken(tx.Position())}}
	if len(events) > sharedEvents {
		return fresh
	}
	fresh.text = a.watching.texts.New()
	return a.watching.keep(key, fresh)
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
	answer *answer
}

// join returns the group of those that wait for the answer to q. Who does not
// get it must call leave.
func (t *watchTable) join(q question, subs []subscription) *watchGroup {
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
func (t *watchTable) leave(g *watchGroup) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g.members--
	if g.members == 0 {
		t.remove(g)
	}
}

// remove has nobody join a group any more. The table is locked.
func (t *watchTable) remove(g *watchGroup) {
	if t.groups[g.question] == g {
		delete(t.groups, g.question)
	}
}

// finish gives the members of a group their answer.
func (t *watchTable) finish(g *watchGroup, told *answer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remove(g)
	g.answer = told
	close(g.done)
}

// awaitAnswer waits for the answer to a question; nil when ctx ends first.
func (a *API) awaitAnswer(ctx context.Context, subs []subscription, q question) *answer {
	g := a.watching.join(q, subs)
	select {
	case <-g.done:
		return g.answer // and nobody counts the members any more
	case <-ctx.Done():
		a.watching.leave(g)
		return nil
	case <-g.lead:
		return a.leadGroup(ctx, g)
	}
}

// leadGroup finds the answer for a group. When ctx ends first, somebody else
// may lead.
func (a *API) leadGroup(ctx context.Context, g *watchGroup) *answer {
	var told *answer
	defer func() {
		if told == nil {
			g.lead <- struct{}{}
			a.watching.leave(g)
		}
	}()
	for {
		a.awaitChange(ctx, g.subs, g.seen)
		if ctx.Err() != nil {
			return nil
		}
		_ = a.db.View(func(tx *db.Tx) error {
			told = a.answer(tx, g.subs, question{g.question.subs, g.seen}, false)
			g.seen = tx.Revision()
			return nil
		})
		if told != nil {
			a.watching.finish(g, told)
			return told
		}
	}
}
