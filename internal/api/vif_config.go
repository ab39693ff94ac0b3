package api

import (
	"context"
	"net/netip"
	"slices"
	"strconv"

	"coppice/internal/db"
	"coppice/internal/xapi"
)

// vifConfigMethods change what a VIF says of its place in the network. Without
// a hypervisor nothing acts on it; it is kept for the server where the VM goes.
func vifConfigMethods() map[string]any {
	return map[string]any{
		"VIF.plug":                (*API).vifPlug,
		"VIF.unplug":              (*API).vifUnplug,
		"VIF.unplug_force":        (*API).vifUnplug,
		"VIF.move":                (*API).vifMove,
		"VIF.set_locking_mode":    (*API).vifSetLockingMode,
		"VIF.set_ipv4_allowed":    vifSetAllowed(netip.Addr.Is4, allowed4),
		"VIF.add_ipv4_allowed":    vifAddAllowed(netip.Addr.Is4, allowed4),
		"VIF.remove_ipv4_allowed": vifRemoveAllowed(allowed4),
		"VIF.set_ipv6_allowed":    vifSetAllowed(netip.Addr.Is6, allowed6),
		"VIF.add_ipv6_allowed":    vifAddAllowed(netip.Addr.Is6, allowed6),
		"VIF.remove_ipv6_allowed": vifRemoveAllowed(allowed6),
		"VIF.configure_ipv4":      (*API).vifConfigureIPv4,
		"VIF.configure_ipv6":      (*API).vifConfigureIPv6,
		"VIF.set_trunks":          (*API).vifSetTrunks,
		"VIF.add_trunks":          (*API).vifAddTrunk,
		"VIF.remove_trunks":       (*API).vifRemoveTrunk,
	}
}

func allowed4(v *xapi.VIF) *[]string { return &v.IPv4Allowed }
func allowed6(v *xapi.VIF) *[]string { return &v.IPv6Allowed }

// changeVIF changes the record of a VIF.
func (a *API) changeVIF(ctx context.Context, ref xapi.Ref[xapi.VIF], change func(*xapi.VIF)) error {
	return a.db.Update(ctx, func(tx *db.Tx) error { return db.Modify(tx, ref, change) })
}

// vifRunning is VM_BAD_POWER_STATE unless the VM of a VIF runs, which none
// with a VIF does.
func (a *API) vifRunning(ref xapi.Ref[xapi.VIF]) (vif *xapi.VIF, err error) {
	err = a.db.View(func(tx *db.Tx) error {
		if vif, err = db.Get(tx, ref); err != nil {
			return err
		}
		vm, err := db.Get(tx, vif.VM)
		if err == nil && vm.PowerState != xapi.VMPowerStateRunning {
			err = badPowerState(vif.VM, vm, xapi.VMPowerStateRunning)
		}
		return err
	})
	return vif, err
}

func (a *API) vifPlug(ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF]) error {
	vif, err := a.vifRunning(ref)
	switch {
	case err != nil:
		return err
	case vif.CurrentlyAttached:
		return xapi.NewError(xapi.ErrDeviceAlreadyAttached, string(ref))
	}
	return errNoHypervisor
}

func (a *API) vifUnplug(ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF]) error {
	vif, err := a.vifRunning(ref)
	switch {
	case err != nil:
		return err
	case !vif.CurrentlyAttached:
		return xapi.NewError(xapi.ErrDeviceAlreadyDetached, string(ref))
	}
	return errNoHypervisor
}

func (a *API) vifMove(ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF], network xapi.Ref[xapi.Network]) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		if _, err := db.Get(tx, ref); err != nil {
			return err
		}
		if _, err := db.Get(tx, network); err != nil {
			return err
		}
		return db.Modify(tx, ref, func(v *xapi.VIF) { v.Network = network })
	})
}

func (a *API) vifSetLockingMode(ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF], value xapi.VIFLockingMode) error {
	return a.changeVIF(ctx, ref, func(v *xapi.VIF) { v.LockingMode = value })
}

// address is INVALID_IP_ADDRESS_SPECIFIED for text that is no address of the
// wanted family.
func address(text string, family func(netip.Addr) bool) error {
	if ip, err := netip.ParseAddr(text); err != nil || !family(ip) || ip.Zone() != "" {
		return xapi.NewError(xapi.ErrInvalidIPAddressSpecified, text)
	}
	return nil
}

