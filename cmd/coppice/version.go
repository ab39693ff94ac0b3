package main

import (
	"context"
	"flag"
	"fmt"
	"runtime/debug"
	"strings"
)

// version prints what was built from what.
func version(_ context.Context, e env, args []string) error {
	fs := flag.NewFlagSet("version", flag.ContinueOnError)
	if err := parse(e, fs, args, 0); err != nil {
		return err
	}
	b := readBuild()
	fmt.Fprintf(e.stdout, "coppice %s\n", b.version)
	if b.revision != "" {
		fmt.Fprintf(e.stdout, "revision %s\n", b.revision)
	}
	fmt.Fprintf(e.stdout, "built with %s for %s\n", b.goVersion, b.platform)
	return nil
}

// build is what the linker noted about this binary.
type build struct {
	version   string // module version, "devel" when there is none
	revision  string // commit and its time, "" when unknown
	goVersion string
	platform  string
}

func readBuild() build {
	b := build{version: "devel", goVersion: "an unknown Go", platform: "an unknown platform"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	b.goVersion = info.GoVersion
	if v := info.Main.Version; v != "" && v != "(devel)" {
		b.version = strings.TrimPrefix(v, "v")
	}
	set := make(map[string]string)
	for _, s := range info.Settings {
		set[s.Key] = s.Value
	}
	b.platform = set["GOOS"] + "/" + set["GOARCH"]
	if rev := set["vcs.revision"]; rev != "" {
		b.revision = rev + " of " + set["vcs.time"]
		if set["vcs.modified"] == "true" {
			b.revision += ", modified"
		}
	}
	return b
}
