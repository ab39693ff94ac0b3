package xapi

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"sync"
)

//go:embed datamodel.json
var datamodelJSON []byte

// Datamodel returns the model of the API. It is built at the first call and shared: read only.
func Datamodel() *Model { return datamodel() }

var datamodel = sync.OnceValue(func() *Model {
	m, err := load(datamodelJSON)
	if err != nil {
		panic("xapi: embedded datamodel.json: " + err.Error())
	}
	return m
})

// Model is everything the data model says.
type Model struct {
	APIMajor, APIMinor int64
	Classes            map[string]*Class
	Ordered            []*Class            // the classes sorted by name
	Enums              map[string][]string // values in declaration order
	Errors             map[string][]string // parameter names by code; nil for undeclared codes
	Relations          []*Relation
	HTTP               map[string]*HTTPAction // by action name, such as get_export_raw_vdi
	Roles              []string               // in order of decreasing privilege, without internal roles
	Alerts             map[string]int64       // priority by message name
	Releases           []Release              // oldest first

	types  sync.Map // *Type by name
	byType map[reflect.Type]*Class

	records map[string]recordType
	enums   map[string]reflect.Type
}

// Relation joins a stored reference to the set of references that is computed from it: an object X appears in
// the To field of every object that the From field of X names.
type Relation struct {
	From *Field // the stored side; a ref, or a set of refs when the relation is many to many
	To   *Field // the computed side, a set of refs
}

// HTTPAction is a request to an HTTP handler, with the role it needs.
type HTTPAction struct {
	Name       string            `json:"name"`
	Method     string            `json:"method"` // GET, PUT …
	URI        string            `json:"uri"`
	Role       string            `json:"role"`
	ExtraRoles []string          `json:"extra_roles"`
	SubRoles   map[string]string `json:"sub_roles"` // role by permission, for parts of the action
	RBAC       bool              `json:"rbac"`      // false: the handler makes its own check
	Args       []HTTPArg         `json:"args"`
}

// HTTPArg is a query parameter of an HTTP action.
type HTTPArg struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

// Release is a named release of the API.
type Release struct {
	CodeName string `json:"code_name"`
	API      string `json:"api"`
	Branding string `json:"branding"`
}

// ClassOf returns the class whose record is T, or nil.
func ClassOf[T any]() *Class { return Datamodel().byType[reflect.TypeFor[T]()] }

// ClassOfRecord returns the class of a record, which is a pointer to one of the generated structs, or nil.
func (m *Model) ClassOfRecord(rec any) *Class {
	t := reflect.TypeOf(rec)
	if t == nil || t.Kind() != reflect.Pointer {
		return nil
	}
	return m.byType[t.Elem()]
}

// New returns a record with every field at its default: sets and maps empty, references null, dates at the
// epoch, enums without default at their first value.
func New[T any]() *T { return ClassOf[T]().New().(*T) }

// Allows says whether the role have is as privileged as the role need. Roles outside the line of privileges
// (local-root, client-cert) allow and need exactly themselves.
func (m *Model) Allows(have, need string) bool {
	if have == need {
		return true
	}
	h, n := slices.Index(m.Roles, have), slices.Index(m.Roles, need)
	return h >= 0 && n >= 0 && h <= n
}

// modelJSON is the shape of datamodel.json.
type modelJSON struct {
	Format           int                 `json:"format"`
	APIVersion       [2]int64            `json:"api_version"`
	Roles            []roleJSON          `json:"roles"`
	Releases         []Release           `json:"releases"`
	Enums            map[string][]string `json:"enums"`
	Errors           map[string][]string `json:"errors"`
	ErrorsUndeclared []string            `json:"errors_undeclared"`
	Alerts           map[string]int64    `json:"alerts"`
	Relations        [][4]string         `json:"relations"`
	HTTP             []*HTTPAction       `json:"http"`
	Classes          map[string]*classJSON
}

type roleJSON struct {
	Name     string `json:"name"`
	Internal bool   `json:"internal"`
}

// load builds the model from the text of datamodel.json and the generated Go types.
func load(data []byte) (*Model, error) {
	var j modelJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return nil, err
	}
	if j.Format != 1 {
		return nil, fmt.Errorf("format %d is not known", j.Format)
	}
	m := &Model{
		APIMajor: j.APIVersion[0],
		APIMinor: j.APIVersion[1],
		Classes:  make(map[string]*Class, len(j.Classes)),
		Enums:    j.Enums,
		Errors:   j.Errors,
		HTTP:     make(map[string]*HTTPAction, len(j.HTTP)),
		Alerts:   j.Alerts,
		Releases: j.Releases,
		byType:   make(map[reflect.Type]*Class, len(j.Classes)),
		records:  recordTypes(),
		enums:    enumTypes(),
	}
	for _, code := range j.ErrorsUndeclared {
		m.Errors[code] = nil
	}
	for _, r := range j.Roles {
		if !r.Internal {
			m.Roles = append(m.Roles, r.Name)
		}
	}
	for _, h := range j.HTTP {
		m.HTTP[h.Name] = h
	}
	if err := m.addClasses(j.Classes); err != nil {
		return nil, err
	}
	for _, r := range j.Relations {
		if err := m.addRelation(r); err != nil {
			return nil, err
		}
	}
	for _, c := range m.Ordered {
		c.plan()
	}
	return m, nil
}

// addRelation joins two fields. A field that is listed as its own inverse (the roles of a subject, the
// subroles of a role) has no computed side: it is just stored.
func (m *Model) addRelation(r [4]string) error {
	from, to := m.field(r[0], r[1]), m.field(r[2], r[3])
	if from == nil || to == nil {
		return fmt.Errorf("relation %v names a field that does not exist", r)
	}
	if from == to {
		return nil
	}
	rel := &Relation{From: from, To: to}
	m.Relations = append(m.Relations, rel)
	from.Class.Forward = append(from.Class.Forward, rel)
	to.Computed = true
	return nil
}

func (m *Model) field(class, name string) *Field {
	if c := m.Classes[class]; c != nil {
		return c.Field(name)
	}
	return nil
}
