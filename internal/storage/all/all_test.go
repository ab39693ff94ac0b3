package all_test

import (
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"coppice/internal/storage"
	"coppice/internal/storage/all"
)

func TestRegistry(t *testing.T) {
	r := all.Registry()
	if got := r.Types(); !slices.Equal(got, []string{"cow", "mem"}) {
		t.Errorf("Types = %v", got)
	}
	for name, d := range r {
		if d.Type != name || d.Description == "" || d.Config["location"] == "" {
			t.Errorf("incomplete driver %q: %+v", name, d)
		}
	}
}

// TestLife takes a repository of each type from its creation to its end.
func TestLife(t *testing.T) {
	for name, d := range all.Registry() {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			config := map[string]string{"location": filepath.Join(t.TempDir(), "a", "store")}
			want := func(err, kind error) {
				t.Helper()
				if !errors.Is(err, kind) {
					t.Errorf("error %v, want %v", err, kind)
				}
			}
			_, err := d.Open(ctx, config, false)
			want(err, storage.ErrNoRepo)
			want(d.Destroy(ctx, config), storage.ErrNoRepo)
			const id = "00000001-c0de-4bad-8bee-0123456789ab"
			for create := true; ; create = false {
				repo, err := d.Open(ctx, config, create)
				if err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(storage.Features(repo), d.Features) {
					t.Errorf("features %v, advertised %v", storage.Features(repo), d.Features)
				}
				_, err = d.Open(ctx, config, true)
				want(err, storage.ErrLocked)
				want(d.Destroy(ctx, config), storage.ErrLocked)
				if create {
					if _, err := repo.Create(ctx, storage.Spec{ID: id, Size: storage.Unit}); err != nil {
						t.Error(err)
					}
				} else if _, err := repo.Stat(ctx, id); err != nil {
					t.Error(err)
				}
				if err := repo.Close(); err != nil {
					t.Error(err)
				}
				if !create {
					break
				}
			}
			if err := d.Destroy(ctx, config); err != nil {
				t.Error(err)
			}
			_, err = d.Open(ctx, config, false)
			want(err, storage.ErrNoRepo)
			repo, err := d.Open(ctx, config, true)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := repo.Stat(ctx, id); !errors.Is(err, storage.ErrNotFound) {
				t.Errorf("a volume has survived the end of its repository: %v", err)
			}
			if err := repo.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCowLocation(t *testing.T) {
	d := all.Registry()["cow"]
	for _, config := range []map[string]string{nil, {"location": ""}, {"location": "relative/path"}} {
		if _, err := d.Open(t.Context(), config, true); !errors.Is(err, storage.ErrInvalid) {
			t.Errorf("config %v: %v", config, err)
		}
		if err := d.Destroy(t.Context(), config); !errors.Is(err, storage.ErrInvalid) {
			t.Errorf("config %v: %v", config, err)
		}
	}
}
