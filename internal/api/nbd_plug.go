package api

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"coppice/internal/claim"
	"coppice/internal/db"
	"coppice/internal/xapi"
)

// nbdMethods are the messages by which disks are reached by NBD.
func nbdMethods() map[string]any {
	return map[string]any{
		"VDI.get_nbd_info":       (*API).vdiGetNBDInfo,
		"VBD.plug":               (*API).vbdPlug,
		"VBD.unplug":             (*API).vbdUnplug,
		"VBD.unplug_force":       (*API).vbdUnplugForce,
		"network.add_purpose":    (*API).networkAddPurpose,
		"network.remove_purpose": (*API).networkRemovePurpose,
	}
}

// nbdURIKey is where in the runtime_properties of a plugged VBD its URI is.
const nbdURIKey = "coppice:nbd-uri"

// nbdEndpoints is where the server listens for NBD.
func (a *API) nbdEndpoints() NBDEndpoints {
	if a.cfg.NBD == nil {
		return NBDEndpoints{}
	}
	return a.cfg.NBD()
}

// vdiGetNBDInfo tells where a disk can be reached: over TLS when a network has
// the purpose nbd, in the clear when one has insecure_nbd and there is such a
// listener, otherwise nowhere.
func (a *API) vdiGetNBDInfo(ctx context.Context, c *Call, ref xapi.Ref[xapi.VDI]) ([]*xapi.VDINBDServerInfo, error) {
	infos := []*xapi.VDINBDServerInfo{}
	err := a.db.View(func(tx *db.Tx) error {
		v, err := db.Get(tx, ref)
		if err != nil {
			return err
		}
		if v.Type == xapi.VDITypeCBTMetadata {
			return xapi.NewError(xapi.ErrVDIIncompatibleType, string(ref), string(v.Type))
		}
		if !srAttached(tx, v.SR) {
			return nil
		}
		ep := a.nbdEndpoints()
		name := fmt.Sprintf("/%s?session_id=%s", v.UUID, c.Session.ref)
		for _, n := range db.All[xapi.Network](tx) {
			for _, p := range n.Purpose {
				switch {
				case p == xapi.NetworkPurposeNBD && ep.TLS != 0:
					infos = append(infos, &xapi.VDINBDServerInfo{
						Address: ep.Address, Port: ep.TLS, Exportname: name, Cert: ep.Certificate, Subject: ep.Subject,
					})
				case p == xapi.NetworkPurposeInsecureNBD && ep.Plain != 0:
					infos = append(infos, &xapi.VDINBDServerInfo{Address: ep.Address, Port: ep.Plain, Exportname: name})
				}
			}
		}
		return nil
	})
	return infos, err
}

// networkAddPurpose allows what a purpose stands for on a network. The two
// kinds of NBD exclude each other, on all networks.
func (a *API) networkAddPurpose(ctx context.Context, c *Call, ref xapi.Ref[xapi.Network], value xapi.NetworkPurpose) error {
	other := map[xapi.NetworkPurpose]xapi.NetworkPurpose{
		xapi.NetworkPurposeNBD:         xapi.NetworkPurposeInsecureNBD,
		xapi.NetworkPurposeInsecureNBD: xapi.NetworkPurposeNBD,
	}[value]
	return a.db.Update(ctx, func(tx *db.Tx) error {
		if _, err := db.Get(tx, ref); err != nil {
			return err
		}
		for _, n := range db.All[xapi.Network](tx) {
			if slices.Contains(n.Purpose, other) {
				return xapi.NewError(xapi.ErrNetworkIncompatiblePurposes, string(value), string(other))
			}
		}
		return db.Modify(tx, ref, func(n *xapi.Network) {
			if !slices.Contains(n.Purpose, value) {
				n.Purpose = append(n.Purpose, value)
			}
		})
	})
}

// networkRemovePurpose takes a purpose from a network. Connections that are
// open stay.
func (a *API) networkRemovePurpose(ctx context.Context, c *Call, ref xapi.Ref[xapi.Network], value xapi.NetworkPurpose) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		return db.Modify(tx, ref, func(n *xapi.Network) {
			kept := []xapi.NetworkPurpose{}
			for _, p := range n.Purpose {
				if p != value {
					kept = append(kept, p)
				}
			}
			n.Purpose = kept
		})
	})
}

