package api

import (
	"fmt"

	"github.com/google/uuid"

	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// importError is IMPORT_ERROR with a text.
func importError(format string, args ...any) error {
	return xapi.NewError(xapi.ErrImportError, fmt.Sprintf(format, args...))
}

// arrival is a manifest that has been read: its records by their names there.
// What refers to a record does so by that name.
type arrival struct {
	vms  []string // in the order of the manifest, without control domains
	recs map[string]any
	vbds map[string][]*xapi.VBD // by VM
	vifs map[string][]*xapi.VIF
}

// part returns a record of a manifest, nil when it has none of that name and
// class.
func part[T any](ar *arrival, id xapi.Ref[T]) *T {
	rec, _ := ar.recs[string(id)].(*T)
	return rec
}

// readManifest reads a manifest from anywhere. The error is an IMPORT_ERROR
// that says what is wrong, or IMPORT_INCOMPATIBLE_VERSION.
func readManifest(text []byte) (*arrival, error) {
	v, err := rpc.ParseXMLValue(string(text))
	if err != nil {
		return nil, importError("the manifest: %v", err)
	}
	doc, _ := v.(map[string]any)
	version, ok := doc["version"].(map[string]any)
	if !ok {
		return nil, xapi.NewError(xapi.ErrImportIncompatibleVersion)
	}
	if n, err := manifestInt(version["export_vsn"]); err != nil || n < 0 || n > exportVersion {
		return nil, xapi.NewError(xapi.ErrImportIncompatibleVersion)
	}
	objects, ok := doc["objects"].([]any)
	if !ok {
		return nil, importError("the manifest has no objects")
	}
	ar := &arrival{recs: map[string]any{}, vbds: map[string][]*xapi.VBD{}, vifs: map[string][]*xapi.VIF{}}
	for i, o := range objects {
		if err := ar.add(o); err != nil {
			return nil, importError("object %d of the manifest: %v", i, err)
		}
	}
	return ar, nil
}

// manifestInt reads a number, whose value is a string in most manifests. One
// that is missing is 0, as in manifests of the first version.
func manifestInt(v any) (int64, error) {
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
func (ar *arrival) add(o any) error {
	object, _ := o.(map[string]any)
	name, _ := object["class"].(string)
	id, _ := object["id"].(string)
	fields, ok := object["snapshot"].(map[string]any)
	if !ok || name == "" || id == "" || id == xapi.NullRef {
		return fmt.Errorf("no class, id or snapshot")
	}
	if ar.recs[id] != nil {
		return fmt.Errorf("a second %s", id)
	}
	switch name {
	case "VM", "VM_metrics", "VM_guest_metrics", "VBD", "VIF", "VDI", "SR", "network", "host":
	default:
		return nil
	}
	rec, err := readRecord(xapi.Datamodel().Classes[name], fields)
	if err != nil {
		return fmt.Errorf("%s: %w", id, err)
	}
	ar.recs[id] = rec
	switch rec := rec.(type) {
	case *xapi.VM:
		if !rec.IsControlDomain {
			ar.vms = append(ar.vms, id)
		}
	case *xapi.VBD:
		ar.vbds[string(rec.VM)] = append(ar.vbds[string(rec.VM)], rec)
	case *xapi.VIF:
		ar.vifs[string(rec.VM)] = append(ar.vifs[string(rec.VM)], rec)
	}
	return nil
}

// readRecord reads the stored fields of a record. Fields that it does not know
// are left out, for they may be of a newer server, and so are sets and maps
// with such values; missing ones have their defaults. Any other value that
// does not fit is an error.
func readRecord(class *xapi.Class, fields map[string]any) (any, error) {
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

// filled tells whether the contents of a disk of the manifest are in the
// archive when it hangs on a VBD of type Disk or is memory.
func (ar *arrival) filled(vdi *xapi.VDI) bool {
	sr := part(ar, vdi.SR)
	return sr == nil || sr.ContentType != isoContent
}

// canonicalUUID says whether text is a UUID in the form in which this server
// writes them.
func canonicalUUID(text string) bool {
	u, err := uuid.Parse(text)
	return err == nil && u.String() == text
}
