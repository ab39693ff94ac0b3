package coppice_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "coppice/"

// mayImport is the architecture: for each package, which of our packages its
// product code may import. A package that is not listed may not exist; "*"
// is the composition root. The prose behind it is ARCHITECTURE.md.
var mayImport = map[string][]string{
	"internal/vfs":      {},
	"internal/nbd":      {"internal/storage"},
	"internal/vhd":      {},
	"internal/qcow2":    {},
	"internal/vmdk":     {},
	"internal/xva":      {},
	"internal/rpc":      {},
	"internal/xapi":     {},
	"internal/storage":  {},
	"internal/thincli":  {},
	"internal/schedule": {},
	"internal/users":    {},
	"internal/typo":     {},
	"internal/wordwrap": {},
	"internal/peertest": {}, // of tests

	"internal/xapi/gen":  {"internal/xapi"},
	"internal/cow":       {"internal/vfs"},
	"internal/db":        {"internal/xapi"},
	"internal/db/bolt":   {"internal/db", "internal/xapi"},
	"internal/db/dbtest": {"internal/db", "internal/xapi"}, // of tests
	"internal/where":     {"internal/xapi"},
	"internal/sexpr":     {"internal/xapi"},
	"internal/diskcopy":  {"internal/xapi", "internal/storage"},
	"internal/rbac":      {"internal/xapi"},
	"internal/ova":       {"internal/xapi", "internal/db", "internal/rpc"},
	"internal/claim":     {"internal/xapi", "internal/db"},
	"internal/event":     {"internal/xapi", "internal/db", "internal/rpc"},
	"internal/login":     {"internal/users"},

	"internal/storage/storagetest": {"internal/storage"},
	"internal/storage/mem":         {"internal/storage"},
	"internal/storage/cow":         {"internal/storage", "internal/cow", "internal/vfs"},
	"internal/storage/all":         {"internal/storage", "internal/storage/mem", "internal/storage/cow"},

	"internal/remote": {"internal/rpc"},

	"internal/api": {
		"internal/xapi", "internal/db", "internal/storage", "internal/rpc", "internal/schedule", "internal/users",
		"internal/claim", "internal/diskcopy", "internal/event", "internal/where", "internal/login", "internal/ova", "internal/rbac", "internal/sexpr",
	},
	"internal/xecmd": {"internal/api", "internal/xapi", "internal/thincli", "internal/typo", "internal/wordwrap"},
	"internal/server": {
		"internal/api", "internal/xapi", "internal/rpc", "internal/xecmd", "internal/thincli",
		"internal/storage", "internal/vhd", "internal/nbd", "internal/qcow2", "internal/vmdk", "internal/xva", "internal/remote", "internal/typo", "internal/server/web",
	},
	"internal/server/web": {},

	"cmd/coppice": {"*"},
	"cmd/xe":      {"internal/thincli"},
	"bench":       {"*"},
	"test/script": {},
}

type goPackage struct {
	ImportPath string
	Doc        string
	Name       string
	GoFiles    []string
	Imports    []string
}

// listPackages returns every package of the module that has product code.
func listPackages(t *testing.T) []goPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Doc,Name,GoFiles,Imports", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []goPackage
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if len(p.GoFiles) > 0 {
			pkgs = append(pkgs, p)
		}
	}
	if len(pkgs) < 10 {
		t.Fatalf("go list found only %d packages", len(pkgs))
	}
	return pkgs
}

func TestImports(t *testing.T) {
	for _, p := range listPackages(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		allowed, ok := mayImport[name]
		if !ok {
			t.Errorf("%s is not in the import table: add it with what it may import", name)
			continue
		}
		if slices.Contains(allowed, "*") {
			continue
		}
		for _, imp := range p.Imports {
			ours, ok := strings.CutPrefix(imp, module)
			if ok && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s, which the import table does not allow", name, ours)
			}
		}
	}
}

func TestPackageComments(t *testing.T) {
	for _, p := range listPackages(t) {
		want := "Package " + p.Name + " "
		if p.Name == "main" {
			parts := strings.Split(p.ImportPath, "/")
			base := parts[len(parts)-1]
			want = "Command " + base + " "
		}
		if !strings.HasPrefix(p.Doc, want) {
			t.Errorf("%s: package comment starts %.40q, want %q…", p.ImportPath, p.Doc, want)
		}
	}
}
