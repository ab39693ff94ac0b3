package xecmd

import (
	"context"
	"encoding/xml"

	"coppice/internal/xapi"
)

func vmInstallCommands() []command {
	return []command{
		{
			name: "vm-install", required: []string{"new-name-label"},
			optional: []string{"template", "template-uuid", "template-name", "template-name-label", "sr-uuid", "sr-name-label", "copy-bios-strings-from"},
			help:     "Install a new VM from a template. The template parameter can match either the template name or the uuid. Without an SR the disks are fast clones of the template's, with one they are full copies there.",
			run:      vmInstall,
		},
	}
}

// disksKey in the other_config of a template describes the disks that
// VM.provision makes.
const disksKey = "disks"

// vmInstall makes a VM of a template, and destroys it again when it cannot be
// provisioned.
func vmInstall(ctx context.Context, r *run) error {
	template, err := r.template(ctx)
	if err != nil {
		return err
	}
	sr, err := r.namedSR(ctx)
	if err != nil {
		return err
	}
	var rec *xapi.VM
	err = r.read(func(v view) error {
		found, ok := v.Lookup(xapi.ClassOf[xapi.VM](), template)
		if !ok {
			return xapi.NewError(xapi.ErrHandleInvalid, "VM", template)
		}
		rec = found.(*xapi.VM)
		return nil
	})
	switch {
	case err != nil:
		return err
	case !rec.IsATemplate:
		return failf("Can only install from templates")
	case rec.IsASnapshot && sr != xapi.NullRef:
		return failf("Do not use the sr-name-label or sr-uuid argument when installing from a snapshot. By default, it will install each new disk on the same SR as the corresponding snapshot disks.")
	}
	name := r.args.str("new-name-label")
	var vm string
	if sr == xapi.NullRef || len(rec.VBDs) == 0 {
		vm, err = r.callText(ctx, "VM.clone", template, name)
	} else {
		vm, err = r.made(ctx, "VM.copy", template, name, sr)
	}
	if err != nil {
		return err
	}
	if err := r.provision(ctx, vm, rec, sr); err != nil {
		_ = uninstallVM(context.WithoutCancel(ctx), r, vm) // err says why
		return err
	}
	return r.printUUID(ctx, "VM", vm)
}

// provision makes a clone of a template a VM, with the disks that the template
// describes in sr.
func (r *run) provision(ctx context.Context, vm string, template *xapi.VM, sr string) error {
	if err := r.do(ctx, "VM.set_name_description", vm, "Installed via xe CLI"); err != nil {
		return err
	}
	if text := template.OtherConfig[disksKey]; text != "" && sr != xapi.NullRef {
		text, err := withSR(text, sr)
		if err != nil {
			return err
		}
		if err := r.do(ctx, "VM.remove_from_other_config", vm, disksKey); err != nil {
			return err
		}
		if err := r.do(ctx, "VM.add_to_other_config", vm, disksKey, text); err != nil {
			return err
		}
	}
	return r.do(ctx, "VM.provision", vm)
}

// withSR rewrites a description of disks so that all of them are made in sr.
func withSR(text, sr string) (string, error) {
	type disk struct {
		Attrs []xml.Attr `xml:",any,attr"`
	}
	var disks struct {
		XMLName xml.Name `xml:"provision"`
		Disks   []disk   `xml:"disk"`
	}
	if err := xml.Unmarshal([]byte(text), &disks); err != nil {
		return "", failf("The template's description of its disks is not understood: %v", err)
	}
	for i := range disks.Disks {
		attrs := disks.Disks[i].Attrs
		found := false
		for j := range attrs {
			if attrs[j].Name.Local == "sr" {
				attrs[j].Value, found = sr, true
			}
		}
		if !found {
			disks.Disks[i].Attrs = append(attrs, xml.Attr{Name: xml.Name{Local: "sr"}, Value: sr})
		}
	}
	out, err := xml.Marshal(disks)
	return string(out), err
}

// uninstallVM destroys a VM and the disks that it owns.
func uninstallVM(ctx context.Context, r *run, vm string) error {
	var d doomed
	if err := r.read(func(v view) error { d.collect(v, vm); return nil }); err != nil {
		return err
	}
	return d.destroy(ctx, r)
}

// template returns the template that the command line names, by uuid or by
// name.
func (r *run) template(ctx context.Context) (string, error) {
	for _, param := range []string{"template-uuid", "template-name", "template-name-label", "template"} {
		wanted, ok := r.args.lookup(param)
		if !ok {
			continue
		}
		if param == "template-uuid" {
			vm, err := r.byUUID(ctx, "VM", wanted)
			if err != nil {
				return "", failf("Cannot find template")
			}
			return vm, nil
		}
		return single(r, func(vm *xapi.VM) bool {
			return vm.IsATemplate && (vm.NameLabel == wanted || r.args.has("template") && vm.UUID == wanted)
		}, "No templates matched", "More than one matching template found")
	}
	return "", missing("template")
}

// namedSR returns the SR that the command line names, by uuid or by name, or
// the null reference.
func (r *run) namedSR(ctx context.Context) (string, error) {
	name, ok := r.args.lookup("sr-name-label")
	if !ok || r.args.has("sr-uuid") {
		return r.optionalRef(ctx, "SR", "sr-uuid")
	}
	return single(r, func(sr *xapi.SR) bool { return sr.NameLabel == name },
		"No SR with that name-label found", "Multiple SRs with that name-label found")
}

// single returns the only object that match takes; none and many are what is
// said when there is no such object, or more than one.
func single[T any](r *run, match func(*T) bool, none, many string) (string, error) {
	var found []string
	err := r.read(func(v view) error {
		for ref, rec := range v.Each(xapi.ClassOf[T]()) {
			if match(rec.(*T)) {
				found = append(found, ref)
			}
		}
		return nil
	})
	switch {
	case err != nil:
		return "", err
	case len(found) == 0:
		return "", failf("%s", none)
	case len(found) > 1:
		return "", failf("%s", many)
	}
	return found[0], nil
}
