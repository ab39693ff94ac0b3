package storage_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"coppice/internal/storage"
	"coppice/internal/storage/mem"
)

func TestIDValid(t *testing.T) {
	for id, want := range map[storage.ID]bool{
		"0123abcd-4567-89ab-cdef-0123456789ab":   true,
		"":                                       false,
		"0123ABCD-4567-89ab-cdef-0123456789ab":   false,
		"0123abcd-4567-89ab-cdef-0123456789a":    false,
		"0123abcd-4567-89ab-cdef-0123456789abc":  false,
		"0123abcd4567-89ab-cdef-0123456789abcd":  false,
		"0123abcd-4567-89ab-cdef-0123456789ag":   false,
		"{123abcd-4567-89ab-cdef-0123456789ab}":  false,
		"../../..-../.-../.-../.-../../../../..": false,
	} {
		if got := id.Valid(); got != want {
			t.Errorf("ID(%q).Valid() = %v", id, got)
		}
	}
}

func TestErrorKinds(t *testing.T) {
	space := fmt.Errorf("write: %w", &storage.SpaceError{Needed: 8192, Free: 4096})
	if !errors.Is(space, storage.ErrNoSpace) || errors.Is(space, storage.ErrCorrupt) {
		t.Errorf("%v is of the wrong kind", space)
	}
	damage := fmt.Errorf("read: %w", &storage.CorruptError{Volume: "v", Off: 4096, Detail: "checksum"})
	if !errors.Is(damage, storage.ErrCorrupt) || errors.Is(damage, storage.ErrNoSpace) {
		t.Errorf("%v is of the wrong kind", damage)
	}
}

// plain hides the powers of a repo.
type plain struct{ storage.Repo }

func TestFeaturesFollowPowers(t *testing.T) {
	d := mem.Driver()
	r, err := d.Open(t.Context(), nil, true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	all := storage.Features(r)
	for _, f := range []string{"VDI_RESIZE", "VDI_REVERT", "VDI_SNAPSHOT"} {
		if !slices.Contains(all, f) {
			t.Errorf("%s is missing from %v", f, all)
		}
	}
	if !slices.Equal(all, d.Features) {
		t.Errorf("the driver advertises %v, its repo %v", d.Features, all)
	}
	less := storage.Features(plain{r})
	for _, f := range []string{"VDI_RESIZE", "VDI_REVERT"} {
		if slices.Contains(less, f) {
			t.Errorf("%s is advertised without the power", f)
		}
	}
}

func TestRegistryTypes(t *testing.T) {
	r := storage.Registry{"b": {}, "a": {}, "c": {}}
	if got := r.Types(); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("Types = %v", got)
	}
}
