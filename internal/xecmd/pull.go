package xecmd

import (
	"context"
	"encoding/json"
	"fmt"
	"html"
	"strings"
)

// pullArgs are the parameters of vdi-pull that are passed on as they are, and
// those that name a file of the client with the value.
var (
	pullArgs  = []string{"remote-username", "remote-password", "remote-session", "remote-fingerprint", "remote-insecure", "format", "full"}
	pullFiles = map[string]string{"remote-password-filename": "remote-password", "remote-ca-filename": "remote-ca"}
)

// pullCommands are those that fetch disks from other servers.
func pullCommands() []command {
	return []command{{
		name: "vdi-pull", required: []string{"remote-url", "remote-vdi-uuid"},
		optional: []string{
			"remote-username", "remote-password", "remote-password-filename", "remote-session",
			"remote-fingerprint", "remote-ca-filename", "remote-insecure", "sr-uuid", "uuid", "format", "full", "progress",
		},
		help: "Make a VDI of one of another XenAPI server, or bring the VDI uuid=, which was made so of a snapshot, up to date with a later snapshot: only what has changed is moved, and only if the VDI has not been changed here. full=true replaces all of its contents. The server is recognised by the SHA-256 of its certificate (remote-fingerprint=, several with commas), by a certificate authority (remote-ca-filename=), or not at all (remote-insecure=true). Prints the uuid of the VDI. An extension of this server.",
		run:  vdiPull,
	}}
}

func vdiPull(ctx context.Context, r *run) error {
	args := map[string]any{"remote-url": r.args.str("remote-url"), "remote-vdi": r.args.str("remote-vdi-uuid")}
	for _, name := range pullArgs {
		if v, ok := r.args.lookup(name); ok {
			args[name] = v
		}
	}
	for file, name := range pullFiles {
		v, ok := r.args.lookup(file)
		if !ok {
			continue
		}
		data, err := r.conn.Load(ctx, v)
		if err != nil {
			return failf("Failed to read file '%s'", v)
		}
		args[name] = strings.TrimRight(string(data), "\r\n")
	}
	for param, name := range map[string]string{"uuid": "vdi", "sr-uuid": "sr"} {
		if v, ok := r.args.lookup(param); ok {
			args[name] = v
		}
	}
	host, err := r.srHost(ctx, true)
	if err != nil {
		return err
	}
	result, err := r.follow(ctx, "host.call_plugin", host, "coppice", "vdi-pull", args)
	if err != nil {
		return err
	}
	var pulled struct{ VDI string }
	text := html.UnescapeString(strings.TrimSuffix(strings.TrimPrefix(result, "<value>"), "</value>"))
	if err := json.Unmarshal([]byte(text), &pulled); err != nil {
		return fmt.Errorf("answer of vdi-pull: %w", err)
	}
	r.out.list(pulled.VDI)
	return nil
}
