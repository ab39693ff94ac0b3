package xecmd

import (
	"context"
	"slices"
	"strings"
)

// nbdCommands are those that tell how disks are reached by NBD.
func nbdCommands() []command {
	return []command{{
		name: "vdi-nbd", required: []string{"uuid"}, optional: []string{"mode", "keep", "seconds"},
		help: "Print the URIs at which a VDI can be reached by NBD, with example commands. mode is ro (the contents of the moment of connecting, the default), rw, or cow (a clone that vanishes with its last connection, or becomes a VDI named keep=). once, tls and tcp contain a token for this disk that lets clients connect for seconds= (60). An extension of this server.",
		run:  vdiNBD,
	}}
}

func vdiNBD(ctx context.Context, r *run) error {
	host, err := r.callText(ctx, "session.get_this_host", string(r.session))
	if err != nil {
		return err
	}
	args := map[string]any{"vdi": r.args.str("uuid")}
	for _, name := range []string{"mode", "keep", "seconds"} {
		if v, ok := r.args.lookup(name); ok {
			args[name] = v
		}
	}
	text, err := r.callText(ctx, "host.call_plugin", host, "coppice", "nbd", args)
	if err != nil {
		return err
	}
	var ways []cell
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		ways = append(ways, cell{key: key, value: value})
	}
	r.out.records(append(ways, nbdExamples(ways, args["mode"])...))
	return nil
}

// nbdExamples are commands that use the first URI of ways.
func nbdExamples(ways []cell, mode any) []cell {
	i := slices.IndexFunc(ways, func(c cell) bool { return strings.HasPrefix(c.value, "nbd") })
	if i < 0 {
		return nil
	}
	uri := "'" + ways[i].value + "'"
	examples := []cell{
		{key: "look", value: "nbdinfo " + uri},
		{key: "copy out", value: "nbdcopy " + uri + " disk.raw"},
	}
	if mode == "rw" || mode == "cow" {
		examples = append(examples,
			cell{key: "copy in", value: "nbdcopy disk.raw " + uri},
			cell{key: "QEMU", value: "qemu-system-x86_64 -drive if=virtio,format=raw,file=" + uri})
	} else {
		examples = append(examples, cell{key: "convert", value: "qemu-img convert -O qcow2 " + uri + " disk.qcow2"})
	}
	rest, socket, ok := strings.Cut(strings.TrimPrefix(ways[i].value, "nbd+unix:///"), "?socket=")
	if ok {
		examples = append(examples, cell{key: "kernel", value: "nbd-client -unix " + socket + " /dev/nbd0 -N " + rest})
	}
	return examples
}
