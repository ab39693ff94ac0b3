package api

import (
	"context"
	"log/slog"

	"coppice/internal/xapi"
)

// troubles are what fails again and again, a full disk for example: each is
// logged when it begins and when it is over. One goroutine uses it.
type troubles struct {
	ctx  context.Context // ends when nothing matters any more
	log  *slog.Logger
	open map[trouble]struct{}
}

type trouble struct {
	what string
	sr   xapi.Ref[xapi.SR] // or none
}

// note takes down how what was tried now ended.
func (t *troubles) note(what string, sr xapi.Ref[xapi.SR], err error) {
	key := trouble{what, sr}
	_, open := t.open[key]
	if t.ctx.Err() != nil || open == (err != nil) {
		return
	}
	log := t.log
	if sr != "" {
		log = log.With("sr", sr)
	}
	if err == nil {
		log.Info("no longer: " + what)
		delete(t.open, key)
		return
	}
	log.Warn(what, "err", err)
	if t.open == nil {
		t.open = map[trouble]struct{}{}
	}
	t.open[key] = struct{}{}
}
