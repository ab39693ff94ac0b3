package xecmd

import (
	"context"
	"strings"

	"coppice/internal/xapi"
)

// storageCommands are those about SRs, PBDs and VBDs.
func storageCommands() []command {
	uuid := []string{"uuid"}
	return append(healthCommands(), []command{
		{
			name: "sr-create", required: []string{"name-label", "type"},
			optional: []string{"name-description", "host-uuid", "device-config:", "shared", "physical-size", "content-type", "sm-config:"},
			help:     "Create an SR, also PBDs. With device-config:<key>-filename=<file> the contents of a local file are the value of the key.", run: srCreate,
		},
		{
			name: "sr-introduce", required: []string{"name-label", "type", "uuid"}, optional: []string{"name-description", "shared", "content-type"},
			help: "Introduces an SR (but does not create any PBDs).", run: srIntroduce,
		},
		{name: "sr-destroy", required: uuid, help: "Destroy the SR.", run: send("SR", "SR.destroy")},
		{name: "sr-forget", required: uuid, help: "Forget about the SR.", run: send("SR", "SR.forget")},
		{name: "sr-scan", required: uuid, help: "Force an SR scan, syncing database with VDIs present in underlying storage substrate.", run: send("SR", "SR.scan")},
		{name: "sr-update", required: uuid, help: "Refresh the fields of the SR object in the database.", run: send("SR", "SR.update")},
		{
			name: "sr-probe", required: []string{"type"}, optional: []string{"host-uuid", "device-config:", "sm-config:"},
			help: "Perform a storage probe.", run: srProbe,
		},
		{
			name: "sr-enable-database-replication", required: uuid,
			help: "Enable database replication to the SR.", run: send("SR", "SR.enable_database_replication"),
		},
		{
			name: "sr-disable-database-replication", required: uuid,
			help: "Disable database replication to the SR.", run: send("SR", "SR.disable_database_replication"),
		},
		{
			name: "pbd-create", required: []string{"host-uuid", "sr-uuid"}, optional: []string{"device-config:"},
			help: "Create a PBD. The read-only device-config parameter can only be set on creation.", run: pbdCreate,
		},
		{name: "pbd-plug", required: uuid, help: "Plug a PBD.", run: send("PBD", "PBD.plug")},
		{name: "pbd-unplug", required: uuid, help: "Unplug a PBD.", run: send("PBD", "PBD.unplug")},
		{name: "pbd-destroy", required: uuid, help: "Destroy a PBD.", run: send("PBD", "PBD.destroy")},
		{
			name: "vbd-create", required: []string{"vm-uuid", "device"}, optional: []string{"vdi-uuid", "bootable", "type", "mode", "unpluggable"},
			help: "Create a VBD. Appropriate values for the device field are listed in the parameter 'allowed-VBD-devices' on the VM. If no VDI is specified, an empty VBD will be created. The type parameter can be 'Disk' or 'CD', and the mode is 'RO' or 'RW'.",
			run:  vbdCreate,
		},
		{name: "vbd-destroy", required: uuid, help: "Destroy a VBD.", run: send("VBD", "VBD.destroy")},
		{name: "vbd-plug", required: uuid, help: "Attempt to attach the VBD while the VM is in the running state.", run: send("VBD", "VBD.plug")},
		{
			name: "vbd-unplug", required: uuid, optional: []string{"timeout", "force"},
			help: "Attempt to detach the VBD while the VM is in the running state.", run: vbdUnplug,
		},
		{name: "vbd-eject", required: uuid, help: "Remove the media from the drive represented by the VBD.", run: send("VBD", "VBD.eject")},
		{
			name: "vbd-insert", required: []string{"uuid", "vdi-uuid"},
			help: "Insert new media into the drive represented by the VBD.", run: vbdInsert,
		},
	}...)
}

