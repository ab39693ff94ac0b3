package coppice_test

import (
	"bytes"
	"go/ast"
	"go/doc"
	"go/doc/comment"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestFormatDocuments holds doc/format against the package comments that it
// is rendered from: a format is specified beside the code that reads it.
func TestFormatDocuments(t *testing.T) {
	for file, pkg := range map[string]string{
		"doc/format/cow.md":   "internal/cow",
		"doc/format/vmdk.md":  "internal/vmdk",
		"doc/format/xva.md":   "internal/xva",
		"doc/format/vhd.md":   "internal/vhd",
		"doc/format/qcow2.md": "internal/qcow2",
		"doc/format/xe.md":    "internal/thincli",
	} {
		want := renderPackageComment(t, pkg)
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s is out of date (make generate); want → got:\n%s", file, diff)
		}
	}
}

// renderPackageComment returns the package comment of a directory as Markdown.
func renderPackageComment(t *testing.T, dir string) []byte {
	t.Helper()
	sources, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, s := range sources {
		if strings.HasSuffix(s, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, s, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	p, err := doc.NewFromFiles(fset, files, "coppice/"+dir)
	if err != nil {
		t.Fatal(err)
	}
	pr := p.Printer()
	pr.HeadingLevel = 2
	pr.HeadingID = func(*comment.Heading) string { return "" }
	pr.DocLinkURL = func(*comment.DocLink) string { return "" }
	var out bytes.Buffer
	out.WriteString("# Package " + p.Name + "\n\n<!-- Rendered from the package comment of " + dir + ": make generate -->\n\n")
	out.Write(pr.Markdown(p.Parser().Parse(p.Doc)))
	return out.Bytes()
}
