package ova

import (
	"errors"
	"fmt"
	"io"

	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// importError is IMPORT_ERROR with a text.
func importError(format string, args ...any) error {
	return xapi.NewError(xapi.ErrImportError, fmt.Sprintf(format, args...))
}

// MaxValues is how many values a manifest may have: elements of arrays and
// members of structs. A VM with 800 snapshots of 16 disks has 930,000, in
// 63 MB, of which 21 MiB are kept. All records together may have as many
// fields, whether the manifest gives them or not: what it leaves out takes
// memory, too.
const MaxValues = 1_000_000

// Manifest is a manifest that has been read: its records by their names there.
// What refers to a record does so by that name.
type Manifest struct {
	VMs []xapi.Ref[xapi.VM] // in the order of the manifest, without control domains

	recs   map[string]any
	fields int // of all records
	vbds   map[xapi.Ref[xapi.VM]][]*xapi.VBD
	vifs   map[xapi.Ref[xapi.VM]][]*xapi.VIF
}

// Get returns a record of a manifest, nil when it has none of that name and
// class.
func Get[T any](m *Manifest, id xapi.Ref[T]) *T {
	rec, _ := m.recs[string(id)].(*T)
	return rec
}

// VBDs returns the VBDs of a VM in the order of the manifest.
func (m *Manifest) VBDs(vm xapi.Ref[xapi.VM]) []*xapi.VBD { return m.vbds[vm] }

// VIFs returns the VIFs of a VM in the order of the manifest.
func (m *Manifest) VIFs(vm xapi.Ref[xapi.VM]) []*xapi.VIF { return m.vifs[vm] }

// Parse reads a manifest from anywhere. It may refer to what it does not have.
// Neither its text nor more values than those of one object are in memory at
// a time. The error is an IMPORT_ERROR that says what is wrong,
// IMPORT_INCOMPATIBLE_VERSION, or what the reader said.
func Parse(r io.Reader) (*Manifest, error) { return parse(r, MaxValues) }

// parse is Parse for a manifest with at most so many values.
func parse(r io.Reader, values int) (*Manifest, error) {
	m := &Manifest{recs: map[string]any{}, vbds: map[xapi.Ref[xapi.VM]][]*xapi.VBD{}, vifs: map[xapi.Ref[xapi.VM]][]*xapi.VIF{}}
	x := rpc.NewXMLReader(r, values)
	err := m.read(x, values)
	if err == nil {
		err = x.End()
	}
	if e, ok := errors.AsType[*rpc.SyntaxError](err); ok {
		return nil, importError("the manifest: %v", e)
	}
	if e, ok := errors.AsType[*rpc.TooManyValuesError](err); ok {
		what := "manifest"
		if e.Limit != values {
			what = "object of the manifest"
		}
		return nil, importError("the %s has more than %d values (fields, elements of sets and entries of maps): import fewer VMs or snapshots at once", what, e.Limit)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

// read reads the value of a manifest, whose records have at most so many fields.
func (m *Manifest) read(x *rpc.XMLReader, values int) error {
	var versions, lists int
	for name := range x.Members() {
		switch name {
		case "version":
			versions++
			if err := checkVersion(x); err != nil {
				return err
			}
		case "objects":
			lists++
			for i := range x.Elements() {
				o := x.Value()
				if err := x.Err(); err != nil {
					return err
				}
				if err := m.add(o); err != nil {
					return importError("object %d of the manifest: %v", i, err)
				}
				if m.fields > values {
					return &rpc.TooManyValuesError{Limit: values}
				}
			}
		default:
			x.Value()
		}
	}
	if err := x.Err(); err != nil {
		return err
	}
	switch {
	case versions == 0:
		return xapi.NewError(xapi.ErrImportIncompatibleVersion)
	case lists == 0:
		return importError("the manifest has no objects")
	case versions > 1 || lists > 1:
		return importError("the manifest has a version or objects twice")
	}
	return nil
}

// checkVersion reads the version of a manifest.
func checkVersion(x *rpc.XMLReader) error {
	v := x.Value()
	if err := x.Err(); err != nil {
		return err
	}
	version, _ := v.(map[string]any)
	if n, err := parseInt(version["export_vsn"]); version == nil || err != nil || n < 0 || n > exportVersion {
		return xapi.NewError(xapi.ErrImportIncompatibleVersion)
	}
	return nil
}

// parseInt reads a number, whose value is a string in most manifests. One
// that is missing is 0, as in manifests of the first version.
func parseInt(v any) (int64, error) {
	if v == nil {
		return 0, nil
	}
	t, err := xapi.Datamodel().Type("int")
	if err != nil {
		return 0, err
	}
	n, err := t.Parse(v)
	if err != nil {
		return 0, err
	}
	return n.(int64), nil
}

// add reads an object. Those of classes that an import has no use for are
// left out.
func (m *Manifest) add(o any) error {
	object, _ := o.(map[string]any)
	name, _ := object["class"].(string)
	id, _ := object["id"].(string)
	fields, ok := object["snapshot"].(map[string]any)
	if !ok || name == "" || id == "" || id == xapi.NullRef {
		return fmt.Errorf("no class, id or snapshot")
	}
	if m.recs[id] != nil {
		return fmt.Errorf("a second %s", id)
	}
	switch name {
	case "VM", "VM_metrics", "VM_guest_metrics", "VBD", "VIF", "VDI", "SR", "network", "host":
	default:
		return nil
	}
	class := xapi.Datamodel().Classes[name]
	m.fields += len(class.Fields)
	rec, err := parseRecord(class, fields)
	if err != nil {
		return fmt.Errorf("%s: %w", id, err)
	}
	m.recs[id] = rec
	switch rec := rec.(type) {
	case *xapi.VM:
		if !rec.IsControlDomain {
			m.VMs = append(m.VMs, xapi.Ref[xapi.VM](id))
		}
	case *xapi.VBD:
		m.vbds[rec.VM] = append(m.vbds[rec.VM], rec)
	case *xapi.VIF:
		m.vifs[rec.VM] = append(m.vifs[rec.VM], rec)
	}
	return nil
}

// parseRecord reads the stored fields of a record. Fields that it does not know
// are left out, for they may be of a newer server, and so are sets and maps
// with such values; missing ones have their defaults. Any other value that
// does not fit is an error.
func parseRecord(class *xapi.Class, fields map[string]any) (any, error) {
	rec := class.New()
	for _, f := range class.Fields {
		v, ok := fields[f.Name]
		if !ok || f.Internal || f.Computed || f.Type.Kind == xapi.KindOption {
			continue
		}
		parsed, err := f.Type.Parse(v)
		switch {
		case err == nil:
			f.Set(rec, parsed)
		case v == "" && f.Type.Kind == xapi.KindEnum, f.Type.Kind == xapi.KindSet, f.Type.Kind == xapi.KindMap:
		default:
			return nil, fmt.Errorf("%s: %w", f.Name, err)
		}
	}
	return rec, nil
}

// Filled tells whether the contents of a disk of the manifest are in the
// archive when it hangs on a VBD of type Disk or is memory.
func (m *Manifest) Filled(vdi *xapi.VDI) bool {
	sr := Get(m, vdi.SR)
	return sr == nil || sr.ContentType != isoContent
}

// Disks returns the names of the disks whose contents are in an archive, in
// the order of their VMs.
func (m *Manifest) Disks() (ids []xapi.Ref[xapi.VDI]) {
	seen := map[xapi.Ref[xapi.VDI]]bool{}
	add := func(id xapi.Ref[xapi.VDI]) {
		if vdi := Get(m, id); vdi != nil && !seen[id] && m.Filled(vdi) {
			seen[id] = true
			ids = append(ids, id)
		}
	}
	for _, id := range m.VMs {
		for _, vbd := range m.vbds[id] {
			if vbd.Type == xapi.VBDTypeDisk {
				add(vbd.VDI)
			}
		}
		if vm := Get(m, id); vm.PowerState == xapi.VMPowerStateSuspended {
			add(vm.SuspendVDI)
		}
	}
	return ids
}
