package api

import (
	"context"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"coppice/internal/db"
	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// defaultSRType is the driver of the SR that a new server starts with, where
// it is linked in.
const defaultSRType = "cow"

// defaultStore is where that SR has its storage.
const defaultStore = "store"

// bootstrap makes sure that the objects exist without which no client can
// work: one pool with one host, its control domain and a network, an SM for
// each driver, and on the very first start an SR. What the program knows
// better than the database, such as its version, is written anew each time.
func (a *API) bootstrap(ctx context.Context) error {
	first := false
	err := a.db.View(func(tx *db.Tx) error {
		_, _, err := a.pool(tx)
		first = err != nil
		return nil
	})
	if err != nil {
		return err
	}
	if !first {
		return a.db.Update(ctx, func(tx *db.Tx) error {
			before := a.maker(tx)
			if err := a.refreshHost(tx); err != nil {
				return err
			}
			if err := a.ensureTemplates(tx); err != nil {
				return err
			}
			if err := cmpErr(a.refreshRoles(tx), a.refreshSMs(tx)); err != nil {
				return err
			}
			if !reflect.DeepEqual(before, a.maker(tx)) {
				tx.Renew()
			}
			return nil
		})
	}
	create := func(tx *db.Tx) error {
		if err := a.createPool(tx); err != nil {
			return err
		}
		if err := a.ensureTemplates(tx); err != nil {
			return err
		}
		return cmpErr(a.refreshRoles(tx), a.refreshSMs(tx))
	}
	drv, ok := a.cfg.Storage[defaultSRType]
	if !ok {
		types := a.cfg.Storage.Types()
		if len(types) == 0 {
			return a.db.Update(ctx, create)
		}
		drv = a.cfg.Storage[types[0]]
	}
	config := map[string]string{}
	if _, ok := drv.Config[locationKey]; ok {
		config[locationKey] = defaultStore
	}
	ref := xapi.NewRef[xapi.SR]()
	// Storage first, then every record in one commit: a crash in between
	// leaves an empty store, which the next start takes.
	return a.attach(ctx, ref, a.rooted(drv), config, true, func(tx *db.Tx) error {
		if err := create(tx); err != nil {
			return err
		}
		return a.createDefaultSR(tx, ref, drv, config)
	})
}

// maker is what the records say of the program and of its choices, from which
// follows all that is not in the database: which operations are allowed, and
// how records look. Where it changes, event tokens of before are worth nothing.
func (a *API) maker(tx *db.Tx) (facts []any) {
	if _, h, err := a.host(tx); err == nil {
		facts = append(facts, h.SoftwareVersion)
	}
	for _, sm := range db.All[xapi.SM](tx) {
		facts = append(facts, sm.Type, sm.Features)
	}
	return facts
}

// pool returns the one pool.
func (a *API) pool(tx *db.Tx) (xapi.Ref[xapi.Pool], *xapi.Pool, error) {
	for ref, p := range db.All[xapi.Pool](tx) {
		return ref, p, nil
	}
	return "", nil, xapi.NewError(xapi.ErrHandleInvalid, "pool", xapi.NullRef)
}

// host returns the one host.
func (a *API) host(tx *db.Tx) (xapi.Ref[xapi.Host], *xapi.Host, error) {
	for ref, h := range db.All[xapi.Host](tx) {
		return ref, h, nil
	}
	return "", nil, xapi.NewError(xapi.ErrHandleInvalid, "host", xapi.NullRef)
}

// createPool makes the pool, its host, the control domain and a network.
func (a *API) createPool(tx *db.Tx) error {
	metrics := xapi.New[xapi.HostMetrics]()
	metrics.UUID = uuid.NewString()
	metricsRef, err := db.Insert(tx, metrics)
	if err != nil {
		return err
	}
	hostRef, dom0Ref := xapi.NewRef[xapi.Host](), xapi.NewRef[xapi.VM]()

	h := xapi.New[xapi.Host]()
	h.NameLabel = hostname()
	h.NameDescription = "Default install"
	h.ControlDomain, h.Metrics = dom0Ref, metricsRef
	h.Enabled = true
	h.SchedPolicy = "credit2"
	h.Logging = map[string]string{}
	if err := db.InsertAs(tx, hostRef, h); err != nil {
		return err
	}
	if err := a.createControlDomain(tx, dom0Ref, hostRef); err != nil {
		return err
	}
	p := xapi.New[xapi.Pool]()
	p.Master = hostRef
	p.Restrictions = map[string]string{}
	for _, feature := range poolRestrictions {
		p.Restrictions["restrict_"+feature] = "false"
	}
	if _, err := db.Insert(tx, p); err != nil {
		return err
	}
	n := xapi.New[xapi.Network]()
	n.NameLabel = "Pool-wide network"
	n.NameDescription = "VMs keep the network they name; no packet travels on it"
	n.Bridge, n.Managed = "xenbr0", true
	if _, err := db.Insert(tx, n); err != nil {
		return err
	}
	return a.refreshHost(tx)
}

// poolRestrictions are the features that clients ask a licence about; nothing
// is restricted here.
var poolRestrictions = []string{
	"cbt", "checkpoint", "export_resource_data", "import_resource_data", "intellicache",
	"live_patching", "rbac", "rolling_pool_upgrade", "snapshots", "storage_xen_motion",
	"ssl_switch", "tls", "vmss", "vswitch_controller", "web_selfservice", "wlb",
}

// createControlDomain makes dom0, to which the disks are attached that the
// host itself uses.
func (a *API) createControlDomain(tx *db.Tx, ref xapi.Ref[xapi.VM], host xapi.Ref[xapi.Host]) error {
	total, _ := memory()
	metrics := xapi.New[xapi.VMMetrics]()
	metrics.MemoryActual, metrics.VCPUsNumber = total, 1
	metrics.StartTime, metrics.InstallTime = a.now().Truncate(time.Second), a.now().Truncate(time.Second)
	metricsRef, err := db.Insert(tx, metrics)
	if err != nil {
		return err
	}
	vm := xapi.New[xapi.VM]()
	vm.NameLabel = "Control domain on host: " + hostname()
	vm.NameDescription = "The domain which manages physical devices and manages other domains"
	vm.IsControlDomain, vm.PowerState = true, xapi.VMPowerStateRunning
	vm.ResidentOn, vm.Affinity = host, host
	vm.Domid, vm.DomainType = 0, xapi.DomainTypePV
	vm.VCPUsMax, vm.VCPUsAtStartup = 1, 1
	vm.MemoryStaticMin, vm.MemoryDynamicMin = total, total
	vm.MemoryStaticMax, vm.MemoryDynamicMax, vm.MemoryTarget = total, total, total
	vm.ActionsAfterShutdown, vm.ActionsAfterReboot = xapi.OnNormalExitDestroy, xapi.OnNormalExitDestroy
	vm.ActionsAfterCrash = xapi.OnCrashBehaviourDestroy
	vm.Metrics = metricsRef
	vm.HasVendorDevice = false
	return db.InsertAs(tx, ref, vm)
}

// createDefaultSR makes the records of the SR that clients find when they ask
// no further.
func (a *API) createDefaultSR(tx *db.Tx, ref xapi.Ref[xapi.SR], drv storage.Driver, config map[string]string) error {
	sr := newSR(drv.Type, "Local storage", drv.Description, "user", false, nil)
	if err := db.InsertAs(tx, ref, sr); err != nil {
		return err
	}
	host, _, err := a.host(tx)
	if err != nil {
		return err
	}
	pbd := xapi.New[xapi.PBD]()
	pbd.SR, pbd.Host, pbd.DeviceConfig, pbd.CurrentlyAttached = ref, host, config, true
	if _, err := db.Insert(tx, pbd); err != nil {
		return err
	}
	pool, _, err := a.pool(tx)
	if err != nil {
		return err
	}
	err = db.Modify(tx, pool, func(p *xapi.Pool) {
		p.DefaultSR, p.SuspendImageSR, p.CrashDumpSR = ref, ref, ref
	})
	if err != nil {
		return err
	}
	return db.Modify(tx, host, func(h *xapi.Host) { h.SuspendImageSR, h.CrashDumpSR = ref, ref })
}

// refreshHost writes what this process knows about its host.
func (a *API) refreshHost(tx *db.Tx) error {
	ref, h, err := a.host(tx)
	if err != nil {
		return err
	}
	total, free := memory()
	err = db.Modify(tx, h.Metrics, func(m *xapi.HostMetrics) {
		m.Live, m.LastUpdated = true, a.now().Truncate(time.Second)
		m.MemoryTotal, m.MemoryFree = total, free
	})
	if err != nil {
		return err
	}
	cpus := strconv.Itoa(runtime.NumCPU())
	return db.Modify(tx, ref, func(h *xapi.Host) {
		h.Address, h.Hostname, h.Enabled = a.cfg.HostAddress(), hostname(), true
		h.APIVersionMajor, h.APIVersionMinor = a.model.APIMajor, a.model.APIMinor
		h.APIVersionVendor = "XenSource"
		h.SoftwareVersion = a.softwareVersion()
		h.Edition, h.Editions = "free", []string{"free"}
		h.LicenseParams = map[string]string{"sku_type": "free", "expiry": "20991231T00:00:00Z"}
		h.CPUInfo = map[string]string{"cpu_count": cpus, "socket_count": "1"}
		h.BootFreeMem = free
		h.SSLLegacy = false
	})
}

// softwareVersion is what clients decide by which features to use. The
// product's own version is under its own name; the rest names the generation
// of XenAPI servers whose behaviour this one has.
func (a *API) softwareVersion() map[string]string {
	return map[string]string{
		"coppice":          a.cfg.Version,
		"product_brand":    "Coppice",
		"product_version":  "8.3.0",
		"platform_name":    "XCP",
		"platform_version": "3.4.0",
		"xapi":             "25.6.0",
		"build_number":     "coppice-" + a.cfg.Version,
	}
}

// refreshSMs makes the SM records equal to the drivers of this program: the
// features of each are what its code implements, but for the one that is given
// up when VMs are reverted by cloning.
func (a *API) refreshSMs(tx *db.Tx) error {
	known := map[string]xapi.Ref[xapi.SM]{}
	for ref, sm := range db.All[xapi.SM](tx) {
		known[sm.Type] = ref
	}
	for typ, ref := range known {
		if _, ok := a.cfg.Storage[typ]; !ok {
			if err := db.Delete(tx, ref); err != nil {
				return err
			}
		}
	}
	for _, typ := range a.cfg.Storage.Types() {
		drv := a.cfg.Storage[typ]
		ref, ok := known[typ]
		if !ok {
			var err error
			sm := xapi.New[xapi.SM]()
			sm.Type = typ
			if ref, err = db.Insert(tx, sm); err != nil {
				return err
			}
		}
		features, capabilities := map[string]int64{}, slices.Clone(drv.Features)
		if a.revertsByClone(tx) {
			capabilities = slices.DeleteFunc(capabilities, func(f string) bool { return f == "VDI_REVERT" })
		}
		for _, f := range capabilities {
			features[f] = 1
		}
		err := db.Modify(tx, ref, func(sm *xapi.SM) {
			sm.NameLabel, sm.NameDescription = typ, drv.Description
			sm.Vendor, sm.Version, sm.RequiredAPIVersion = "Coppice", a.cfg.Version, "1.0"
			sm.Features, sm.Capabilities = features, capabilities
			sm.Configuration = drv.Config
			sm.SupportedImageFormats = []xapi.ImageFormatType{}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func hostname() string {
	if name, err := os.Hostname(); err == nil {
		return name
	}
	return "localhost"
}

// memory returns the host's total and available memory in bytes, zero where
// the operating system does not say.
func memory() (total, available int64) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		n, _ := strconv.ParseInt(fields[1], 10, 64)
		switch fields[0] {
		case "MemTotal:":
			total = n << 10
		case "MemAvailable:":
			available = n << 10
		}
	}
	return total, available
}
