package cow

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"coppice/internal/storage"
)

// A store is made in an empty directory, and in one with what was left of another store, but never among files of
// somebody else, which could have the names of its own: there nothing is left.
func TestCreateLeavesOthersAlone(t *testing.T) {
	for _, tt := range []struct {
		name  string
		there []string
		taken bool
	}{
		{"empty", nil, false},
		{"a file system of its own", []string{"lost+found"}, false},
		{"a store that was cut off", []string{"log", "regions-0", "space-0000", "super.new", "attributes"}, false},
		{"a log of somebody", []string{"log"}, true},
		{"other files", []string{"photo", "regions-0"}, true},
		{"names that are nearly a store's", []string{"space-1", "regions-0"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, name := range tt.there {
				if err := os.WriteFile(filepath.Join(dir, name), []byte("precious"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			repo, err := Driver().Open(t.Context(), map[string]string{"location": dir}, true)
			if !tt.taken {
				if err != nil {
					t.Fatal(err)
				}
				if err := repo.Close(); err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, storage.ErrOccupied) {
				t.Fatalf("got %v, want ErrOccupied", err)
			}
			if _, err := Driver().Open(t.Context(), map[string]string{"location": dir}, false); !errors.Is(err, storage.ErrNoRepo) {
				t.Fatalf("got %v, want ErrNoRepo", err)
			}
			var names []string
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				names = append(names, e.Name())
			}
			slices.Sort(tt.there)
			if !slices.Equal(names, tt.there) {
				t.Errorf("files %q, want %q", names, tt.there)
			}
		})
	}
}
