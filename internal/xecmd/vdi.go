package xecmd

import (
	"context"
	"maps"
	"slices"
	"strings"

	"coppice/internal/xapi"
)

func vdiCommands() []command {
	uuid := []string{"uuid"}
	return []command{
		{
			name: "vdi-create", required: []string{"sr-uuid", "name-label", "virtual-size"},
			optional: []string{"type", "sharable", "sm-config:", "tags:"},
			help:     "Create a VDI. Type is 'system' 'user' 'suspend' or 'crashdump'.", run: vdiCreate,
		},
		{name: "vdi-destroy", required: uuid, help: "Destroy a specified VDI.", run: send("VDI", "VDI.destroy")},
		{name: "vdi-forget", required: uuid, help: "Forget about a VDI.", run: send("VDI", "VDI.forget")},
		{name: "vdi-update", required: uuid, help: "Refresh the fields of the VDI object in the database.", run: send("VDI", "VDI.update")},
		{name: "vdi-enable-cbt", required: uuid, help: "Enable changed block tracking on a VDI.", run: send("VDI", "VDI.enable_cbt")},
		{name: "vdi-disable-cbt", required: uuid, help: "Disable changed block tracking on a VDI.", run: send("VDI", "VDI.disable_cbt")},
		{name: "vdi-data-destroy", required: uuid, help: "Delete the data of the VDI, but keep its changed block tracking metadata.", run: send("VDI", "VDI.data_destroy")},
		{
			name: "vdi-unlock", required: uuid, optional: []string{"force"},
			help: "Attempt to unlock a VDI.", run: vdiUnlock,
		},
		{
			name: "vdi-snapshot", required: uuid, optional: []string{"driver-params-"},
			help: "Snapshot a specified VDI.", run: vdiSnapshot,
		},
		{
			name: "vdi-clone", required: uuid, optional: []string{"driver-params-", "new-name-label", "new-name-description"},
			help: "Clone a specified VDI.", run: vdiClone,
		},
		{
			name: "vdi-revert", required: uuid, optional: []string{"undo"},
			help: "Revert a VDI to the snapshot specified by the uuid. The VDI keeps its own uuid; newer snapshots of it stay. Unless undo=false, a snapshot of the present contents is taken first; it replaces the one of the revert before. Reverting to it undoes the revert. An extension of this server.",
			run:  vdiRevert,
		},
		{
			name: "vdi-copy", required: uuid, optional: []string{"base-vdi-uuid", "sr-uuid", "into-vdi-uuid", "progress"},
			aliases: map[string]string{"base": "base-vdi-uuid", "base-uuid": "base-vdi-uuid"},
			help:    "Copy a VDI either into an SR (sr-uuid) or onto an existing VDI (into-vdi-uuid). With base-vdi-uuid only what differs from that VDI is copied.",
			run:     vdiCopy,
		},
		{
			name: "vdi-pool-migrate", required: []string{"uuid", "sr-uuid"}, optional: []string{"dest-img-format", "progress"},
			help: "Migrate a VDI to a specified SR, while the VDI may be attached to a running guest.", run: vdiPoolMigrate,
		},
		{
			name: "vdi-resize", required: []string{"uuid", "disk-size"}, optional: []string{"online"},
			help: "Resize a VDI.", run: vdiResize,
		},
		{
			name: "vdi-introduce", required: []string{"uuid", "sr-uuid", "type", "location"},
			optional: []string{
				"name-label", "name-description", "sharable", "read-only", "managed",
				"other-config:", "xenstore-data:", "sm-config:",
			},
			help: "Create a VDI object representing an existing disk.", run: vdiIntroduce,
		},
		{
			name: "vdi-export", required: []string{"uuid", "filename"}, optional: []string{"format", "base", "progress"},
			aliases: map[string]string{"base-vdi-uuid": "base", "base-uuid": "base"},
			help:    "Export what a VDI contains at this moment to a file of the client. format is raw, as without it, vhd, qcow2, vmdk or tar. With base=<uuid of a VDI>, only what differs from that one: as vhd or qcow2, or as raw, in which the rest is zero.", run: vdiExport,
		},
		{
			name: "vdi-import", required: []string{"uuid", "filename"}, optional: []string{"format", "progress"},
			help: "Overwrite a VDI with a file of the client. format is raw, as without it, vhd, qcow2, vmdk or tar. A vhd or qcow2 that was exported with base= changes only what differed, and where a whole image has nothing the disk keeps what it had: for an exact copy import into a new VDI.", run: vdiImport,
		},
		{
			name: "vdi-list-changed-blocks", required: []string{"vdi-from-uuid", "vdi-to-uuid"},
			help: "Write the changed blocks between the two given VDIs to the standard output as a base64-encoded bitmap string.", run: vdiListChangedBlocks,
		},
	}
}

