package xecmd

import (
	"context"
	"slices"
	"strings"

	"coppice/internal/xapi"
)

// otherCommands are those about tasks, events, schedules, messages and secrets.
func otherCommands() []command {
	uuid := []string{"uuid"}
	return []command{
		{name: "task-cancel", required: uuid, help: "Set a task to cancelling and return.", run: send("task", "task.cancel")},
		{
			name: "event-wait", required: []string{"class"},
			help: "Wait for an object of the class to satisfy all conditions. A condition is field=value, or field=/=value for its opposite.",
			run:  eventWait,
		},
		{
			name: "vmss-create", required: []string{"name-label", "type", "frequency"},
			optional: []string{"name-description", "enabled", "schedule:", "retained-snapshots"},
			help:     "Create a VM snapshot schedule. The type is 'snapshot', 'checkpoint' or 'snapshot_with_quiesce', the frequency 'hourly', 'daily' or 'weekly'.",
			run:      vmssCreate,
		},
		{name: "vmss-destroy", required: uuid, help: "Destroy a VM snapshot schedule.", run: send("VMSS", "VMSS.destroy")},
		{
			name: "message-create", required: []string{"name", "priority", "body"}, optional: []string{"vm-uuid", "host-uuid", "sr-uuid", "pool-uuid"},
			help: "Create a message associated with a particular API object.", run: messageCreate,
		},
		{
			name: "message-destroy", optional: []string{"uuid", "uuids"},
			help: "Destroy one or more existing messages.", run: messageDestroy,
		},
		{name: "secret-create", required: []string{"value"}, help: "Create a secret.", run: secretCreate},
		{name: "secret-destroy", required: uuid, help: "Destroy a secret.", run: send("secret", "secret.destroy")},
		{
			name: "user-password-change", required: []string{"new"}, optional: []string{"old"},
			help: "Change the login password of the user.",
			run: func(ctx context.Context, r *run) error {
				return r.do(ctx, "session.change_password", r.args.str("old"), r.args.str("new"))
			},
		},
	}
}

// eventClasses are the classes that event-wait knows.
var eventClasses = strings.Fields("vm vdi sr host network vif pif vbd pbd pool task subject role secret vmss")

// eventWait returns when some object satisfies all conditions.
func eventWait(ctx context.Context, r *run) error {
	class := r.args.str("class")
	n := r.table.nouns[strings.ToLower(class)]
	if n == nil || !slices.Contains(eventClasses, n.name) {
		return failf("Cli listening for class '%s' not currently implemented", class)
	}
	type condition struct {
		filter
		not bool
	}
	var conditions []condition
	for _, p := range r.args.params {
		if reserved[p.key] || p.key == "class" {
			continue
		}
		value, not := strings.CutPrefix(p.value, "/=")
		flt, err := n.filter(parameter{p.key, value})
		if err != nil {
			return failf("key missing: %s", p.key)
		}
		conditions = append(conditions, condition{flt, not})
	}
	satisfied := func(v view, rec any) bool {
		for _, c := range conditions {
			if c.matches(v, rec) == c.not {
				return false
			}
		}
		return true
	}
	token := ""
	for {
		res, err := r.call(ctx, "event.from", []any{n.class.Name}, token, taskPoll)
		if err != nil {
			return err
		}
		token = res.Value.(*xapi.EventBatch).Token
		found := false
		err = r.read(func(v view) error {
			for _, rec := range v.Each(n.class) {
				if satisfied(v, rec) {
					found = true
					return nil
				}
			}
			return nil
		})
		if err != nil || found {
			return err
		}
	}
}

func vmssCreate(ctx context.Context, r *run) error {
	enabled, err := r.args.boolean("enabled", true)
	if err != nil {
		return err
	}
	keep, err := r.args.number("retained-snapshots", 7)
	if err != nil {
		return err
	}
	class := xapi.ClassOf[xapi.VMSS]()
	kind, err := enumValue(class.Field("type").Type, r.args.str("type"))
	if err != nil {
		return err
	}
	frequency, err := enumValue(class.Field("frequency").Type, r.args.str("frequency"))
	if err != nil {
		return err
	}
	vmss, err := r.callText(ctx, "VMSS.create", map[string]any{
		"name_label": r.args.str("name-label"), "name_description": r.args.str("name-description"), "enabled": enabled,
		"type": kind, "retained_snapshots": keep, "frequency": frequency, "schedule": r.args.pairs("schedule"),
	})
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "VMSS", vmss)
}

func messageCreate(ctx context.Context, r *run) error {
	priority, err := r.args.number("priority", 0)
	if err != nil {
		return err
	}
	for _, o := range []struct{ param, class string }{{"vm-uuid", "VM"}, {"host-uuid", "Host"}, {"sr-uuid", "SR"}, {"pool-uuid", "Pool"}} {
		if uuid, ok := r.args.lookup(o.param); ok {
			return r.do(ctx, "message.create", r.args.str("name"), priority, o.class, uuid, r.args.str("body"))
		}
	}
	return failf("Need one of: vm-uuid, host-uuid, sr-uuid, or pool-uuid")
}

func messageDestroy(ctx context.Context, r *run) error {
	var uuids []string
	if list, ok := r.args.lookup("uuids"); ok {
		uuids = strings.Split(list, ",")
	}
	if uuid, ok := r.args.lookup("uuid"); ok {
		uuids = append(uuids, uuid)
	}
	if len(uuids) == 0 {
		return missing("uuid")
	}
	for _, uuid := range uuids {
		ref, err := r.byUUID(ctx, "message", uuid)
		if err != nil {
			return err
		}
		if err := r.do(ctx, "message.destroy", ref); err != nil {
			return err
		}
	}
	return nil
}

func secretCreate(ctx context.Context, r *run) error {
	secret, err := r.callText(ctx, "secret.create", map[string]any{
		"value": r.args.str("value"), "other_config": map[string]any{},
	})
	if err != nil {
		return err
	}
	return r.printUUID(ctx, "secret", secret)
}
