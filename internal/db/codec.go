package db

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"coppice/internal/xapi"
)

// encodeRow writes the persistent fields of an object as a JSON object by field name. Computed sides are
// left out, fields that the model does not know are kept.
func encodeRow(c *xapi.Class, o *object) ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for _, f := range c.Fields {
		if !f.Persist || f.Computed {
			continue
		}
		value, err := json.Marshal(f.Pointer(o.rec))
		if err != nil {
			return nil, fmt.Errorf("db: %s of %s: %w", f, o.ref, err)
		}
		putMember(&b, f.Name, value)
	}
	for _, name := range slices.Sorted(maps.Keys(o.unknown)) {
		putMember(&b, name, o.unknown[name])
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

func putMember(b *bytes.Buffer, name string, value []byte) {
	if b.Len() > 1 {
		b.WriteByte(',')
	}
	key, _ := json.Marshal(name) // a string cannot fail
	b.Write(key)
	b.WriteByte(':')
	b.Write(value)
}

var errNotObject = errors.New("not a JSON object")

// decodeRow reads what encodeRow wrote. Fields that are missing get their default; those that the model does
// not know are returned beside the record.
func decodeRow(c *xapi.Class, row Row) (rec any, unknown map[string]json.RawMessage, err error) {
	corrupt := func(field string, err error) error {
		return &CorruptError{Class: row.Class, Ref: row.Ref, Field: field, Err: err}
	}
	d := json.NewDecoder(bytes.NewReader(row.Data))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, nil, corrupt("", errNotObject)
	}
	rec = c.New()
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, nil, corrupt("", err)
		}
		name, _ := t.(string)
		if f := c.Field(name); f != nil && !f.Computed {
			if err := d.Decode(f.Pointer(rec)); err != nil {
				return nil, nil, corrupt(name, err)
			}
			continue
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, nil, corrupt(name, err)
		}
		if c.Field(name) == nil {
			if unknown == nil {
				unknown = make(map[string]json.RawMessage)
			}
			unknown[name] = value
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, nil, corrupt("", err)
	}
	return rec, unknown, nil
}