// vbdNBDMode is how the disk of a VBD is attached.
func vbdNBDMode(vbd *xapi.VBD) nbdMode {
	if vbd.Mode == xapi.VBDModeRW {
		return nbdReadWrite
	}
	return nbdReadOnly
}

// vbdPlug attaches the disk of a VBD. Of the VMs only the control domain runs
// here; what it gets is not a device but the URI of an NBD export, in device
// and in runtime_properties.
func (a *API) vbdPlug(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD]) (err error) {
	release, err := c.Claim(ctx, func(tx *db.Tx) error { return a.vbdMayPlug(tx, ref) }, claim.On(ref, xapi.VBDOperationsPlug))
	if err != nil {
		return err
	}
	defer release()
	var vbd *xapi.VBD
	var disk *xapi.VDI
	err = a.db.View(func(tx *db.Tx) (err error) {
		if vbd, err = db.Get(tx, ref); err != nil {
			return err
		}
		disk, err = db.Get(tx, vbd.VDI)
		return err
	})
	if err != nil {
		return err
	}
	d, err := a.nbdShare(ctx, c.Origin, nbdAccess{
		session: c.Session, vdi: vbd.VDI, rec: disk, mode: vbdNBDMode(vbd), client: string(ref), vbd: ref,
	})
	if err != nil {
		return err
	}
	uri := nbdURI(a.nbdEndpoints().Socket, nbdOfVBD+"/"+vbd.UUID)
	err = a.db.Update(ctx, func(tx *db.Tx) error {
		err := db.Modify(tx, ref, func(b *xapi.VBD) {
			b.CurrentlyAttached, b.Device = true, uri
			b.RuntimeProperties = map[string]string{nbdURIKey: uri}
		})
		if err != nil {
			return err
		}
		if err := a.refreshAllowed(tx, "VBD", string(ref)); err != nil {
			return err
		}
		return a.refreshVDI(tx, vbd.VDI)
	})
	if err != nil {
		a.nbdLeave(d)
	}
	return err
}

// vbdMayPlug applies the rules of VBD.plug. Those about sharing the disk are
// the attachment's.
func (a *API) vbdMayPlug(tx *db.Tx, ref xapi.Ref[xapi.VBD]) error {
	vbd, vm, err := vbdIdle(tx, ref)
	if err != nil {
		return err
	}
	switch {
	case vbd.CurrentlyAttached:
		return xapi.NewError(xapi.ErrDeviceAlreadyAttached, string(ref))
	case vbd.Empty:
		return xapi.NewError(xapi.ErrVBDIsEmpty, string(ref))
	case !vm.IsControlDomain:
		return errNoHypervisor
	case a.nbdEndpoints().Socket == "":
		return xapi.NewError(xapi.ErrOperationNotAllowed, "This server does not listen for NBD.")
	}
	return nil
}

// vbdAssertAttachable says what would keep VBD.plug from attaching a disk now.
func (a *API) vbdAssertAttachable(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD]) error {
	return a.db.View(func(tx *db.Tx) error {
		if err := a.vbdMayPlug(tx, ref); err != nil {
			return err
		}
		vbd, err := db.Get(tx, ref)
		switch {
		case err != nil:
			return err
		case vbdNBDMode(vbd) == nbdReadWrite:
			return a.nbdWritable(tx, vbd.VDI)
		}
		return a.vdiReadable(tx, vbd.VDI)
	})
}

// vbdPause would hold a running guest's requests back, which nothing here can:
// the control domain is not a guest.
func (a *API) vbdPause(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD]) (string, error) {
	return "", a.vbdUnpause(ctx, c, ref, "")
}

func (a *API) vbdUnpause(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD], token string) error {
	return a.db.View(func(tx *db.Tx) error {
		vbd, _, err := vbdIdle(tx, ref)
		switch {
		case err != nil:
			return err
		case !vbd.CurrentlyAttached:
			return xapi.NewError(xapi.ErrDeviceAlreadyDetached, string(ref))
		}
		return errNoHypervisor
	})
}

