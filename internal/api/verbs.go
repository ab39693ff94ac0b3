package api

import (
	"context"
	"reflect"
	"slices"

	"coppice/internal/db"
	"coppice/internal/where"
	"coppice/internal/xapi"
)

// mechanical returns the handler of a message that the datamodel says all
// about, or nil when it needs code of its own: constructors and destructors
// do, except those of classes that are nothing but records.
func mechanical(class *xapi.Class, msg *xapi.Method) handler {
	v := verb{class: class, field: msg.Field}
	switch msg.Kind {
	case xapi.FieldGetter:
		return v.get
	case xapi.FieldSetter:
		return v.set
	case xapi.FieldAdd:
		if msg.Field.Type.Kind == xapi.KindMap {
			return v.addKey
		}
		return v.addMember
	case xapi.FieldRemove:
		if msg.Field.Type.Kind == xapi.KindMap {
			return v.removeKey
		}
		return v.removeMember
	case xapi.GetRecord:
		return v.getRecord
	case xapi.GetByUUID:
		return v.getByUUID
	case xapi.GetByNameLabel:
		return v.getByNameLabel
	case xapi.GetAll:
		return v.getAll
	case xapi.GetAllWhere:
		return v.getAllWhere
	case xapi.GetAllRecords:
		return v.getAllRecords
	case xapi.GetAllRecordsWhere:
		return v.getAllRecordsWhere
	case xapi.Constructor:
		if slices.Contains(plainClasses, class.Name) {
			return v.create
		}
	case xapi.Destructor:
		if slices.Contains(plainClasses, class.Name) {
			return v.destroy
		}
	}
	return nil
}

// plainClasses are those whose objects have no life beyond their record, so
// that making one is inserting it.
var plainClasses = []string{"VM_appliance", "VM_group", "secret"}

// verb is a mechanical message: what it does, to a class, and for some to a
// field.
type verb struct {
	class *xapi.Class
	field *xapi.Field
}

func (v verb) handleInvalid(ref string) *xapi.Error {
	return xapi.NewError(xapi.ErrHandleInvalid, v.class.Name, ref)
}

// refArg is the text of a reference argument, whatever its class.
func refArg(arg any) string { return reflect.ValueOf(arg).String() }

// record returns the record that the first argument names.
func (v verb) record(a *API, args []any) (rec any, err error) {
	err = a.db.View(func(tx *db.Tx) error {
		var ok bool
		if rec, ok = tx.Lookup(v.class, refArg(args[0])); !ok {
			return v.handleInvalid(refArg(args[0]))
		}
		return nil
	})
	return rec, err
}

func (v verb) get(a *API, _ context.Context, _ *Call, args []any) (any, error) {
	rec, err := v.record(a, args)
	if err != nil {
		return nil, err
	}
	return v.field.Get(rec), nil
}

func (v verb) getRecord(a *API, _ context.Context, _ *Call, args []any) (any, error) {
	return v.record(a, args)
}

func (v verb) getByUUID(a *API, _ context.Context, _ *Call, args []any) (any, error) {
	uuid := args[0].(string)
	var ref string
	err := a.db.View(func(tx *db.Tx) error {
		var ok bool
		if ref, ok = tx.UUID(v.class, uuid); !ok {
			return xapi.NewError(xapi.ErrUUIDInvalid, v.class.Name, uuid)
		}
		return nil
	})
	return ref, err
}

func (v verb) getByNameLabel(a *API, _ context.Context, _ *Call, args []any) (any, error) {
	refs := []string{}
	err := a.db.View(func(tx *db.Tx) error {
		refs = append(refs, tx.Named(v.class, args[0].(string))...)
		return nil
	})
	return refs, err
}

func (v verb) getAll(a *API, _ context.Context, _ *Call, _ []any) (any, error) {
	rows, err := a.rows(v.class, nil)
	return rows.refs(), err
}

func (v verb) getAllRecords(a *API, _ context.Context, _ *Call, _ []any) (any, error) {
	return a.rows(v.class, nil)
}

func (v verb) getAllWhere(a *API, _ context.Context, _ *Call, args []any) (any, error) {
	rows, err := v.where(a, args[0].(string))
	if err != nil {
		return nil, err
	}
	return rows.refs(), nil
}

func (v verb) getAllRecordsWhere(a *API, _ context.Context, _ *Call, args []any) (any, error) {
	rows, err := v.where(a, args[0].(string))
	if err != nil {
		return nil, err
	}
	return rows, nil
}

func (v verb) where(a *API, expr string) (*rows, error) {
	cond, err := where.Parse(v.class, expr, false)
	if err != nil {
		return nil, err
	}
	return a.rows(v.class, cond)
}

// set, and the verbs below, change one object in one commit and then tell the
// hook of its class.
func (v verb) set(a *API, ctx context.Context, c *Call, args []any) (any, error) {
	return nil, v.modify(a, ctx, c, args, func(rec any) error {
		v.field.Set(rec, args[1])
		return nil
	})
}

