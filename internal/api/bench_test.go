package api

import (
	"context"
	"testing"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/xapi"
)

// benchCore is newCore for benchmarks.
func benchCore(b *testing.B) (a *API, session xapi.Ref[xapi.Session], pool xapi.Ref[xapi.Pool]) {
	b.Helper()
	d, err := db.Open(b.Context(), xapi.Datamodel(), db.NewMemStore())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = d.Close() })
	if a, err = prepare(b.Context(), Config{DB: d}); err != nil {
		b.Fatal(err)
	}
	if err := d.Update(b.Context(), func(tx *db.Tx) (err error) {
		pool, err = db.Insert(tx, xapi.New[xapi.Pool]())
		return err
	}); err != nil {
		b.Fatal(err)
	}
	if session, err = a.Login(b.Context(), trusted, "root", ""); err != nil {
		b.Fatal(err)
	}
	return a, session, pool
}

// BenchmarkInvoke measures what dispatch costs beside the work of a message: a
// getter, a setter (one commit to memory), a function that does nothing, and
// one that takes a claim and gives it back.
func BenchmarkInvoke(b *testing.B) {
	a, session, pool := benchCore(b)
	claims := false
	run, err := adapt(a.methods["VDI.update"].msg, func(_ *API, ctx context.Context, c *Call, _ xapi.Ref[xapi.VDI]) error {
		if !claims {
			return nil
		}
		release, err := c.Claim(ctx, nil, claim.On(pool, xapi.PoolAllowedOperationsHAEnable))
		if err == nil {
			release()
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	m := *a.methods["VDI.update"]
	m.run = run
	a.methods["VDI.update"] = &m

	for _, bm := range []struct {
		name, method string
		claims       bool
		params       []any
	}{
		{"getter", "pool.get_name_label", false, []any{string(session), string(pool)}},
		{"setter", "pool.set_name_label", false, []any{string(session), string(pool), "n"}},
		{"function", "VDI.update", false, []any{string(session), string(pool)}},
		{"claim", "VDI.update", true, []any{string(session), string(pool)}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			claims = bm.claims
			b.ReportAllocs()
			for b.Loop() {
				if _, err := a.Invoke(b.Context(), Origin{}, bm.method, bm.params); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
