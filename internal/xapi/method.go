package xapi

import (
	"encoding/json"
	"fmt"
	"strings"
)

// MethodKind says what a method does when the model alone decides it.
type MethodKind string

const (
	Custom             MethodKind = "custom"
	Constructor        MethodKind = "constructor"
	Destructor         MethodKind = "destructor"
	FieldGetter        MethodKind = "field_getter"
	FieldSetter        MethodKind = "field_setter"
	FieldAdd           MethodKind = "field_add"
	FieldRemove        MethodKind = "field_remove"
	GetAll             MethodKind = "get_all"
	GetAllWhere        MethodKind = "get_all_where"
	GetAllRecords      MethodKind = "get_all_records"
	GetAllRecordsWhere MethodKind = "get_all_records_where"
	GetByUUID          MethodKind = "get_by_uuid"
	GetByNameLabel     MethodKind = "get_by_name_label"
	GetRecord          MethodKind = "get_record"
)

// Method describes a message of a class, which is a method a client may call.
type Method struct {
	Class        *Class
	Name         string
	Kind         MethodKind
	Session      bool // takes a session before its parameters
	Params       []Param
	Result       *Type
	Errors       []string // declared only
	Async        bool     // an Async. variant exists
	Role         string   // the least role; local-root is only for the local superuser and the pool
	ExtraRoles   []string // further roles outside the line of privileges
	KeyRoles     map[string]string
	Hidden       bool // not documented, but callable
	PoolInternal bool // for pool sessions only
	Introduced   string
	State        string // empty when published
	Field        *Field // of field_getter, field_setter, field_add and field_remove
}

// Param describes a positional parameter.
type Param struct {
	Name       string
	Type       *Type
	HasDefault bool // optional; may be left out from the end
	Default    any  // typed. Shared: read only
}

// FullName returns Class.name.
func (m *Method) FullName() string { return m.Class.Name + "." + m.Name }

// Required returns how many parameters a call must give, the session not counted.
func (m *Method) Required() int {
	for i, p := range m.Params {
		if p.HasDefault {
			return i
		}
	}
	return len(m.Params)
}

type methodJSON struct {
	Name         string            `json:"name"`
	Kind         MethodKind        `json:"kind"`
	Params       []paramJSON       `json:"params"`
	Result       string            `json:"result"`
	Errors       []string          `json:"errors"`
	Async        bool              `json:"async"`
	Role         string            `json:"role"`
	ExtraRoles   []string          `json:"extra_roles"`
	KeyRoles     map[string]string `json:"key_roles"`
	Hidden       bool              `json:"hidden"`
	PoolInternal bool              `json:"pool_internal"`
	Introduced   string            `json:"introduced"`
	State        string            `json:"state"`
}

type paramJSON struct {
	Name    string          `json:"name"`
	Type    string          `json:"type"`
	Default json.RawMessage `json:"default"`
}

func (m *Model) addMethod(c *Class, j *methodJSON) error {
	result, err := m.Type(j.Result)
	if err != nil {
		return err
	}
	me := &Method{
		Class: c, Name: j.Name, Kind: j.Kind, Result: result, Errors: j.Errors, Async: j.Async,
		Role: j.Role, ExtraRoles: j.ExtraRoles, KeyRoles: j.KeyRoles,
		Hidden: j.Hidden, PoolInternal: j.PoolInternal, Introduced: j.Introduced, State: j.State,
	}
	for i, p := range j.Params {
		if i == 0 && p.Name == "session_id" {
			me.Session = true
			continue
		}
		typ, err := m.Type(p.Type)
		if err != nil {
			return err
		}
		param := Param{Name: p.Name, Type: typ, HasDefault: len(p.Default) > 0}
		if param.HasDefault {
			if param.Default, err = typ.defaultValue(p.Default); err != nil {
				return err
			}
		}
		me.Params = append(me.Params, param)
	}
	if prefixes, ok := fieldPrefixes[j.Kind]; ok {
		for _, prefix := range prefixes {
			if name, ok := strings.CutPrefix(j.Name, prefix); ok && c.byName[name] != nil {
				me.Field = c.byName[name]
				break
			}
		}
		if me.Field == nil {
			return fmt.Errorf("no field for a method of kind %s", j.Kind)
		}
	}
	c.Methods[me.Name] = me
	return nil
}

// fieldPrefixes are what stands before the field name in the name of a method, the longest first.
var fieldPrefixes = map[MethodKind][]string{
	FieldGetter: {"get_"},
	FieldSetter: {"set_"},
	FieldAdd:    {"add_to_", "add_"},
	FieldRemove: {"remove_from_", "remove_"},
}
