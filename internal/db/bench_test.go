package db_test

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"

	"coppice/internal/db"
	"coppice/internal/db/bolt"
	"coppice/internal/xapi"
)

const (
	benchSR    = xapi.Ref[xapi.SR]("OpaqueRef:sr")
	benchDisks = 10_000
)

func diskRef(i int) xapi.Ref[xapi.VDI] { return xapi.Ref[xapi.VDI](fmt.Sprintf("OpaqueRef:%08d", i)) }

// fillDisks inserts n disks in one SR.
func fillDisks(b testing.TB, d *db.DB, n int) {
	update(b, d, func(tx *db.Tx) error {
		if err := db.InsertAs(tx, benchSR, &xapi.SR{}); err != nil {
			return err
		}
		for i := range n {
			rec := &xapi.VDI{NameLabel: "disk", SR: benchSR, VirtualSize: 1 << 30, OtherConfig: map[string]string{"a": "b"}}
			if err := db.InsertAs(tx, diskRef(i), rec); err != nil {
				return err
			}
		}
		return nil
	})
}

func openBolt(b testing.TB, path string) *db.DB {
	b.Helper()
	s, err := bolt.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	d, err := db.Open(context.Background(), xapi.Datamodel(), s)
	if err != nil {
		b.Fatal(err)
	}
	return d
}

func BenchmarkLoad(b *testing.B) {
	path := filepath.Join(b.TempDir(), "db")
	d := openBolt(b, path)
	fillDisks(b, d, benchDisks)
	_ = d.Close()
	for b.Loop() {
		d := openBolt(b, path)
		_ = d.Close()
	}
}

func BenchmarkGet(b *testing.B) {
	d := open(b, db.NewMemStore())
	fillDisks(b, d, benchDisks)
	r := diskRef(benchDisks / 2)
	b.ReportAllocs()
	for b.Loop() {
		_ = d.View(func(tx *db.Tx) error { _, err := db.Get(tx, r); return err })
	}
}

func BenchmarkUpdate(b *testing.B) {
	for _, bench := range []struct {
		name string
		fn   func(v *xapi.VDI, i int)
	}{
		{"memory", func(v *xapi.VDI, i int) { v.AllowedOperations = append(v.AllowedOperations[:0], allowed[i%2]) }},
		{"durable", func(v *xapi.VDI, i int) { v.VirtualSize = int64(i) }},
	} {
		b.Run(bench.name, func(b *testing.B) {
			d := open(b, boltStore(b))
			fillDisks(b, d, benchDisks)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i++
				update(b, d, func(tx *db.Tx) error {
					return db.Modify(tx, diskRef(i%benchDisks), func(v *xapi.VDI) { bench.fn(v, i/benchDisks+i) })
				})
			}
		})
	}
}

var allowed = [2]xapi.VDIOperations{xapi.VDIOperationsClone, xapi.VDIOperationsSnapshot}

func boltStore(b testing.TB) db.Store {
	s, err := bolt.Open(filepath.Join(b.TempDir(), "db"))
	if err != nil {
		b.Fatal(err)
	}
	return s
}

// BenchmarkUpdateParallel has 500 clients that make durable changes at once.
func BenchmarkUpdateParallel(b *testing.B) {
	d := open(b, boltStore(b))
	fillDisks(b, d, benchDisks)
	b.SetParallelism(250)
	var n atomic.Int64
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			i := n.Add(1)
			update(b, d, func(tx *db.Tx) error {
				return db.Modify(tx, diskRef(int(i%benchDisks)), func(v *xapi.VDI) { v.VirtualSize = i })
			})
		}
	})
}

// BenchmarkSnapshotOfOne inserts snapshots of one disk that already has many.
func BenchmarkSnapshotOfOne(b *testing.B) {
	for _, n := range []int{100, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			d := open(b, db.NewMemStore())
			update(b, d, func(tx *db.Tx) error {
				for range n {
					if _, err := db.Insert(tx, &xapi.VDI{SR: benchSR, SnapshotOf: diskRef(0)}); err != nil {
						return err
					}
				}
				return db.InsertAs(tx, diskRef(0), &xapi.VDI{})
			})
			b.ReportAllocs()
			for b.Loop() {
				update(b, d, func(tx *db.Tx) error {
					_, err := db.Insert(tx, &xapi.VDI{SR: benchSR, SnapshotOf: diskRef(0)})
					return err
				})
			}
		})
	}
}

// BenchmarkChanges asks what one update changed, among 100,000 objects.
func BenchmarkChanges(b *testing.B) {
	d := open(b, db.NewMemStore())
	fillDisks(b, d, 100_000)
	update(b, d, func(tx *db.Tx) error {
		return db.Modify(tx, diskRef(7), func(v *xapi.VDI) { v.Managed = true })
	})
	after := d.Revision() - 1
	b.ReportAllocs()
	for b.Loop() {
		_ = d.View(func(tx *db.Tx) error {
			n := 0
			changes, _ := tx.Changes(xapi.ClassOf[xapi.VDI](), after)
			for range changes {
				n++
			}
			if n != 1 {
				b.Fatalf("%d changes", n)
			}
			return nil
		})
	}
}
