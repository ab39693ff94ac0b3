package api

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"coppice/internal/db"
	"coppice/internal/xapi"

	"github.com/google/go-cmp/cmp"
)

// dangling is a reference to nothing that is well-formed.
const dangling = "OpaqueRef:00000000-dead-dead-dead-000000000000"

// sampleOf is a wire value of a type; references in it are ref.
func sampleOf(t *xapi.Type, ref string) any {
	switch t.Kind {
	case xapi.KindRef:
		return ref
	case xapi.KindInt:
		return int64(1)
	case xapi.KindFloat:
		return 0.0
	case xapi.KindBool:
		return true
	case xapi.KindDateTime:
		return "20260131T23:59:59Z"
	case xapi.KindEnum:
		return t.Values()[0]
	case xapi.KindSet:
		return []any{sampleOf(t.Elem, ref)}
	case xapi.KindMap:
		if t.Key.Kind == xapi.KindInt {
			return map[string]any{"1": sampleOf(t.Elem, ref)}
		}
		return map[string]any{sampleOf(t.Key, ref).(string): sampleOf(t.Elem, ref)}
	case xapi.KindRecord:
		members := map[string]any{}
		for _, f := range xapi.Datamodel().Classes[t.Class].Fields {
			if f.Qualifier != xapi.DynamicRO && !f.HasDefault {
				members[f.Name] = sampleOf(f.Type, ref)
			}
		}
		return members
	default:
		return "sample"
	}
}

// samplesOf are the parameters of a message without the session.
func samplesOf(msg *xapi.Method, ref string) []any {
	args := make([]any, len(msg.Params))
	for i, p := range msg.Params {
		args[i] = sampleOf(p.Type, ref)
	}
	return args
}

// misfits are wire values of which every type refuses at least one as having
// the wrong shape.
func misfit(t *xapi.Type) any {
	switch t.Kind {
	case xapi.KindSet, xapi.KindMap, xapi.KindRecord:
		return int64(7)
	default:
		return []any{}
	}
}

// everyMessage calls fn for every message of every class.
func everyMessage(fn func(name string, msg *xapi.Method)) {
	for _, class := range xapi.Datamodel().Ordered {
		for _, name := range slices.Sorted(maps.Keys(class.Methods)) {
			fn(class.Name+"."+name, class.Methods[name])
		}
	}
}

// state is every object but tasks, sessions and what the clock moves.
func (c *core) state() map[string]string {
	out := map[string]string{}
	_ = c.db.View(func(tx *db.Tx) error {
		for _, class := range c.model.Ordered {
			if class.Name == "session" || class.Name == "task" || class.Name == "host_metrics" {
				continue
			}
			for ref, rec := range tx.Each(class) {
				out[class.Name+" "+ref] = fmt.Sprintf("%+v", rec)
			}
		}
		return nil
	})
	return out
}