// vbdIdle returns a VBD of a running VM that nothing is being done to.
func vbdIdle(tx *db.Tx, ref xapi.Ref[xapi.VBD]) (*xapi.VBD, *xapi.VM, error) {
	vbd, err := db.Get(tx, ref)
	if err != nil {
		return nil, nil, err
	}
	for task, op := range vbd.CurrentOperations {
		return nil, nil, otherOperation("VBD", string(ref), string(op), task)
	}
	vm, err := db.Get(tx, vbd.VM)
	if err != nil {
		return nil, nil, err
	}
	if vm.PowerState != xapi.VMPowerStateRunning {
		return nil, nil, xapi.NewError(xapi.ErrVMBadPowerState, string(vbd.VM), string(xapi.VMPowerStateRunning), string(vm.PowerState))
	}
	return vbd, vm, nil
}

// vbdUnplug detaches the disk of a VBD that no client is connected to.
func (a *API) vbdUnplug(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD]) error {
	return a.unplug(ctx, c, ref, xapi.VBDOperationsUnplug)
}

// vbdUnplugForce cuts off the clients, too. What they had under way ends
// first.
func (a *API) vbdUnplugForce(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD]) error {
	return a.unplug(ctx, c, ref, xapi.VBDOperationsUnplugForce)
}

func (a *API) unplug(ctx context.Context, c *Call, ref xapi.Ref[xapi.VBD], op xapi.VBDOperations) error {
	release, err := c.Claim(ctx, func(tx *db.Tx) error {
		vbd, _, err := vbdIdle(tx, ref)
		switch {
		case err != nil:
			return err
		case !vbd.CurrentlyAttached:
			return xapi.NewError(xapi.ErrDeviceAlreadyDetached, string(ref))
		case !vbd.Unpluggable:
			return xapi.NewError(xapi.ErrVBDNotUnpluggable, string(ref))
		}
		return nil
	}, claim.On(ref, op))
	if err != nil {
		return err
	}
	defer release()
	if op == xapi.VBDOperationsUnplug {
		a.nbdSettle(ctx, func(t *nbdTable) bool {
			for _, d := range t.attached {
				if d.vbd == ref {
					return d.users > 1
				}
			}
			return false
		})
	}
	d, err := a.withdraw(ref, op == xapi.VBDOperationsUnplugForce)
	if err != nil {
		return err
	}
	if d != nil {
		d.cut()
		a.nbdLeave(d)
	}
	return a.db.Update(context.WithoutCancel(ctx), func(tx *db.Tx) error { return a.detached(tx, ref) })
}

// withdraw makes the attachment of a VBD unreachable for new connections. It
// fails when there are some and they are not to be cut.
func (a *API) withdraw(ref xapi.Ref[xapi.VBD], force bool) (*nbdDisk, error) {
	t := &a.nbd
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, d := range t.attached {
		if d.vbd != ref {
			continue
		}
		if n := d.users - 1; n > 0 && !force {
			return nil, xapi.NewError(xapi.ErrDeviceDetachRejected, "VBD", string(ref),
				"NBD clients are connected: "+strconv.Itoa(n))
		}
		delete(t.attached, key)
		return d, nil
	}
	return nil, nil
}

// detached notes in the records that a VBD is not attached.
func (a *API) detached(tx *db.Tx, ref xapi.Ref[xapi.VBD]) error {
	vbd, err := db.Get(tx, ref)
	if err != nil {
		return nil
	}
	err = db.Modify(tx, ref, func(b *xapi.VBD) {
		b.CurrentlyAttached, b.Device = false, ""
		b.RuntimeProperties = map[string]string{}
	})
	if err != nil {
		return err
	}
	if err := a.refreshAllowed(tx, "VBD", string(ref)); err != nil {
		return err
	}
	return a.refreshVDI(tx, vbd.VDI)
}

// detachAll notes at start-up that nothing is plugged: attachments do not
// outlive the server.
func (a *API) detachAll(ctx context.Context) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		var plugged []xapi.Ref[xapi.VBD]
		for ref, vbd := range db.All[xapi.VBD](tx) {
			if vbd.CurrentlyAttached && vbd.RuntimeProperties[nbdURIKey] != "" {
				plugged = append(plugged, ref)
			}
		}
		for _, ref := range plugged {
			if err := a.detached(tx, ref); err != nil {
				return err
			}
		}
		return nil
	})
}

