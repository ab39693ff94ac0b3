package main

import (
	"bytes"
	"context"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"coppice/internal/vfs"
)

// asCoppice makes the test binary be coppice, so that tests can start the
// real thing and kill it.
const asCoppice = "COPPICE_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asCoppice) != "" {
		main()
	}
	os.Exit(m.Run())
}

// output is what a command run inside the test left behind.
type output struct {
	code           int
	stdout, stderr string
}

func runCommand(t *testing.T, args ...string) output {
	t.Helper()
	var stdout, stderr bytes.Buffer
	vars := map[string]string{"HOME": t.TempDir()}
	code := run(t.Context(), env{
		stdin: strings.NewReader(""), stdout: &stdout, stderr: &stderr,
		getenv: func(k string) string { return vars[k] },
	}, args)
	return output{code, stdout.String(), stderr.String()}
}

func TestExitCodes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fresh := func() string { return filepath.Join(t.TempDir(), "data") }
	tests := []struct {
		args []string
		code int
		want string // in what it prints
	}{
		{nil, exitUnusable, "Usage: coppice COMMAND"},
		{[]string{"help"}, exitOK, "Usage: coppice COMMAND"},
		{[]string{"fly"}, exitUnusable, `there is no command "fly"`},
		{[]string{"version"}, exitOK, "built with go"},
		{[]string{"version", "x"}, exitUnusable, `unexpected argument "x"`},
		{[]string{"--version"}, exitOK, "built with go"},
		{[]string{"serve", "-h"}, exitOK, "--admin-password-file file"},
		{[]string{"help", "serve"}, exitOK, "--admin-password-file file"},
		{[]string{"help", "fly"}, exitUnusable, `there is no command "fly"`},
		{[]string{"serve", "--fly"}, exitUnusable, "flag provided but not defined"},
		{[]string{"serve", "--dat", file}, exitUnusable, "Did you mean --data?"},
		{[]string{"serve", "--log-level", "loud"}, exitUnusable, "loud"},
		{[]string{"serve", "--tls-cert", file}, exitUnusable, "--tls-cert and --tls-key go together"},
		{[]string{"serve", "--http", "off", "--https", "off"}, exitUnusable, "nothing to listen at"},
		{[]string{"serve", "--grace", "0s"}, exitUnusable, "--grace must be more"},
		{[]string{"serve", "--data", file}, exitUnusable, file},
		{[]string{"serve", "--data", fresh(), "--http", "0.0.0.0:0"}, exitUnusable, "loopback addresses only"},
		{[]string{"serve", "--data", ""}, exitUnusable, "a variable that is not set"},
		{[]string{"check", "--data="}, exitUnusable, "a variable that is not set"},
		{[]string{"serve", "--data", fresh(), "--http", "nonsense"}, exitUnusable, "--http nonsense: not an address"},
		{[]string{"serve", "--data", fresh(), "--https", "127.0.0.1:84430"}, exitUnusable, "Write ADDRESS:PORT"},
		{[]string{"serve", "--data", fresh(), "--listen", "http://127.0.0.1:84430"}, exitUnusable, "not an address"},
		{[]string{"serve", "--data", fresh(), "--http", "off", "--https", "127.0.0.1:0", "--listen", "ftp://x"}, exitUnusable, "not an address"},
		{[]string{"serve", "--data", fresh(), "--tls-cert", file, "--tls-key", file}, exitUnusable, "certificate " + file},
		{[]string{"serve", "--data", fresh(), "--admin-password-file", file}, exitUnusable, "is empty"},
		{[]string{"serve", "--data", fresh() + strings.Repeat("/long", 30), "--http", "127.0.0.1:0", "--https", "127.0.0.1:0"}, exitUnusable, "longer than 107 bytes"},
		{[]string{"check", "--data", fresh()}, exitUnusable, `"coppice serve" makes it`},
		{[]string{"check", file}, exitUnusable, file},
		{[]string{"check", "--accept-loss", file}, exitUnusable, "--accept-loss goes with --repair"},
		{[]string{"scrub", "--data", fresh()}, exitUnusable, `"coppice serve" makes it`},
		{[]string{"scrub", "--rate", "-1", file}, exitUnusable, "--rate -1 is not"},
		{[]string{"scrub", t.TempDir()}, exitUnusable, "no store here"},
		{[]string{"dump", "--data", fresh()}, exitUnusable, "no such file"},
		{[]string{"dump", t.TempDir()}, exitUnusable, "no store here"},
		{[]string{"dump", "a", "b"}, exitUnusable, `unexpected argument "b"`},
		{[]string{"doctor", "--data", fresh(), "--http", "127.0.0.1:0", "--https", "off"}, exitOK, "not there yet"},
		{[]string{"doctor", "--data", file}, exitBadNews, "not a directory"},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			got := runCommand(t, tt.args...)
			if got.code != tt.code || !strings.Contains(got.stdout+got.stderr, tt.want) {
				t.Errorf("exit code %d, want %d; want %q in:\n%s%s", got.code, tt.code, tt.want, got.stdout, got.stderr)
			}
		})
	}
}