func vdiCreate(ctx context.Context, r *run) error {
	sr, err := r.ref(ctx, "SR", "sr-uuid")
	if err != nil {
		return err
	}
	size, err := r.args.size("virtual-size")
	if err != nil {
		return err
	}
	sharable, err := r.args.boolean("sharable", false)
	if err != nil {
		return err
	}
	kind, ok := r.args.lookup("type")
	if !ok {
		kind = "user"
	}
	if !slices.Contains([]string{"system", "user", "suspend", "crashdump"}, kind) {
		return failf("Unknown vdi type: %s", kind)
	}
	tags := []any{}
	for _, tag := range slices.Sorted(maps.Keys(r.args.pairs("tags"))) {
		tags = append(tags, tag)
	}
	vdi, err := r.callText(ctx, "VDI.create", map[string]any{
		"name_label": r.args.str("name-label"), "name_description": "", "SR": sr, "virtual_size": size, "type": kind,
		"sharable": sharable, "read_only": false, "other_config": map[string]any{}, "xenstore_data": map[string]any{},
		"sm_config": r.args.pairs("sm-config"), "tags": tags,
	})
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "VDI", vdi)
}

func vdiUnlock(ctx context.Context, r *run) error {
	if !r.args.flag("force") {
		return errForce
	}
	return send("VDI", "VDI.force_unlock")(ctx, r)
}

// errForce refuses an operation that needs --force.
var errForce = failf("This operation is dangerous and may cause data loss. This operation must be forced (use --force).")

func vdiSnapshot(ctx context.Context, r *run) error {
	vdi, err := r.ref(ctx, "VDI", "uuid")
	if err != nil {
		return err
	}
	snapshot, err := r.callText(ctx, "VDI.snapshot", vdi, r.args.pairs("driver-params"))
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "VDI", snapshot)
}

func vdiClone(ctx context.Context, r *run) error {
	vdi, err := r.ref(ctx, "VDI", "uuid")
	if err != nil {
		return err
	}
	clone, err := r.callText(ctx, "VDI.clone", vdi, r.args.pairs("driver-params"))
	if err != nil {
		return err
	}
	for _, field := range []string{"name-label", "name-description"} {
		if name, ok := r.args.lookup("new-" + field); ok {
			if err := r.do(ctx, "VDI.set_"+strings.ReplaceAll(field, "-", "_"), clone, name); err != nil {
				return err
			}
		}
	}
	return r.printUUID(ctx, "VDI", clone)
}

func vdiRevert(ctx context.Context, r *run) error {
	if err := r.chooseUndo(); err != nil {
		return err
	}
	return send("VDI", "VDI.revert")(ctx, r)
}

func vdiCopy(ctx context.Context, r *run) error {
	vdi, err := r.ref(ctx, "VDI", "uuid")
	if err != nil {
		return err
	}
	if r.args.has("sr-uuid") == r.args.has("into-vdi-uuid") {
		return failf("Please specify one but not both of: a destination sr-uuid; and a destination into-vdi-uuid")
	}
	params := []any{vdi}
	for _, p := range []struct{ class, name string }{{"SR", "sr-uuid"}, {"VDI", "base-vdi-uuid"}, {"VDI", "into-vdi-uuid"}} {
		ref, err := r.optionalRef(ctx, p.class, p.name)
		if err != nil {
			return err
		}
		params = append(params, ref)
	}
	made, err := r.made(ctx, "VDI.copy", params...)
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "VDI", made)
}

func vdiPoolMigrate(ctx context.Context, r *run) error {
	vdi, err := r.ref(ctx, "VDI", "uuid")
	if err != nil {
		return err
	}
	sr, err := r.ref(ctx, "SR", "sr-uuid")
	if err != nil {
		return err
	}
	options := map[string]any{}
	if format, ok := r.args.lookup("dest-img-format"); ok {
		options["dest_img_format"] = format
	}
	moved, err := r.made(ctx, "VDI.pool_migrate", vdi, sr, options)
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "VDI", moved)
}

func vdiResize(ctx context.Context, r *run) error {
	vdi, err := r.ref(ctx, "VDI", "uuid")
	if err != nil {
		return err
	}
	size, err := r.args.size("disk-size")
	if err != nil {
		return err
	}
	if r.args.flag("online") {
		return r.do(ctx, "VDI.resize_online", vdi, size)
	}
	return r.do(ctx, "VDI.resize", vdi, size)
}

func vdiIntroduce(ctx context.Context, r *run) error {
	sr, err := r.ref(ctx, "SR", "sr-uuid")
	if err != nil {
		return err
	}
	var flags [3]bool
	for i, p := range []struct {
		name      string
		otherwise bool
	}{{"sharable", false}, {"read-only", false}, {"managed", true}} {
		if flags[i], err = r.args.boolean(p.name, p.otherwise); err != nil {
			return err
		}
	}
	kind, err := enumValue(xapi.ClassOf[xapi.VDI]().Field("type").Type, r.args.str("type"))
	if err != nil {
		return failf("Unknown vdi type: %s", r.args.str("type"))
	}
	vdi, err := r.callText(ctx, "VDI.introduce",
		r.args.str("uuid"), r.args.str("name-label"), r.args.str("name-description"), sr, kind, flags[0], flags[1],
		r.args.pairs("other-config"), r.args.str("location"), r.args.pairs("xenstore-data"), r.args.pairs("sm-config"), flags[2])
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "VDI", vdi)
}

func vdiListChangedBlocks(ctx context.Context, r *run) error {
	from, err := r.ref(ctx, "VDI", "vdi-from-uuid")
	if err != nil {
		return err
	}
	to, err := r.ref(ctx, "VDI", "vdi-to-uuid")
	if err != nil {
		return err
	}
	bitmap, err := r.callText(ctx, "VDI.list_changed_blocks", from, to)
	if err != nil {
		return err
	}
	r.out.direct(bitmap)
	return nil
}
