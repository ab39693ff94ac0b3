package xecmd

import (
	"context"
	"slices"
	"strings"

	"coppice/internal/xapi"
)

// object finds the object of the noun that uuid= names and runs fn on it.
func (n *noun) object(ctx context.Context, r *run, fn func(v view, rec any) error) (ref string, err error) {
	if ref, err = r.ref(ctx, n.class.Name, "uuid"); err != nil {
		return "", err
	}
	return ref, r.read(func(v view) error {
		rec, ok := v.Lookup(n.class, ref)
		if !ok {
			return xapi.NewError(xapi.ErrUUIDInvalid, n.class.Name, r.args.str("uuid"))
		}
		return fn(v, rec)
	})
}

// paramList is C-param-list.
func (n *noun) paramList(ctx context.Context, r *run) error {
	shown := n.visible()
	var rec []cell
	ref, err := n.object(ctx, r, func(v view, o any) error {
		rec = cells(v, o, shown)
		return nil
	})
	if err != nil {
		return err
	}
	if err := r.measure(ctx, ref, rec, shown); err != nil {
		return err
	}
	r.out.records(rec)
	return nil
}

// named returns the field that param-name= names.
func (n *noun) named(r *run) (*field, error) {
	name := r.args.str("param-name")
	if f := n.field(name); f != nil {
		return f, nil
	}
	return nil, &unknownParameter{n.name, name}
}

// paramGet is C-param-get.
func (n *noun) paramGet(ctx context.Context, r *run) error {
	f, err := n.named(r)
	if err != nil {
		return err
	}
	var text string
	ref, err := n.object(ctx, r, func(v view, rec any) error {
		text = f.text(v, rec)
		key, ok := r.args.lookup("param-key")
		if !ok || f.shape != mapping {
			return nil
		}
		for _, e := range pairs(f, v, rec) {
			if e.key == key {
				text = e.value
				return nil
			}
		}
		return failf("Key %s not found in map", key)
	})
	if err != nil {
		return err
	}
	if f.measure != nil {
		if text, err = f.measure(ctx, r, ref); err != nil {
			return err
		}
	}
	r.out.list(text)
	return nil
}

// paramSet is C-param-set. Assignments apply one after the other, up to the
// first that fails.
func (n *noun) paramSet(ctx context.Context, r *run) error {
	ref, err := r.ref(ctx, n.class.Name, "uuid")
	if err != nil {
		return err
	}
	named := false
	for _, p := range r.args.params {
		if p.key == "uuid" && !named { // it says what to change; another would change it
			named = true
			continue
		}
		if reserved[p.key] {
			continue
		}
		if err := n.assign(ctx, r, ref, p); err != nil {
			return err
		}
	}
	return nil
}

func (n *noun) assign(ctx context.Context, r *run, ref string, p parameter) error {
	if f := n.field(p.key); f != nil {
		switch {
		case f.shape != scalar:
			return failf("Field '%s' is a map or set. use the 'name:key=value' syntax.", p.key)
		case !f.rw:
			return failf("Field '%s' is read-only.", p.key)
		}
		val, err := r.parseValue(ctx, f, p.value)
		if err != nil {
			return err
		}
		return r.do(ctx, n.class.Name+".set_"+f.model().Name, ref, val)
	}
	flt, err := n.filter(p)
	switch {
	case err != nil && strings.Contains(p.key, ":") && n.field(p.key[:strings.Index(p.key, ":")]) != nil,
		err == nil && flt.f.shape == set:
		return failf("Cannot param-set on set fields")
	case err != nil:
		return err
	case !flt.f.rw:
		return failf("Map field '%s' is read-only.", flt.f.name)
	}
	if err := n.removeKey(ctx, r, ref, flt.f, flt.key); err != nil {
		return err
	}
	return r.do(ctx, n.class.Name+".add_to_"+flt.f.model().Name, ref, flt.key, p.value)
}

