package coppice_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// quicktestIDs name the behaviours that the test suite of XenAPI servers
// asserts.
var quicktestIDs = strings.Fields(`
	VDI_1 VDI_2 VDI_3 VDI_4 VDI_5 VDI_6 VDI_7 VDI_8 VDI_9 VDI_10 VDI_11 VDI_12 VDI_13
	SR_1 SR_2 SR_3 SR_4
	SNAP_1 SNAP_2 REV_1 REV_2 REV_3 REV_4 REV_5
	CBT_1 CBT_2 CBT_3 CBT_4 CBT_5 CBT_6 CBT_7
	COPY_1 INT_1 INT_2 INT_3 INT_4 INT_5 INT_D MAX_1 MAX_2
	IMP_1 ASYNC_1
	EV_1 EV_2 EV_3 EV_4 EV_5 EV_6 EV_7 EV_8
	MSG_1 DATE_1 DATE_2 OBJ_1
	HTTP_1 HTTP_2 HTTP_3
	XVA_1 STATIC_1 LIFE`)

// Each behaviour has one test, TestQT_ and its id.
func TestQuicktestIDs(t *testing.T) {
	declared := regexp.MustCompile(`(?m)^func TestQT_(\w+)\(t \*testing\.T\)`)
	var found []string
	err := filepath.WalkDir("internal", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range declared.FindAllSubmatch(source, -1) {
			found = append(found, string(m[1]))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range quicktestIDs {
		if n := len(slices.DeleteFunc(slices.Clone(found), func(f string) bool { return f != id })); n != 1 {
			t.Errorf("QT_%s has %d tests", id, n)
		}
	}
	for _, id := range found {
		if !slices.Contains(quicktestIDs, id) {
			t.Errorf("TestQT_%s: no such behaviour", id)
		}
	}
}
