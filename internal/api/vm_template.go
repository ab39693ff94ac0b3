package api

import (
	"github.com/google/uuid"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// defaultTemplate is the template that every server has: a VM without disks,
// to be installed from media or filled by an import. Clients look for its name.
const (
	defaultTemplate      = "Other install media"
	defaultTemplateLabel = "other-install-media"
)

// ensureTemplates makes the default template where there is none.
func (a *API) ensureTemplates(tx *db.Tx) error {
	for _, ref := range db.ByName[xapi.VM](tx, defaultTemplate) {
		if vm, err := db.Get(tx, ref); err == nil && vm.IsATemplate && vm.IsDefaultTemplate {
			return nil
		}
	}
	vm := xapi.New[xapi.VM]()
	vm.NameLabel, vm.ReferenceLabel = defaultTemplate, defaultTemplateLabel
	vm.NameDescription = "Template which allows VM installation from install media"
	vm.IsATemplate, vm.IsDefaultTemplate = true, true
	vm.PowerState, vm.Domid = xapi.VMPowerStateHalted, -1
	vm.MemoryStaticMin, vm.MemoryDynamicMin = 128*mebibyte, 256*mebibyte
	vm.MemoryStaticMax, vm.MemoryDynamicMax = 256*mebibyte, 256*mebibyte
	vm.VCPUsMax, vm.VCPUsAtStartup = 1, 1
	vm.ActionsAfterShutdown, vm.ActionsAfterReboot = xapi.OnNormalExitDestroy, xapi.OnNormalExitRestart
	vm.ActionsAfterCrash = xapi.OnCrashBehaviourRestart
	vm.DomainType = xapi.DomainTypeHVM
	vm.HVMBootPolicy, vm.HVMBootParams = "BIOS order", map[string]string{"order": "cdn", "firmware": "bios"}
	vm.MemoryOverhead = memoryOverhead(vm)
	vm.Platform = map[string]string{"acpi": "1", "apic": "true", "nx": "true", "pae": "true", "viridian": "true", "vga": "std", "videoram": "8"}
	vm.OtherConfig = map[string]string{"default_template": "true", "install-methods": "cdrom", macSeedKey: uuid.NewString()}
	metrics, err := db.Insert(tx, xapi.New[xapi.VMMetrics]())
	if err != nil {
		return err
	}
	vm.Metrics = metrics
	ref, err := db.Insert(tx, vm)
	if err != nil {
		return err
	}
	return a.refreshVM(tx, ref)
}
