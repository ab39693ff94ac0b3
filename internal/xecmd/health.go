package xecmd

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
)

// healthCommands look after the storage. They are extensions of this server.
func healthCommands() []command {
	return []command{
		{
			name: "sr-scrub", required: []string{"uuid"}, optional: []string{"rate"},
			help: "Verify everything that an SR stores, while it is in use, at most 'rate' bytes per second. Prints what is damaged. An extension of this server.",
			run:  srScrub,
		},
		{
			name: "sr-space", required: []string{"uuid"},
			help: "Measure what each VDI of an SR has of its own, and note it in its sm-config. Prints the sum in bytes. An extension of this server.",
			run:  srSpace,
		},
		{
			name: "vdi-would-free", required: []string{"uuid"},
			help: "Print how many bytes come back when a VDI, or several together whose uuids are parted by commas, are destroyed. An extension of this server.",
			run:  vdiWouldFree,
		},
	}
}

// plugin calls a function of the server's own plugin and decodes its answer.
func (r *run) plugin(ctx context.Context, fn string, args map[string]any, answer any) error {
	host, err := r.srHost(ctx, true)
	if err != nil {
		return err
	}
	text, err := r.callText(ctx, "host.call_plugin", host, "coppice", fn, args)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(text), answer); err != nil {
		return fmt.Errorf("answer of %s: %w", fn, err)
	}
	return nil
}

func srScrub(ctx context.Context, r *run) error {
	args := map[string]any{"sr": r.args.str("uuid")}
	if r.args.has("rate") {
		rate, err := r.args.size("rate")
		if err != nil {
			return err
		}
		args["rate"] = strconv.FormatInt(rate, 10)
	}
	var found struct {
		Problems []struct {
			VDI            string
			Offset, Length int64
			Detail, Done   string
		}
		More int
	}
	if err := r.plugin(ctx, "sr-scrub", args, &found); err != nil {
		return err
	}
	bad := found.More
	for _, p := range found.Problems {
		text := p.Detail
		if p.VDI != "" {
			text = fmt.Sprintf("%s offset %d length %d: %s", p.VDI, p.Offset, p.Length, text)
		}
		if p.Done == "" {
			bad++
		} else {
			text += ": " + p.Done
		}
		r.out.direct(text)
	}
	if bad > 0 {
		return failf("%d problems found", bad)
	}
	return nil
}

func srSpace(ctx context.Context, r *run) error {
	var space struct{ Bytes int64 }
	if err := r.plugin(ctx, "sr-space", map[string]any{"sr": r.args.str("uuid")}, &space); err != nil {
		return err
	}
	r.out.list(strconv.FormatInt(space.Bytes, 10))
	return nil
}

func vdiWouldFree(ctx context.Context, r *run) error {
	var freed struct{ Bytes int64 }
	if err := r.plugin(ctx, "vdi-would-free", map[string]any{"vdis": r.args.str("uuid")}, &freed); err != nil {
		return err
	}
	r.out.list(strconv.FormatInt(freed.Bytes, 10))
	return nil
}
