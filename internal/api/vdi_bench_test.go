package api

import (
	"context"
	"fmt"
	"testing"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/storage/mem"
	"coppice/internal/xapi"
)

// BenchmarkSnapshot is VDI.snapshot through Invoke on the memory driver: what
// the API layer itself costs, on a disk that has a number of snapshots
// already.
func BenchmarkSnapshot(b *testing.B) {
	for _, depth := range []int{1, 1000, 10_000} {
		b.Run(fmt.Sprint(depth), func(b *testing.B) {
			d, err := db.Open(b.Context(), xapi.Datamodel(), db.NewMemStore())
			if err != nil {
				b.Fatal(err)
			}
			defer d.Close()
			a, err := New(b.Context(), Config{DB: d, Storage: storage.Registry{"mem": mem.Driver()}})
			if err != nil {
				b.Fatal(err)
			}
			defer a.Close()
			session, err := a.Login(b.Context(), trusted, "root", "")
			if err != nil {
				b.Fatal(err)
			}
			call := func(name string, args ...any) any {
				res, err := a.Invoke(context.Background(), trusted, name, append([]any{string(session)}, args...))
				if err != nil {
					b.Fatal(err)
				}
				return res.Value
			}
			var sr xapi.Ref[xapi.SR]
			_ = d.View(func(tx *db.Tx) error {
				for ref := range db.All[xapi.SR](tx) {
					sr = ref
				}
				return nil
			})
			disk := string(call("VDI.create", diskArgs(sr, 1<<30)).(vdiRef))
			for range depth {
				call("VDI.snapshot", disk)
			}
			b.ReportAllocs()
			for b.Loop() {
				call("VDI.snapshot", disk)
			}
		})
	}
}