func vifSetAllowed(family func(netip.Addr) bool, list func(*xapi.VIF) *[]string) func(*API, context.Context, *Call, xapi.Ref[xapi.VIF], []string) error {
	return func(a *API, ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF], value []string) error {
		for _, ip := range value {
			if err := address(ip, family); err != nil {
				return err
			}
		}
		return a.changeVIF(ctx, ref, func(v *xapi.VIF) { *list(v) = slices.Clone(value) })
	}
}

func vifAddAllowed(family func(netip.Addr) bool, list func(*xapi.VIF) *[]string) func(*API, context.Context, *Call, xapi.Ref[xapi.VIF], string) error {
	return func(a *API, ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF], value string) error {
		if err := address(value, family); err != nil {
			return err
		}
		return a.changeVIF(ctx, ref, func(v *xapi.VIF) {
			if l := list(v); !slices.Contains(*l, value) {
				*l = append(*l, value)
			}
		})
	}
}

func vifRemoveAllowed(list func(*xapi.VIF) *[]string) func(*API, context.Context, *Call, xapi.Ref[xapi.VIF], string) error {
	return func(a *API, ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF], value string) error {
		return a.changeVIF(ctx, ref, func(v *xapi.VIF) {
			l := list(v)
			*l = slices.DeleteFunc(*l, func(ip string) bool { return ip == value })
		})
	}
}

// staticAddress checks what a static configuration says: an address with its
// prefix length, and a gateway if there is one.
func staticAddress(cidr, gateway string, family func(netip.Addr) bool) error {
	if p, err := netip.ParsePrefix(cidr); err != nil || !family(p.Addr()) {
		return xapi.NewError(xapi.ErrInvalidCIDRAddressSpecified, cidr)
	}
	if gateway == "" {
		return nil
	}
	return address(gateway, family)
}

func (a *API) vifConfigureIPv4(ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF], mode xapi.VIFIPv4ConfigurationMode, cidr, gateway string) error {
	addresses := []string{}
	if mode == xapi.VIFIPv4ConfigurationModeStatic {
		if err := staticAddress(cidr, gateway, netip.Addr.Is4); err != nil {
			return err
		}
		addresses = append(addresses, cidr)
	} else {
		gateway = ""
	}
	return a.changeVIF(ctx, ref, func(v *xapi.VIF) {
		v.IPv4ConfigurationMode, v.IPv4Addresses, v.IPv4Gateway = mode, addresses, gateway
	})
}

func (a *API) vifConfigureIPv6(ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF], mode xapi.VIFIPv6ConfigurationMode, cidr, gateway string) error {
	addresses := []string{}
	if mode == xapi.VIFIPv6ConfigurationModeStatic {
		if err := staticAddress(cidr, gateway, netip.Addr.Is6); err != nil {
			return err
		}
		addresses = append(addresses, cidr)
	} else {
		gateway = ""
	}
	return a.changeVIF(ctx, ref, func(v *xapi.VIF) {
		v.IPv6ConfigurationMode, v.IPv6Addresses, v.IPv6Gateway = mode, addresses, gateway
	})
}

// trunk is INVALID_VALUE for what is no VLAN tag.
func trunk(tag int64) error {
	if tag < 0 || tag > 4094 {
		return invalidValue("trunks", strconv.FormatInt(tag, 10))
	}
	return nil
}

func (a *API) vifSetTrunks(ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF], value []int64) error {
	for _, tag := range value {
		if err := trunk(tag); err != nil {
			return err
		}
	}
	return a.changeVIF(ctx, ref, func(v *xapi.VIF) { v.Trunks = slices.Clone(value) })
}

func (a *API) vifAddTrunk(ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF], tag int64) error {
	if err := trunk(tag); err != nil {
		return err
	}
	return a.changeVIF(ctx, ref, func(v *xapi.VIF) {
		if !slices.Contains(v.Trunks, tag) {
			v.Trunks = append(v.Trunks, tag)
		}
	})
}

func (a *API) vifRemoveTrunk(ctx context.Context, c *Call, ref xapi.Ref[xapi.VIF], tag int64) error {
	return a.changeVIF(ctx, ref, func(v *xapi.VIF) {
		v.Trunks = slices.DeleteFunc(v.Trunks, func(t int64) bool { return t == tag })
	})
}
