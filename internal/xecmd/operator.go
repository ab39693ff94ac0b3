package xecmd

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"coppice/internal/xapi"
)

// operatorCommands are for those who run the server: users and their roles, schedules, plugins.
func operatorCommands() []command {
	role := []string{"role-name", "role-uuid"}
	return []command{
		{
			name: "host-call-plugin", required: []string{"plugin", "fn"}, optional: []string{"host-uuid", "args:"},
			help: "Call a function within a plugin of the host with optional arguments.", run: hostCallPlugin,
		},
		{
			name: "vmss-preview", required: []string{"uuid"},
			help: "Print which snapshots a VM snapshot schedule would destroy now, and what keeps the others. An extension of this server.",
			run:  vmssPreview,
		},
		{
			name: "vmss-snapshot-now", required: []string{"uuid"},
			help: "Take a snapshot of every VM of a VM snapshot schedule now, also if it is disabled, prune as after a slot, and print the uuids of the new snapshots. An extension of this server.",
			run:  vmssSnapshotNow,
		},
		{
			name: "audit-log-get", required: []string{"filename"}, optional: []string{"since"},
			help: "Write the audit log of the server to a file; with since, an ISO 8601 time, only its entries since then.",
			run: func(ctx context.Context, r *run) error {
				_, err := r.transfer(ctx, "Audit log", "/audit_log", r.query("since"), r.conn.HTTPGet)
				return err
			},
		},
		{
			name: "subject-add", required: []string{"subject-name"},
			help: "Add a user, with the role pool-admin. \"coppice user passwd\" on the server gives it a password.", run: subjectAdd,
		},
		{
			name: "subject-remove", required: []string{"subject-uuid"}, help: "Remove a user.",
			run: func(ctx context.Context, r *run) error {
				ref, err := r.ref(ctx, "subject", "subject-uuid")
				if err != nil {
					return err
				}
				return r.do(ctx, "subject.destroy", ref)
			},
		},
		{
			name: "subject-role-add", required: []string{"uuid"}, optional: role, help: "Give a role to a user.",
			run: subjectRole("subject.add_to_roles"),
		},
		{
			name: "subject-role-remove", required: []string{"uuid"}, optional: role, help: "Take a role from a user.",
			run: subjectRole("subject.remove_from_roles"),
		},
		{
			name: "session-subject-identifier-logout", required: []string{"subject-identifier"}, help: "End all sessions of a user.",
			run: func(ctx context.Context, r *run) error {
				return r.do(ctx, "session.logout_subject_identifier", r.args.str("subject-identifier"))
			},
		},
	}
}

func hostCallPlugin(ctx context.Context, r *run) error {
	host, err := r.srHost(ctx, true)
	if err != nil {
		return err
	}
	text, err := r.callText(ctx, "host.call_plugin", host, r.args.str("plugin"), r.args.str("fn"), r.args.pairs("args"))
	if err != nil {
		return err
	}
	r.out.direct(text)
	return nil
}

func vmssSnapshotNow(ctx context.Context, r *run) error {
	vmss, err := r.ref(ctx, "VMSS", "uuid")
	if err != nil {
		return err
	}
	taken, err := r.callText(ctx, "VMSS.snapshot_now", vmss)
	if err != nil || taken == "" { // no VM follows it
		return err
	}
	r.out.list(strings.Split(taken, ",")...)
	return nil
}

func vmssPreview(ctx context.Context, r *run) error {
	var vms []struct {
		UUID      string
		Name      string `json:"name_label"`
		Snapshots []struct {
			UUID, Hold string
			Name       string `json:"name_label"`
			Goes       bool
			KeptBy     []string `json:"kept_by"`
		}
	}
	host, err := r.srHost(ctx, true)
	if err != nil {
		return err
	}
	text, err := r.callText(ctx, "host.call_plugin", host, "coppice", "vmss-preview", map[string]any{"vmss": r.args.str("uuid")})
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(text), &vms); err != nil {
		return fmt.Errorf("answer of vmss-preview: %w", err)
	}
	for _, vm := range vms {
		for _, s := range vm.Snapshots {
			verdict := "kept by " + strings.Join(s.KeptBy, ", ")
			switch {
			case s.Goes:
				verdict = "goes"
			case s.Hold != "":
				verdict = "on hold: " + s.Hold
			}
			r.out.direct(fmt.Sprintf("%s %s: %s (of %s)", s.UUID, s.Name, verdict, vm.Name))
		}
	}
	return nil
}

func subjectAdd(ctx context.Context, r *run) error {
	name := r.args.str("subject-name")
	subject, err := r.callText(ctx, "subject.create", map[string]any{
		"subject_identifier": name, "other_config": map[string]any{"subject-name": name},
	})
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "subject", subject)
}

// subjectRole sends a message about a user and a role, which is named by its uuid or its name.
func subjectRole(method string) func(context.Context, *run) error {
	return func(ctx context.Context, r *run) error {
		subject, err := r.ref(ctx, "subject", "uuid")
		if err != nil {
			return err
		}
		if r.args.has("role-uuid") {
			role, err := r.ref(ctx, "role", "role-uuid")
			if err != nil {
				return err
			}
			return r.do(ctx, method, subject, role)
		}
		name, ok := r.args.lookup("role-name")
		if !ok {
			return missing("role-name")
		}
		role := xapi.NullRef
		err = r.read(func(v view) error {
			for ref, rec := range v.Each(xapi.ClassOf[xapi.Role]()) {
				if rec.(*xapi.Role).NameLabel == name {
					role = ref
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		return r.do(ctx, method, subject, role)
	}
}
