// Package readme runs the commands of README.md as a reader would.
package readme

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// gate are the two commands that do everything; .ci/run runs them.
var gate = []string{"make demo", "make test"}

// TestCommands runs every shell block of README.md, in order, in one shell at
// the root of the repository, each line echoed before it runs.
func TestCommands(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	ci, err := os.ReadFile(filepath.Join(root, ".ci", "run"))
	if err != nil {
		t.Fatal(err)
	}

	var script strings.Builder
	// Whatever happens, no server of ours outlives the test.
	script.WriteString("trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\nset -x\n")
	blocks := regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(string(readme), -1)
	seen := 0
	for _, b := range blocks {
		command := strings.TrimSpace(b[1])
		gated := false
		for _, g := range gate {
			gated = gated || command == g
		}
		if gated {
			if !regexp.MustCompile(`(?m)\b` + command + `( STOP=1)?$`).Match(ci) {
				t.Errorf(".ci/run does not run %q", command)
			}
			seen++
			continue
		}
		script.WriteString(b[1])
	}
	if seen != len(gate) || len(blocks) < 8 {
		t.Fatalf("README.md has %d shell blocks, %d of them the two commands", len(blocks), seen)
	}

	home := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", script.String())
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "HOME="+home, "TMPDIR="+home, "GOCACHE="+goEnv(t, "GOCACHE"), "GOMODCACHE="+goEnv(t, "GOMODCACHE"), "GOFLAGS=-modcacherw")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		logs, _ := filepath.Glob(filepath.Join(home, "*", "log"))
		for _, l := range logs {
			text, _ := os.ReadFile(l)
			out = append(out, "\n--- the server's log:\n"+string(text)...)
		}
		t.Fatalf("README commands: %v\n%s", err, out)
	}
}

func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}