func TestDataDir(t *testing.T) {
	tests := []struct {
		flag, xdg, home string
		want            string // "" for an error
	}{
		{"", "", "/home/u", "/home/u/.local/state/coppice"},
		{"", "/state", "/home/u", "/state/coppice"},
		{"", "relative", "/home/u", "/home/u/.local/state/coppice"}, // as its specification says
		{"", "", "", ""},
		{"/data", "/state", "/home/u", "/data"},
		{"/data/../x", "", "", "/x"},
	}
	for _, tt := range tests {
		vars := map[string]string{"XDG_STATE_HOME": tt.xdg, "HOME": tt.home}
		got, err := env{getenv: func(k string) string { return vars[k] }}.dataDir(tt.flag)
		if string(got) != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%+v: got %q, %v", tt, got, err)
		}
	}
}

func TestRootPassword(t *testing.T) {
	dir, err := vfs.CreateDir(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	// A start that fails on the way keeps nothing: nobody has seen the password.
	lost, err := findPassword(dir, "")
	if err != nil || lost.created == "" {
		t.Fatalf("first start: %+v, %v", lost, err)
	}
	first, err := findPassword(dir, "")
	if err != nil || len(first.created) != 23 || first.created == lost.created || strings.Contains(first.verifier, first.created) {
		t.Fatalf("first start again: %+v, %v", first, err)
	}
	if err := first.keep(dir); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir.Path(), passwordFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; want mode 0600", info.Mode(), err)
	}
	second, err := findPassword(dir, "")
	if err != nil || second.created != "" || second.verifier != first.verifier {
		t.Errorf("second start: %+v, %v", second, err)
	}
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte("my own\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	given, err := findPassword(dir, file)
	if err != nil || given.created != "" || given.verifier == first.verifier {
		t.Errorf("with a file: %+v, %v", given, err)
	}
	if err := given.keep(dir); err != nil {
		t.Fatal(err)
	}
	if last, err := findPassword(dir, ""); err != nil || last.verifier != given.verifier {
		t.Errorf("the password from the file was not kept: %+v, %v", last, err)
	}
	// The same file again writes nothing, which a full disk would not let it.
	if again, err := findPassword(dir, file); err != nil || !again.kept || again.verifier != given.verifier {
		t.Errorf("with the same file: %+v, %v", again, err)
	}
	if _, err := findPassword(dir, file+"x"); err == nil {
		t.Error("a missing password file was accepted")
	}
}

func TestListen(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "sock")
	if err := os.WriteFile(socket, []byte("left over"), 0o600); err != nil {
		t.Fatal(err)
	}
	eps, err := addresses{http: "localhost:0", https: off, more: []string{"http://127.0.0.1:0/"}}.listen(t.Context(), nil, socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = eps.close() })
	var schemes []string
	for _, ep := range eps {
		schemes = append(schemes, ep.scheme)
	}
	if got := strings.Join(schemes, " "); got != "http http unix" {
		t.Errorf("listening at %s", got)
	}
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want mode 0600", info, err)
	}
	taken, _ := eps.first("http")
	_, err = addresses{http: taken.Addr().String(), https: off}.listen(context.Background(), nil, socket+"2")
	if err == nil || !strings.Contains(err.Error(), "the port is in use") {
		t.Errorf("a taken port: %v", err)
	}
	if _, err := os.Stat(socket + "2"); err == nil {
		t.Error("the failed attempt left a socket behind")
	}
}

func TestXEArgs(t *testing.T) {
	open := func(a addresses) *instance {
		a.https, a.more = off, nil
		eps, err := a.listen(t.Context(), nil, filepath.Join(t.TempDir(), "sock"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = eps.close() })
		return &instance{endpoints: eps}
	}
	i := open(addresses{http: "127.0.0.1:0"})
	_, port := i.endpoints[0].hostPort()
	if got, _ := i.xeArgs("pw"); got != "server=127.0.0.1,port="+port+",nossl=true,username=root,password=pw" {
		t.Errorf("got %s", got)
	}
	i.endpoints[0].scheme = "https"
	if got, _ := i.xeArgs("pw"); got != "server=localhost,port="+port+",username=root,password=pw" {
		t.Errorf("got %s", got)
	}
	if got, ok := open(addresses{http: off}).xeArgs("pw"); ok {
		t.Errorf("without an address: %s", got)
	}
}

// TestHelpWidth says that help fits a terminal, and that no flag is missing from it.
func TestHelpWidth(t *testing.T) {
	for _, c := range commands() {
		got := runCommand(t, c.name, "-h")
		if got.code != exitOK || got.stderr != "" {
			t.Errorf("%s: exit code %d, %q on stderr", c.name, got.code, got.stderr)
		}
		for line := range strings.Lines(got.stdout) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > helpWidth {
				t.Errorf("%s: %d columns: %s", c.name, n, line)
			}
		}
	}
	serveHelp := runCommand(t, "serve", "-h").stdout
	new(serveOptions).flags().VisitAll(func(f *flag.Flag) {
		if !strings.Contains(serveHelp, "  --"+f.Name) {
			t.Errorf("help does not explain --%s", f.Name)
		}
	})
}
