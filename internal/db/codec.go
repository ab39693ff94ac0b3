package db

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strconv"

	"github.com/google/uuid"

	"coppice/internal/xapi"
)

// codec reads and writes the rows of a class: JSON objects of the persistent fields by field name. Computed
// sides are not stored.
type codec struct {
	class  *xapi.Class
	fields []*xapi.Field
	index  []int        // of each field in the struct
	shape  reflect.Type // a struct of pointers to the fields, with their names as JSON tags

	// preset are the maps whose default has members. encoding/json adds to a map that is there.
	preset []*xapi.Field

	model any // a record without anything in it, never changed; see quick
}

func newCodec(c *xapi.Class) *codec {
	k := &codec{class: c}
	var shape []reflect.StructField
	for _, f := range c.Fields {
		if !f.Persist || f.Computed {
			continue
		}
		shape = append(shape, reflect.StructField{
			Name: "F" + strconv.Itoa(len(shape)),
			Type: reflect.PointerTo(f.Type.GoType()),
			Tag:  reflect.StructTag(`json:"` + f.Name + `"`),
		})
		k.fields = append(k.fields, f)
		k.index = append(k.index, slices.IndexFunc(reflect.VisibleFields(c.GoType), func(sf reflect.StructField) bool {
			return sf.Tag.Get("xapi") == f.Name
		}))
		if f.Type.Kind == xapi.KindMap && reflect.ValueOf(f.Default).Len() > 0 {
			k.preset = append(k.preset, f)
		}
	}
	k.shape = reflect.StructOf(shape)
	k.model = k.blank()
	return k
}

// view returns a pointer to a struct that points to the stored fields of rec.
func (k *codec) view(rec any) any {
	v := reflect.New(k.shape)
	for i, f := range k.fields {
		v.Elem().Field(i).Set(reflect.ValueOf(f.Pointer(rec)))
	}
	return v.Interface()
}

// encode writes an object. Fields that the model does not know are kept.
func (k *codec) encode(o *object) ([]byte, error) {
	data, err := json.Marshal(k.view(o.rec))
	if err != nil {
		return nil, fmt.Errorf("db: %s %s: %w", k.class.Name, o.ref, err)
	}
	for _, name := range slices.Sorted(maps.Keys(o.unknown)) {
		comma := ","
		if len(data) == len("{}") {
			comma = ""
		}
		key, _ := json.Marshal(name) // a string cannot fail
		data = fmt.Appendf(data[:len(data)-1], "%s%s:%s}", comma, key, o.unknown[name])
	}
	return data, nil
}

// decode reads what encode wrote. Fields that are missing get their default; those that the model does not
// know are returned beside the record. previous may be another record of the class, with which the texts that are the
// same are shared.
func (k *codec) decode(row Row, previous any) (rec any, unknown map[string]json.RawMessage, err error) {
	if rec, ok := k.quick(row.Data, previous); ok {
		return k.defaults(rec), nil, nil
	}
	return k.decodeAny(row)
}

// object makes an object of a row. When it was created and modified is told by the history.
func (k *codec) object(row Row, previous any) (*object, error) {
	rec, unknown, err := k.decode(row, previous)
	if err != nil {
		return nil, err
	}
	k.class.Normalize(rec)
	if f := k.class.Field("uuid"); f != nil && text(f, rec) == "" {
		f.Set(rec, uuid.NewString())
	}
	return &object{ref: row.Ref, rec: rec, unknown: unknown}, nil
}

// decodeAny reads a row that somebody else may have written.
func (k *codec) decodeAny(row Row) (rec any, unknown map[string]json.RawMessage, err error) {
	rec = k.blank()
	d := json.NewDecoder(bytes.NewReader(row.Data))
	d.DisallowUnknownFields()
	if d.Decode(k.view(rec)) == nil {
		if _, err := d.Token(); err == io.EOF {
			return k.defaults(rec), nil, nil
		}
	}
	return k.decodeMembers(row)
}

// decodeMembers is the slow way, one field after the other: it keeps what is not known and finds what is
// wrong.
func (k *codec) decodeMembers(row Row) (rec any, unknown map[string]json.RawMessage, err error) {
	if err := json.Unmarshal(row.Data, &unknown); err != nil {
		return nil, nil, &CorruptError{Class: row.Class, Ref: row.Ref, Err: err}
	}
	rec = k.blank()
	for _, f := range k.fields {
		value, ok := unknown[f.Name]
		if !ok {
			continue
		}
		delete(unknown, f.Name)
		if err := json.Unmarshal(value, f.Pointer(rec)); err != nil {
			return nil, nil, &CorruptError{Class: row.Class, Ref: row.Ref, Field: f.Name, Err: err}
		}
	}
	for _, f := range k.class.Fields {
		delete(unknown, f.Name) // not stored by this program
	}
	return k.defaults(rec), unknown, nil
}

// blank returns a record to decode into.
func (k *codec) blank() any {
	rec := k.class.New()
	for _, f := range k.preset {
		reflect.ValueOf(f.Pointer(rec)).Elem().SetZero()
	}
	return rec
}

// defaults gives the fields that blank has cleared, and decoding has not set, their default.
func (k *codec) defaults(rec any) any {
	for _, f := range k.preset {
		if reflect.ValueOf(f.Pointer(rec)).Elem().IsNil() {
			f.Set(rec, f.Get(k.class.New()))
		}
	}
	return rec
}