// nbdToken is permission to attach one disk: for a while, to whoever knows it,
// whatever becomes of the session that asked for it. Connections that were
// made in time last.
type nbdToken struct {
	name    nbdName
	expires time.Time
}

const (
	nbdTokenLife    = time.Minute
	nbdTokenMaxLife = time.Hour
	nbdMaxTokens    = 10_000
)

// nbdToken returns what a token is for.
func (a *API) nbdToken(id string) (nbdToken, error) {
	a.nbd.mu.Lock()
	defer a.nbd.mu.Unlock()
	t, ok := a.nbd.tokens[id]
	if !ok || a.now().After(t.expires) {
		return t, xapi.NewError(xapi.ErrSessionInvalid, "token")
	}
	return t, nil
}

// pluginNBD gives the ways to reach a disk: lines "key value" with URIs. args
// are vdi, a UUID; mode, one of ro, rw and cow; keep, the label of the disk that
// a cow clone becomes; seconds, how long the token may be used to connect.
func (a *API) pluginNBD(c *Call, args map[string]string) (string, error) {
	n := nbdName{id: args["vdi"], mode: nbdReadOnly, keep: args["keep"]}
	if m := args["mode"]; m != "" {
		n.mode = nbdMode(m)
	}
	life := nbdTokenLife
	if s, ok := args["seconds"]; ok {
		k, err := strconv.Atoi(s)
		if err != nil || k <= 0 || time.Duration(k)*time.Second > nbdTokenMaxLife {
			return "", xapi.NewError(xapi.ErrInvalidValue, "seconds", s)
		}
		life = time.Duration(k) * time.Second
	}
	switch n.mode {
	case nbdReadOnly, nbdReadWrite, nbdCopyOnWrite:
	default:
		return "", xapi.NewError(xapi.ErrInvalidValue, "mode", string(n.mode))
	}
	if n.keep != "" && n.mode != nbdCopyOnWrite {
		return "", xapi.NewError(xapi.ErrInvalidValue, "keep", n.keep)
	}
	err := a.db.View(func(tx *db.Tx) error {
		ref, _, err := db.ByUUID[xapi.VDI](tx, n.id)
		if err != nil {
			return err
		}
		if n.mode == nbdReadWrite {
			return a.nbdWritable(tx, ref)
		}
		return a.vdiReadable(tx, ref)
	})
	if err != nil {
		return "", err
	}
	if err := a.authorizeHTTP(c.Session, n.action()); err != nil {
		return "", err
	}
	token := rand.Text()
	now := a.now()
	a.nbd.mu.Lock()
	for id, t := range a.nbd.tokens {
		if now.After(t.expires) {
			delete(a.nbd.tokens, id)
		}
	}
	full := len(a.nbd.tokens) >= nbdMaxTokens
	if !full {
		if a.nbd.tokens == nil {
			a.nbd.tokens = map[string]nbdToken{}
		}
		a.nbd.tokens[token] = nbdToken{n, now.Add(life)}
	}
	a.nbd.mu.Unlock()
	if full {
		return "", xapi.NewError(xapi.ErrOperationNotAllowed, "Too many NBD tokens are in use.")
	}
	ep := a.nbdEndpoints()
	var b strings.Builder
	fmt.Fprintf(&b, "export %s/%s\n", nbdOfToken, token)
	if ep.Socket != "" {
		path := string(n.mode) + "/" + n.id
		if n.keep == "" {
			fmt.Fprintf(&b, "unix %s\n", nbdURI(ep.Socket, path))
		}
		fmt.Fprintf(&b, "once %s\n", nbdURI(ep.Socket, nbdOfToken+"/"+token))
	}
	if ep.TLS != 0 {
		fmt.Fprintf(&b, "tls nbds://%s:%d/%s/%s\n", ep.Address, ep.TLS, nbdOfToken, token)
	}
	if ep.Plain != 0 {
		fmt.Fprintf(&b, "tcp nbd://%s:%d/%s/%s\n", ep.Address, ep.Plain, nbdOfToken, token)
	}
	fmt.Fprintf(&b, "expires %s\n", now.Add(life).Format(time.RFC3339))
	return b.String(), nil
}
