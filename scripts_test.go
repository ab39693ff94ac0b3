package coppice_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestFuzzScript runs scripts/fuzz over one target whose runs end as told, one
// after the other: only a bare deadline, which Go reports by mistake, may be
// followed by another run, and only by one.
func TestFuzzScript(t *testing.T) {
	t.Parallel()
	const (
		pass     = "PASS\n"
		deadline = "--- FAIL: FuzzOne (10.10s)\n    context deadline exceeded\nFAIL\n"
		crasher  = "--- FAIL: FuzzOne (0.03s)\n    --- FAIL: FuzzOne (0.00s)\n        one_test.go:4: context deadline exceeded\n" +
			"    Failing input written to testdata/fuzz/FuzzOne/5838cdfae7b16cde\nFAIL\n"
		hang  = "--- FAIL: FuzzOne (10.10s)\n    context deadline exceeded\n    fuzzing process hung or terminated unexpectedly: exit status 2\nFAIL\n"
		build = "./one_test.go:3:1: syntax error\nFAIL\n"
	)
	script, err := filepath.Abs("scripts/fuzz")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name     string
		runs     []string
		want     int // runs that are made
		succeeds bool
	}{
		{"pass", []string{pass}, 1, true},
		{"deadline once", []string{deadline, pass}, 2, true},
		{"deadline twice", []string{deadline, deadline, pass}, 2, false},
		{"crasher", []string{crasher, pass}, 1, false},
		{"crasher after deadline", []string{deadline, crasher, pass}, 2, false},
		{"hang", []string{hang, pass}, 1, false},
		{"does not compile", []string{build, pass}, 1, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			files := map[string]string{
				"one_test.go": "package one\n\nfunc FuzzOne(f *testing.F) {}\n",
				// The nth call prints output.n and fails unless that says PASS.
				"bin/go": "#!/usr/bin/env bash\necho \"$*\" >>calls\nn=$(wc -l <calls)\ncat output.$n\ngrep -q '^PASS' output.$n\n",
			}
			for i, output := range tc.runs {
				files["output."+string(rune('1'+i))] = output
			}
			for name, content := range files {
				path := filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			for _, args := range [][]string{{"init", "-q"}, {"add", "one_test.go"}} {
				git := exec.Command("git", args...)
				git.Dir = dir
				if out, err := git.CombinedOutput(); err != nil {
					t.Fatalf("git %v: %v\n%s", args, err, out)
				}
			}

			fuzz := exec.Command(script, "10s")
			fuzz.Dir = dir
			fuzz.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
			out, err := fuzz.CombinedOutput()
			if (err == nil) != tc.succeeds {
				t.Errorf("success is %t, want %t; the script printed\n%s", err == nil, tc.succeeds, out)
			}
			calls, err := os.ReadFile(filepath.Join(dir, "calls"))
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Count(string(calls), "-fuzz ^FuzzOne$ -fuzztime 10s"); got != tc.want {
				t.Errorf("%d runs, want %d; the script printed\n%s", got, tc.want, out)
			}
		})
	}
}
