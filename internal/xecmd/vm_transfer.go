package xecmd

import (
	"context"
	"regexp"
	"strconv"
	"strings"
)

// vmTransferCommands are those that move whole VMs.
func vmTransferCommands() []command {
	metadata := []string{"metadata", "excluded-device-types"}
	compression := map[string]string{"use_compression": "compress", "use-compression": "compress", "compression": "compress"}
	return []command{
		{
			name: "vm-export", required: []string{"filename"},
			optional: append([]string{"preserve-power-state", "compress", "include-snapshots", "task-uuid"}, metadata...),
			selects:  selection{noun: "vm", single: true},
			help:     "Export a VM to <filename>.",
			run: func(ctx context.Context, r *run) error {
				return r.each(ctx, func(row row) error { return r.exportVM(ctx, row.ref) })
			},
		},
		{
			name: "template-export", required: []string{"filename", "template-uuid"}, optional: append([]string{"compress"}, metadata...), aliases: compression,
			help: "Export a template to <filename>.",
			run: func(ctx context.Context, r *run) error {
				vm, err := r.ref(ctx, "VM", "template-uuid")
				if err != nil {
					return err
				}
				return r.exportVM(ctx, vm)
			},
		},
		{
			name: "snapshot-export-to-template", required: []string{"filename", "snapshot-uuid"},
			optional: append([]string{"preserve-power-state", "compress"}, metadata...),
			aliases:  compression,
			help:     "Export a snapshot to <filename>.",
			run: func(ctx context.Context, r *run) error {
				vm, err := r.snapshot(ctx)
				if err != nil {
					return err
				}
				return r.exportVM(ctx, vm)
			},
		},
		{
			name:     "vm-import",
			optional: []string{"filename", "sr-uuid", "preserve", "force", "metadata", "dry-run", "vdi:", "task-uuid", "url", "type"},
			aliases:  map[string]string{"restore": "preserve", "full-restore": "preserve", "full_restore": "preserve", "sr": "sr-uuid", "sr-id": "sr-uuid", "sr_id": "sr-uuid"},
			help:     "Import a VM from <filename>. With preserve=true it keeps its uuid and MAC addresses. With metadata=true only records are imported, whose disks are here already; vdi:<old uuid>=<new uuid> says which one stands for another.",
			run:      vmImport,
		},
	}
}

// bit returns a parameter that is true or false as a part of a URL.
func (r *run) bit(param, name string) (string, error) {
	if !r.args.has(param) {
		return "", nil
	}
	on, err := r.args.boolean(param, false)
	return "&" + name + "=" + strconv.FormatBool(on), err
}

// bits joins parameters that are true or false, in pairs of their names here
// and in a URL.
func (r *run) bits(names ...string) (string, error) {
	var query strings.Builder
	for i := 0; i < len(names); i += 2 {
		part, err := r.bit(names[i], names[i+1])
		if err != nil {
			return "", err
		}
		query.WriteString(part)
	}
	return query.String(), nil
}

// exportVM makes the client fetch a VM.
func (r *run) exportVM(ctx context.Context, vm string) error {
	query, err := r.bits("preserve-power-state", "preserve_power_state", "include-snapshots", "export_snapshots")
	if err != nil {
		return err
	}
	metadata, err := r.args.boolean("metadata", false)
	if err != nil {
		return err
	}
	path := "/export"
	if metadata {
		path = "/export_metadata"
	}
	if compress := r.args.str("compress"); compress != "" {
		query += "&use_compression=" + escaped(compress) // the server knows which there are
	}
	if types := r.args.str("excluded-device-types"); types != "" {
		query += "&excluded_device_types=" + escaped(types)
	}
	if _, err := r.transfer(ctx, "Export of VM", path, "&ref="+vm+query, r.conn.HTTPGet); err != nil {
		return err
	}
	if r.args.str("filename") != "" {
		r.out.direct("Export succeeded")
	}
	return nil
}

// reference finds the references in the result of an import.
var reference = regexp.MustCompile(`OpaqueRef:[0-9a-f-]+`)

// dryUUID stands for the uuids of VMs that would be imported.
const dryUUID = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"

// vmImport makes the client send an archive, and prints the uuids of the VMs.
func vmImport(ctx context.Context, r *run) error {
	switch {
	case r.args.has("url"):
		return failf("Importing from a URL is not supported: use filename.")
	case !r.args.has("filename"):
		return missing("filename")
	case r.args.str("type") != "" && r.args.str("type") != "xva":
		return failf("Only archives of type xva can be imported.")
	}
	query, err := r.bits("preserve", "restore", "force", "force", "dry-run", "dry_run")
	if err != nil {
		return err
	}
	metadata, err := r.args.boolean("metadata", false)
	if err != nil {
		return err
	}
	path := "/import_metadata"
	if metadata {
		for _, p := range r.args.params {
			if old, ok := strings.CutPrefix(p.key, "vdi:"); ok {
				query += "&" + escaped("vdi:"+old) + "=" + escaped(p.value)
			}
		}
	} else {
		path = "/import"
		sr, err := r.defaultSR()
		if r.args.str("sr-uuid") != "" {
			sr, err = r.ref(ctx, "SR", "sr-uuid")
		}
		if err != nil {
			return err
		}
		query += "&sr_id=" + sr
	}
	result, err := r.transfer(ctx, "Import of VM", path, query, r.conn.HTTPPut)
	if err != nil {
		return err
	}
	var uuids []string
	for _, ref := range reference.FindAllString(result, -1) {
		uuid, err := r.callText(ctx, "VM.get_uuid", ref)
		if err != nil {
			return err
		}
		uuids = append(uuids, uuid)
	}
	if len(uuids) == 0 {
		uuids = []string{dryUUID}
	}
	r.out.direct(strings.Join(uuids, ","))
	return nil
}