func (v verb) addKey(a *API, ctx context.Context, c *Call, args []any) (any, error) {
	return nil, v.modify(a, ctx, c, args, func(rec any) error {
		m := reflect.ValueOf(v.field.Get(rec))
		if m.MapIndex(reflect.ValueOf(args[1])).IsValid() {
			return duplicateKey(v.class.Name, v.field.Name, refArg(args[0]), v.field.Type.Key.Text(args[1]))
		}
		m.SetMapIndex(reflect.ValueOf(args[1]), reflect.ValueOf(args[2]))
		return nil
	})
}

// duplicateKey is what adding a key that is there answers; clients remove
// first, then add.
func duplicateKey(class, field, ref, key string) *xapi.Error {
	return xapi.NewError(xapi.ErrMapDuplicateKey, class, field, ref, key)
}

func (v verb) removeKey(a *API, ctx context.Context, c *Call, args []any) (any, error) {
	return nil, v.modify(a, ctx, c, args, func(rec any) error {
		m, key := reflect.ValueOf(v.field.Get(rec)), reflect.ValueOf(args[1])
		if !m.MapIndex(key).IsValid() {
			return errNothing
		}
		m.SetMapIndex(key, reflect.Value{})
		return nil
	})
}

func (v verb) addMember(a *API, ctx context.Context, c *Call, args []any) (any, error) {
	return nil, v.modify(a, ctx, c, args, func(rec any) error {
		set, member := reflect.ValueOf(v.field.Get(rec)), reflect.ValueOf(args[1])
		if indexOf(set, member) >= 0 {
			return errNothing
		}
		v.field.Set(rec, reflect.Append(set, member).Interface())
		return nil
	})
}

func (v verb) removeMember(a *API, ctx context.Context, c *Call, args []any) (any, error) {
	return nil, v.modify(a, ctx, c, args, func(rec any) error {
		set := reflect.ValueOf(v.field.Get(rec))
		i := indexOf(set, reflect.ValueOf(args[1]))
		if i < 0 {
			return errNothing
		}
		v.field.Set(rec, reflect.AppendSlice(set.Slice(0, i), set.Slice(i+1, set.Len())).Interface())
		return nil
	})
}

func indexOf(set, member reflect.Value) int {
	for i := range set.Len() {
		if set.Index(i).Equal(member) {
			return i
		}
	}
	return -1
}

// modify changes the object that the first argument names. change gets a copy
// of the record; errNothing from it leaves the object untouched and is
// success.
func (v verb) modify(a *API, ctx context.Context, c *Call, args []any, change func(rec any) error) error {
	ref := refArg(args[0])
	err := a.db.Update(ctx, func(tx *db.Tx) error {
		if _, ok := tx.Lookup(v.class, ref); !ok {
			return v.handleInvalid(ref)
		}
		var failed error
		err := tx.ModifyAny(v.class, ref, func(rec any) { failed = change(rec) })
		return cmpErr(failed, err)
	})
	switch hook := a.hooks[v.class.Name]; {
	case err == errNothing:
		return nil
	case err != nil || hook == nil:
		return err
	default:
		return hook(a, ctx, c, ref, v.field.Name)
	}
}

func (v verb) create(a *API, ctx context.Context, _ *Call, args []any) (any, error) {
	ref := string(xapi.NewRef[struct{}]())
	err := a.db.Update(ctx, func(tx *db.Tx) error { return tx.InsertAny(v.class, ref, args[0]) })
	return ref, err
}

func (v verb) destroy(a *API, ctx context.Context, _ *Call, args []any) (any, error) {
	ref := refArg(args[0])
	return nil, a.db.Update(ctx, func(tx *db.Tx) error {
		if _, ok := tx.Lookup(v.class, ref); !ok {
			return v.handleInvalid(ref)
		}
		return tx.DeleteAny(v.class, ref)
	})
}

// rows are objects of one class as they were at one instant.
type rows struct {
	class *xapi.Class
	list  []row
}

type row struct {
	ref string
	rec any
}

// rows returns the objects of a class that cond, if any, holds for.
func (a *API) rows(class *xapi.Class, cond where.Expr) (*rows, error) {
	r := &rows{class: class}
	err := a.db.View(func(tx *db.Tx) error {
		for ref, rec := range tx.Each(class) {
			if cond == nil || cond(ref, rec) {
				r.list = append(r.list, row{ref, rec})
			}
		}
		return nil
	})
	return r, err
}

func (r *rows) refs() []string {
	refs := make([]string, len(r.list))
	for i, x := range r.list {
		refs[i] = x.ref
	}
	return refs
}

// encode writes a map from references to records.
func (r *rows) encode(e xapi.Encoder) error {
	e.BeginStruct()
	for _, x := range r.list {
		e.Key(x.ref)
		if err := r.class.RecordType().Encode(e, x.rec); err != nil {
			return err
		}
	}
	e.EndStruct()
	return nil
}