func (n *noun) removeKey(ctx context.Context, r *run, ref string, f *field, key string) error {
	return r.do(ctx, n.class.Name+".remove_from_"+f.model().Name, ref, key)
}

// paramAdd is C-param-add.
func (n *noun) paramAdd(ctx context.Context, r *run) error {
	f, err := n.named(r)
	if err != nil {
		return err
	}
	ref, err := r.ref(ctx, n.class.Name, "uuid")
	switch {
	case err != nil:
		return err
	case f.shape == scalar:
		return failf("Can only add to parameters of type Set or Map")
	case !f.rw:
		return failf("Parameter is read-only")
	}
	if f.shape == set {
		key, ok := r.args.lookup("param-key")
		if !ok {
			return missing("param-key")
		}
		member, err := r.parseMember(ctx, f, key)
		if err != nil {
			return err
		}
		return r.do(ctx, n.class.Name+".add_"+f.model().Name, ref, member)
	}
	for _, p := range r.args.params {
		if reserved[p.key] || p.key == "uuid" || p.key == "param-name" || p.key == "param-key" {
			continue
		}
		if err := r.do(ctx, n.class.Name+".add_to_"+f.model().Name, ref, p.key, p.value); err != nil {
			return err
		}
	}
	return nil
}

// contents returns the members of a set, or the keys of a map.
func contents(f *field, v view, rec any) []string {
	if f.shape == set {
		return members(f, v, rec)
	}
	var keys []string
	for _, e := range pairs(f, v, rec) {
		keys = append(keys, e.key)
	}
	return keys
}

// paramRemove is C-param-remove.
func (n *noun) paramRemove(ctx context.Context, r *run) error {
	f, err := n.named(r)
	if err != nil {
		return err
	}
	key := r.args.str("param-key")
	ref, err := n.object(ctx, r, func(v view, rec any) error {
		kind := map[shape]string{set: "the set", mapping: "map"}[f.shape]
		switch {
		case f.shape == scalar:
			return failf("Can only remove from parameters of type Set or Map")
		case !f.rw:
			return failf("Cannot remove parameters from read-only %s", strings.TrimPrefix(kind, "the "))
		case !slices.Contains(contents(f, v, rec), key):
			return failf("Key %s is not in %s", key, kind)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return n.remove(ctx, r, ref, f, key)
}

func (n *noun) remove(ctx context.Context, r *run, ref string, f *field, key string) error {
	if f.shape == mapping {
		return n.removeKey(ctx, r, ref, f, key)
	}
	member, err := r.parseMember(ctx, f, key)
	if err != nil {
		return err
	}
	return r.do(ctx, n.class.Name+".remove_"+f.model().Name, ref, member)
}

// parseMember turns what the user typed into a member of a set: of
// references, the one of the object with this uuid.
func (r *run) parseMember(ctx context.Context, f *field, typed string) (string, error) {
	if t := f.model().Type.Elem; t.Kind == xapi.KindRef {
		return r.byUUID(ctx, t.Class, typed)
	}
	return typed, nil
}

// paramClear is C-param-clear.
func (n *noun) paramClear(ctx context.Context, r *run) error {
	f, err := n.named(r)
	if err != nil {
		return err
	}
	var keys []string
	ref, err := n.object(ctx, r, func(v view, rec any) error {
		if !f.rw && !f.clearable {
			return failf("Can only clear RW parameters")
		}
		if f.shape != scalar {
			keys = contents(f, v, rec)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if f.shape == scalar {
		switch f.model().Type.Kind {
		case xapi.KindString:
			return r.do(ctx, n.class.Name+".set_"+f.model().Name, ref, "")
		case xapi.KindRef:
			return r.do(ctx, n.class.Name+".set_"+f.model().Name, ref, xapi.NullRef)
		}
		return failf("Cannot clear this parameter")
	}
	for _, k := range keys {
		if err := n.remove(ctx, r, ref, f, k); err != nil {
			return err
		}
	}
	return nil
}
