package coppice_test

import (
	"bytes"
	"flag"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"coppice/internal/api"
)

var update = flag.Bool("update", false, "rewrite the generated part of doc/compat.md")

// TestCompatDocument holds the coverage part of doc/compat.md against the
// tables that dispatch runs on.
func TestCompatDocument(t *testing.T) {
	const file = "doc/compat.md"
	marker := []byte("<!-- Generated below this line: make generate -->\n")
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, _, ok := bytes.Cut(got, marker)
	if !ok {
		t.Fatalf("%s has no line %s", file, marker)
	}
	want := bytes.NewBuffer(append(bytes.Clone(head), marker...))
	want.WriteByte('\n')
	if err := api.WriteCoverage(want); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(file, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want.String(), string(got)); diff != "" {
		t.Errorf("%s is out of date (make generate); want → got:\n%s", file, diff)
	}
}