// Whatever is wrong with the parameters of a message, the answer is an error
// of the API that says what, and nothing has changed.
func TestEveryMessageWithBadParameters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		before, revision := r.state(), r.API.db.Revision()
		// refused sends a message that must fail, with one of these codes if any
		// are given.
		refused := func(what, name string, wire []any, codes ...string) {
			t.Helper()
			_, err := r.Invoke(context.Background(), Origin{Peer: "test"}, name, wire)
			got := code(err)
			if _, declared := r.model.Errors[got]; err == nil || !declared || len(codes) > 0 && !slices.Contains(codes, got) {
				t.Errorf("%s, %s: got %q, want %q", name, what, description(err), codes)
			}
			if now := r.API.db.Revision(); now != revision {
				after := r.state()
				if diff := cmp.Diff(before, after); diff != "" {
					t.Errorf("%s, %s: %q and yet something changed: %s", name, what, description(err), diff)
				}
				before, revision = after, now
			}
		}
		everyMessage(func(name string, msg *xapi.Method) {
			with := func(session xapi.Ref[xapi.Session], args []any) []any {
				if !msg.Session {
					return args
				}
				return append([]any{string(session)}, args...)
			}
			args := samplesOf(msg, dangling)
			required := msg.Required()
			if msg.Session {
				refused("no parameters", name, nil, "MESSAGE_PARAMETER_COUNT_MISMATCH")
				refused("a null session", name, with(xapi.NullRef, args), "SESSION_INVALID")
				refused("a dangling session", name, with(dangling, args), "SESSION_INVALID")
				refused("a session that is no string", name, append([]any{nil}, args...), "FIELD_TYPE_ERROR")
			}
			if required > 0 {
				refused("too few", name, with(r.root, args[:required-1]), "MESSAGE_PARAMETER_COUNT_MISMATCH")
			}
			if required == len(args) {
				refused("too many", name, with(r.root, append(slices.Clone(args), "more")), "MESSAGE_PARAMETER_COUNT_MISMATCH")
			}
			for i, p := range msg.Params {
				for what, v := range map[string]any{"of the wrong type": misfit(p.Type), "null": nil} {
					bad := slices.Clone(args)
					bad[i] = v
					refused(p.Name+" "+what, name, with(r.root, bad), "FIELD_TYPE_ERROR")
				}
				if p.Type.Kind == xapi.KindEnum {
					bad := slices.Clone(args)
					bad[i] = "no such value"
					refused(p.Name+" not in the enum", name, with(r.root, bad), "INVALID_VALUE")
				}
			}
			// What takes a reference first refuses one that leads nowhere, unless it
			// is refused altogether.
			m := r.methods[name]
			if m.how != Mechanical && m.how != Written || len(args) == 0 || msg.Params[0].Type.Kind != xapi.KindRef {
				return
			}
			for what, ref := range map[string]string{"a dangling reference": dangling, "a null reference": xapi.NullRef} {
				wire := with(r.root, samplesOf(msg, ref))
				switch {
				case msg.Kind == xapi.Custom:
					refused(what, name, wire)
				default:
					refused(what, name, wire, "HANDLE_INVALID")
					_, err := r.Invoke(context.Background(), Origin{}, name, wire)
					if want := "HANDLE_INVALID|" + m.class.Name + "|" + ref; description(err) != want {
						t.Errorf("%s, %s: got %q, want %q", name, what, description(err), want)
					}
				}
			}
		})
	})
}

// Every message that this server has answers, in both dialects, with dangling
// parameters: no handler panics, and whatever succeeds can be encoded.
func TestEveryMessageSurvives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		session := r.root
		everyMessage(func(name string, msg *xapi.Method) {
			for _, ref := range []string{dangling, string(r.pool), string(r.host), string(r.sr), string(r.dom0)} {
				if r.sessions.get(session) == nil {
					session = r.as(localRoot) // it logged out
				}
				wire := samplesOf(msg, ref)
				if msg.Session {
					wire = append([]any{string(session)}, wire...)
				}
				if ref != dangling && r.methods[name].how == Written {
					continue // might do what it is asked to
				}
				r.records.Reset()
				res, err := r.Invoke(t.Context(), Origin{Peer: "test"}, name, wire)
				if err == nil {
					asXML(t, res)
					asJSON(t, res)
				} else if _, declared := r.model.Errors[code(err)]; !declared {
					t.Errorf("%s: %q is no error of the model", name, description(err))
				}
				if log := r.records.String(); strings.Contains(log, "panic") {
					t.Errorf("%s: %s", name, log)
				}
			}
		})
	})
}

// localRoot is what the datamodel calls the role of messages that only the
// local superuser or another member of the pool may send.
const localRoot = "local-root"

// line is the order of the roles, written down once more.
var line = []string{"pool-admin", "pool-operator", "vm-power-admin", "vm-admin", "vm-operator", "read-only"}

// permitted says whether the datamodel lets a role send a message.
func permitted(have, need string, extra []string) bool {
	if slices.Contains(extra, have) {
		return true
	}
	return need != localRoot && slices.Contains(line, need) && slices.Index(line, have) <= slices.Index(line, need)
}

