package coppice_test

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDependencies holds doc/dependencies.md against go.mod: every direct
// dependency has its reason, and no reason outlives its dependency.
func TestDependencies(t *testing.T) {
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	var required []string
	for line := range strings.Lines(string(mod)) {
		fields := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "require "))
		if len(fields) == 2 && strings.HasPrefix(fields[1], "v") {
			required = append(required, fields[0])
		}
	}
	doc, err := os.ReadFile("doc/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(string(doc), -1) {
		documented = append(documented, m[1])
	}
	for _, m := range required {
		if !slices.Contains(documented, m) {
			t.Errorf("%s is required by go.mod but has no line in doc/dependencies.md", m)
		}
	}
	for _, m := range documented {
		if !slices.Contains(required, m) {
			t.Errorf("%s has a line in doc/dependencies.md but go.mod does not require it", m)
		}
	}
	if len(required) == 0 {
		t.Fatal("go.mod lists no dependency")
	}
}
