package server

import (
	"os"
	"os/exec"
	"testing"
)

// tool returns the path of a program. Without it the test is skipped, except
// where the tools are part of the environment.
func tool(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("%s is not installed; CI needs it", name)
		}
		t.Skipf("%s is not installed (Debian package %s)", name, pkg)
	}
	return path
}

func putFile(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func getFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