// D12: every message with every role, synchronously and as a task.
func TestEveryMessageWithEveryRole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		refusals := 0
		for _, role := range line {
			session := r.as(role)
			everyMessage(func(name string, msg *xapi.Method) {
				if !msg.Session {
					return
				}
				if r.sessions.get(session) == nil {
					session = r.as(role) // it logged out
				}
				wire := append([]any{string(session)}, samplesOf(msg, dangling)...)
				_, err := r.Invoke(context.Background(), Origin{}, name, wire)
				refused := code(err) == "RBAC_PERMISSION_DENIED"
				want := !permitted(role, msg.Role, msg.ExtraRoles)
				if name == "session.change_password" {
					want = false // here users beside root have passwords, too
				}
				if refused != want {
					t.Errorf("%s as %s: %q; want refused: %v", name, role, description(err), want)
				}
				if !refused {
					return
				}
				refusals++
				if got, want := description(err), "RBAC_PERMISSION_DENIED|"+name+"|"; !strings.HasPrefix(got, want) {
					t.Errorf("%s as %s: %q, want %q", name, role, got, want)
				}
				if !msg.Async {
					return
				}
				res, err := r.Invoke(context.Background(), Origin{}, "Async."+name, wire)
				if err != nil {
					t.Fatalf("Async.%s as %s: %v", name, role, err)
				}
				synctest.Wait()
				task := res.Value.(xapi.Ref[xapi.Task])
				if got := record(r.core, task); got.Status != "failure" || got.ErrorInfo[0] != "RBAC_PERMISSION_DENIED" {
					t.Errorf("Async.%s as %s: %s %q", name, role, got.Status, got.ErrorInfo)
				}
				r.call("task.destroy", task)
			})
			s := r.sessions.get(r.as(role))
			for action, h := range r.model.HTTP {
				err := r.authorizeHTTP(s, action)
				if got, want := err == nil, permitted(role, h.Role, h.ExtraRoles); got != want {
					t.Errorf("HTTP %s as %s: %v; want permitted: %v", action, role, err, want)
				}
			}
		}
		if refusals < 1000 {
			t.Errorf("only %d refusals", refusals)
		}
	})
}

// Some map keys have a role of their own, higher or lower than the field's.
func TestRolesOfMapKeys(t *testing.T) {
	c := newCore(t)
	sessions := map[string]xapi.Ref[xapi.Session]{}
	for _, role := range line {
		sessions[role] = c.as(role)
	}
	for _, tt := range []struct{ method, key, need, permission string }{
		{"pool.add_to_other_config", "any", "pool-operator", ""},
		{"pool.add_to_other_config", "folder", "vm-operator", "/key:folder"},
		{"pool.add_to_other_config", "folders", "pool-operator", ""},
		{"pool.add_to_other_config", "XenCenter.CustomFields.x", "vm-operator", "/key:XenCenter.CustomFields.*"},
		{"pool.remove_from_other_config", "EMPTY_FOLDERS", "vm-operator", "/key:EMPTY_FOLDERS"},
		{"task.remove_from_other_config", "applies_to", "vm-operator", "/key:applies_to"},
		{"task.remove_from_other_config", "other", "read-only", ""},
		{"VM.add_to_platform", "hvm_serial", "pool-admin", "/key:hvm_serial"},
		{"VM.add_to_platform", "other", "vm-admin", ""},
	} {
		for role, session := range sessions {
			params := []any{dangling, tt.key}
			if strings.Contains(tt.method, "add_to") {
				params = append(params, "v")
			}
			_, err := c.try(session, tt.method, params...)
			if !permitted(role, tt.need, nil) {
				if got, want := description(err), "RBAC_PERMISSION_DENIED|"+tt.method+tt.permission+"|"; !strings.HasPrefix(got, want) {
					t.Errorf("%s %s as %s: %q, want %q", tt.method, tt.key, role, got, want)
				}
			} else if code(err) == "RBAC_PERMISSION_DENIED" {
				t.Errorf("%s %s as %s: %q", tt.method, tt.key, role, description(err))
			}
		}
	}
}

// The table in doc/compat.md is made from the tables that dispatch runs on;
// this checks that they account for every message.
func TestCoverageIsComplete(t *testing.T) {
	cov, err := Coverage()
	if err != nil {
		t.Fatal(err)
	}
	total, want := 0, 0
	for _, c := range cov {
		total += c.Mechanical + len(c.Written) + len(c.NotImplemented) + len(c.Reserved) + len(c.Withdrawn)
	}
	everyMessage(func(string, *xapi.Method) { want++ })
	if total != want || want < 2000 {
		t.Errorf("%d messages accounted for, the model has %d", total, want)
	}
	i := slices.IndexFunc(cov, func(c ClassCoverage) bool { return c.Class == "VDI" })
	for list, name := range map[*[]string]string{
		&cov[i].Written: "snapshot", &cov[i].Reserved: "db_forget", &cov[i].Withdrawn: "force_unlock",
	} {
		if !slices.Contains(*list, name) {
			t.Errorf("VDI.%s is not in %q", name, *list)
		}
	}
	var text strings.Builder
	if err := WriteCoverage(&text); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"| VDI |", "### VDI", "Written: ", "snapshot"} {
		if !strings.Contains(text.String(), s) {
			t.Errorf("the text lacks %q", s)
		}
	}
}
