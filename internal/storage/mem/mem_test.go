package mem_test

import (
	"context"
	"testing"

	"coppice/internal/storage/mem"
	"coppice/internal/storage/storagetest"
)

func open(t storagetest.TB) *storagetest.Fixture {
	t.Helper()
	f := &storagetest.Fixture{}
	d := mem.Driver()
	f.Reopen = func() {
		if f.Repo != nil {
			if err := f.Repo.Close(); err != nil {
				t.Fatalf("close: %v", err)
			}
		}
		r, err := d.Open(context.Background(), nil, f.Repo == nil)
		if err != nil {
			t.Fatalf("open: %v", err)
		}
		f.Repo = r
	}
	f.Reopen()
	t.Cleanup(func() { _ = f.Repo.Close() })
	return f
}

func TestSuite(t *testing.T) { storagetest.Run(t, open) }
func TestModel(t *testing.T) { storagetest.Model(t, open) }

func BenchmarkDriver(b *testing.B) { storagetest.Bench(b, open) }
