package xecmd

import (
	"context"
	"strconv"
)

// snapshotCommands are those about snapshots of VMs.
func snapshotCommands() []command {
	either := []string{"uuid", "snapshot-uuid"}
	return []command{
		{
			name: "snapshot-revert", optional: append([]string{"undo"}, either...),
			help: "Revert an existing VM to a previous checkpointed or snapshotted state. Unless undo=false, a snapshot of the present state is taken first; it replaces the one of the revert before. Reverting to it undoes the revert.",
			run:  snapshotRevert,
		},
		{
			name: "snapshot-destroy", optional: either,
			help: "Destroy a snapshot. This leaves the storage associated with the snapshot intact. To delete storage too, use snapshot-uninstall.",
			run: func(ctx context.Context, r *run) error {
				vm, err := r.snapshot(ctx)
				if err != nil {
					return err
				}
				if err := r.halt(ctx, vm); err != nil {
					return err
				}
				return r.do(ctx, "VM.destroy", vm)
			},
		},
		{
			name: "snapshot-uninstall", optional: append([]string{"force"}, either...),
			help: "Uninstall a snapshot. This operation will destroy those VDIs that are marked RW and connected to this snapshot only. To simply destroy the VM record, use snapshot-destroy.",
			run: func(ctx context.Context, r *run) error {
				vm, err := r.snapshot(ctx)
				if err != nil {
					return err
				}
				return uninstall(ctx, r, []string{vm})
			},
		},
		{
			name: "snapshot-clone", required: []string{"new-name-label"}, optional: append([]string{"new-name-description"}, either...),
			help: "Create a new template by cloning an existing snapshot, using storage-level fast disk clone operation where available.",
			run: func(ctx context.Context, r *run) error {
				vm, err := r.snapshot(ctx)
				if err != nil {
					return err
				}
				return r.newVM(ctx, "VM.clone", vm, r.args.str("new-name-label"))
			},
		},
		{
			name: "snapshot-copy", required: []string{"new-name-label"}, optional: append([]string{"new-name-description", "sr-uuid", "progress"}, either...),
			help: "Create a new template by copying an existing VM, but without using storage-level fast disk clone operation.",
			run: func(ctx context.Context, r *run) error {
				vm, err := r.snapshot(ctx)
				if err != nil {
					return err
				}
				sr, err := r.optionalRef(ctx, "SR", "sr-uuid")
				if err != nil {
					return err
				}
				return r.newVM(ctx, "VM.copy", vm, r.args.str("new-name-label"), sr)
			},
		},
		{
			name: "snapshot-disk-list", optional: append([]string{"vbd-params", "vdi-params"}, either...),
			help: "List the disks on the snapshot(s).",
			run: func(ctx context.Context, r *run) error {
				vm, err := r.snapshot(ctx)
				if err != nil {
					return err
				}
				return r.listDisks(vm, "Disk")
			},
		},
		{
			name: "snapshot-reset-powerstate", optional: append([]string{"force"}, either...),
			help: "Force the VM power state to halted in the management toolstack database only.",
			run: func(ctx context.Context, r *run) error {
				if !r.args.flag("force") {
					return errForce
				}
				return onSnapshot("VM.power_state_reset")(ctx, r)
			},
		},
	}
}

func snapshotRevert(ctx context.Context, r *run) error {
	if err := r.chooseUndo(); err != nil {
		return err
	}
	return onSnapshot("VM.revert")(ctx, r)
}

// chooseUndo has a revert take a snapshot first, unless the user does not want
// one.
func (r *run) chooseUndo() error {
	undo, err := r.args.boolean("undo", true)
	r.origin.Undo = strconv.FormatBool(undo)
	return err
}

// snapshot returns the snapshot that the command line names.
func (r *run) snapshot(ctx context.Context) (string, error) {
	param := "snapshot-uuid"
	if !r.args.has(param) {
		param = "uuid"
	}
	if !r.args.has(param) {
		return "", failf("Required parameter not found: snapshot-uuid or uuid.")
	}
	vm, err := r.ref(ctx, "VM", param)
	if err != nil {
		return "", err
	}
	is, err := r.callText(ctx, "VM.get_is_a_snapshot", vm)
	if err != nil {
		return "", err
	}
	if is != "true" {
		uuid := r.args.str(param)
		return "", failf("This operation can only be performed on a VM snapshot. %s is not a VM snapshot.", uuid)
	}
	return vm, nil
}

// onSnapshot makes a command of a message that takes a snapshot alone.
func onSnapshot(method string) func(ctx context.Context, r *run) error {
	return func(ctx context.Context, r *run) error {
		vm, err := r.snapshot(ctx)
		if err != nil {
			return err
		}
		return r.do(ctx, method, vm)
	}
}