// srHost returns the host that an SR command is about: the one named, or the only one.
func (r *run) srHost(ctx context.Context, shared bool) (string, error) {
	if r.args.has("host-uuid") {
		return r.ref(ctx, "host", "host-uuid")
	}
	var hosts []string
	master := xapi.NullRef
	err := r.read(func(v view) error {
		for ref := range v.Each(xapi.ClassOf[xapi.Host]()) {
			hosts = append(hosts, ref)
		}
		for _, rec := range v.Each(xapi.ClassOf[xapi.Pool]()) {
			master = string(rec.(*xapi.Pool).Master)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if len(hosts) > 1 && !shared {
		return "", missing("host-uuid")
	}
	return master, nil
}

// deviceConfig collects device-config:k=v. A key that ends in -filename stands
// for the contents of a file of the client.
func (r *run) deviceConfig(ctx context.Context) (map[string]any, error) {
	config := r.args.pairs("device-config")
	for k, v := range config {
		name, ok := strings.CutSuffix(k, "-filename")
		if !ok {
			continue
		}
		data, err := r.conn.Load(ctx, v.(string))
		if err != nil {
			return nil, failf("Failed to read file '%s'", v)
		}
		delete(config, k)
		config[name] = string(data)
	}
	return config, nil
}

func srCreate(ctx context.Context, r *run) error {
	shared, err := r.args.boolean("shared", false)
	if err != nil {
		return err
	}
	var size int64
	if r.args.has("physical-size") {
		if size, err = r.args.size("physical-size"); err != nil {
			return err
		}
	}
	host, err := r.srHost(ctx, shared)
	if err != nil {
		return err
	}
	config, err := r.deviceConfig(ctx)
	if err != nil {
		return err
	}
	sr, err := r.callText(ctx, "SR.create", host, config, size, r.args.str("name-label"), r.args.str("name-description"),
		r.args.str("type"), r.args.str("content-type"), shared, r.args.pairs("sm-config"))
	if err != nil {
		return err
	}
	uuid, err := r.callText(ctx, "SR.get_uuid", sr)
	if err != nil {
		return err
	}
	r.out.direct(uuid)
	return nil
}

func srIntroduce(ctx context.Context, r *run) error {
	shared, err := r.args.boolean("shared", false)
	if err != nil {
		return err
	}
	sr, err := r.callText(ctx, "SR.introduce", r.args.str("uuid"), r.args.str("name-label"), r.args.str("name-description"),
		r.args.str("type"), r.args.str("content-type"), shared)
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "SR", sr)
}

func srProbe(ctx context.Context, r *run) error {
	host, err := r.srHost(ctx, true)
	if err != nil {
		return err
	}
	config, err := r.deviceConfig(ctx)
	if err != nil {
		return err
	}
	found, err := r.callText(ctx, "SR.probe", host, config, r.args.str("type"), r.args.pairs("sm-config"))
	if err != nil {
		return err
	}
	r.out.list(found)
	return nil
}

func pbdCreate(ctx context.Context, r *run) error {
	host, err := r.ref(ctx, "host", "host-uuid")
	if err != nil {
		return err
	}
	sr, err := r.ref(ctx, "SR", "sr-uuid")
	if err != nil {
		return err
	}
	config, err := r.deviceConfig(ctx)
	if err != nil {
		return err
	}
	pbd, err := r.callText(ctx, "PBD.create", map[string]any{
		"host": host, "SR": sr, "device_config": config, "other_config": map[string]any{},
	})
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "PBD", pbd)
}

func vbdCreate(ctx context.Context, r *run) error {
	vm, err := r.ref(ctx, "VM", "vm-uuid")
	if err != nil {
		return err
	}
	vdi, err := r.optionalRef(ctx, "VDI", "vdi-uuid")
	if err != nil {
		return err
	}
	bootable, err := r.args.boolean("bootable", false)
	if err != nil {
		return err
	}
	unpluggable, err := r.args.boolean("unpluggable", true)
	if err != nil {
		return err
	}
	class := xapi.ClassOf[xapi.VBD]()
	kind, mode := "Disk", "RW"
	if typed, ok := r.args.lookup("type"); ok {
		if kind, err = enumValue(class.Field("type").Type, typed); err != nil {
			return err
		}
	}
	if typed, ok := r.args.lookup("mode"); ok {
		if mode, err = enumValue(class.Field("mode").Type, typed); err != nil {
			return err
		}
	}
	empty := !r.args.has("vdi-uuid")
	if empty && kind != "CD" {
		return failf("Empty VBDs can only be made for type=CD")
	}
	vbd, err := r.callText(ctx, "VBD.create", map[string]any{
		"VM": vm, "VDI": vdi, "device": "", "userdevice": r.args.str("device"), "bootable": bootable, "mode": mode, "type": kind,
		"unpluggable": unpluggable, "empty": empty, "other_config": map[string]any{},
		"qos_algorithm_type": "", "qos_algorithm_params": map[string]any{},
	})
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "VBD", vbd)
}

func vbdUnplug(ctx context.Context, r *run) error {
	if r.args.flag("force") {
		return send("VBD", "VBD.unplug_force")(ctx, r)
	}
	return send("VBD", "VBD.unplug")(ctx, r)
}

func vbdInsert(ctx context.Context, r *run) error {
	vbd, err := r.ref(ctx, "VBD", "uuid")
	if err != nil {
		return err
	}
	vdi, err := r.ref(ctx, "VDI", "vdi-uuid")
	if err != nil {
		return err
	}
	return r.do(ctx, "VBD.insert", vbd, vdi)
}
