package xecmd

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"coppice/internal/thincli"
	"coppice/internal/xapi"
)

// report shows an error on the client's standard error. Whether the client
// still hears it does not matter.
func (r *run) report(err error) {
	if errors.Is(err, thincli.ErrGone) || errors.Is(err, errSomeFailed) {
		return
	}
	line := func(text string) { _ = r.conn.PrintStderr(text + "\n") }
	if e, ok := errors.AsType[*unknownParameter](err); ok {
		_ = r.conn.Error("Missing parameter", e.name)
		line(fmt.Sprintf("A %s has no parameter %s. To see what there is: xe %s-param-list uuid=%s", e.noun, e.name, e.noun, r.args.str("uuid")))
		return
	}
	lines, unknown := r.explain(err)
	if unknown != nil {
		_ = r.conn.Error(unknown.Code, unknown.Params...)
	}
	for _, text := range lines {
		line(text)
	}
	if r.args != nil && r.args.flag("trace") {
		line("Raised " + err.Error())
		line("Backtrace:")
	}
}

// explain puts an error in words. One of the API's whose parameters the
// datamodel does not name is returned, to be shown before the lines.
func (r *run) explain(err error) (lines []string, unknown *xapi.Error) {
	if e, ok := errors.AsType[*usageError](err); ok {
		lines = []string{e.text}
		if e.hint != "" {
			lines = append(lines, e.hint)
		}
		help := "xe help"
		if r.cmd != nil && e.params {
			help += " " + r.cmd.name
		}
		return append(lines, "For usage run: '"+help+"'"), nil
	}
	if e, ok := errors.AsType[*failure](err); ok {
		return []string{"Error: " + e.text}, nil
	}
	e, ok := errors.AsType[*xapi.Error](err)
	if !ok {
		e = xapi.InternalError(err)
	}
	params := r.describeRefs(e.Params)
	if hint := cmp.Or(remedy(e.Code, params), r.mistaken(e)); hint != "" {
		lines = append(lines, hint)
	}
	names := xapi.Datamodel().Errors[e.Code]
	if names == nil {
		return lines, xapi.NewError(e.Code, params...)
	}
	return slices.Concat([]string{sentence(e.Code)}, labelled(names, params), lines), nil
}

// mistaken says what a uuid that is of no object of the class wanted is of
// instead, "" for nothing that is known.
func (r *run) mistaken(e *xapi.Error) (hint string) {
	if e.Code != xapi.ErrUUIDInvalid || len(e.Params) != 2 || r.session == "" {
		return ""
	}
	// Without a valid session nothing is said.
	_ = r.read(func(v view) error {
		for _, class := range xapi.Datamodel().Classes {
			if ref, ok := v.UUID(class, e.Params[1]); ok {
				hint = "That is the uuid of another object: " + class.Name + " " + r.describeRefs([]string{ref})[0] + "."
			}
		}
		return nil
	})
	return hint
}

// noSpace is what the backends of xapi say about a full SR.
const noSpace = "SR_BACKEND_FAILURE_44"

// remedy says what to do about an error whose own text does not, "" for
// nothing. The texts of backends are in their parameters: what, and more of it.
func remedy(code string, params []string) string {
	switch {
	case code == noSpace && len(params) > 1:
		return "The storage says: " + params[1] + ".\n" +
			"To make room, destroy disks or snapshots of the SR (xe vdi-would-free tells what comes back), or give its file system more."
	case strings.HasPrefix(code, "SR_BACKEND_FAILURE_") && len(params) > 1 && params[1] != "":
		return "The storage says: " + params[1] + "."
	case code == xapi.ErrRevertOnlyAllowedOnSnapshot:
		return "What is given is not a snapshot. To see the snapshots of a disk: xe vdi-list snapshot-of=<uuid>"
	case code == xapi.ErrOperationBlocked && len(params) > 1 && strings.HasPrefix(params[1], "coppice:hold"):
		return "It is on hold. If it may go: xe <vm, snapshot or vdi>-param-remove uuid=" + firstWord(params[0]) + " param-name=other-config param-key=coppice:hold"
	case code == xapi.ErrSRHasPBD && len(params) == 1:
		return "To detach it: xe pbd-unplug uuid=$(xe pbd-list sr-uuid=" + firstWord(params[0]) + " --minimal)"
	case code == xapi.ErrSRHasNoPBDs && len(params) == 1:
		return "It is detached, or has been forgotten. To attach it: xe pbd-plug uuid=$(xe pbd-list sr-uuid=" + firstWord(params[0]) + " --minimal)"
	case code == xapi.ErrSRNotEmpty:
		return "There are disks on it. They go with xe vdi-destroy, or stay, for a later xe sr-introduce, with xe sr-forget; to see them: xe vdi-list sr-uuid=<uuid>"
	case code == xapi.ErrSSLVerifyError:
		return "The server is recognised by remote-fingerprint=, which coppice doctor prints there, or by remote-ca-filename=; remote-insecure=true takes any."
	case code == xapi.ErrVMSSHasVM:
		return "VMs follow it. For each of them: xe vm-param-set uuid=<uuid> snapshot-schedule="
	}
	return ""
}

// firstWord returns the uuid of an object that describeRefs has described.
func firstWord(s string) string {
	word, _, _ := strings.Cut(s, " ")
	return word
}

// labelled puts the documented names in front of the parameters of an error.
func labelled(names, values []string) []string {
	var out []string
	for i, n := range names {
		if i < len(values) {
			out = append(out, n+": "+values[i])
		} else {
			out = append(out, n+": <unknown>")
		}
	}
	for _, v := range values[min(len(names), len(values)):] {
		out = append(out, "<extra>: "+v)
	}
	return out
}

// describeRefs replaces references to living objects by "uuid (name)".
func (r *run) describeRefs(params []string) []string {
	out := append([]string(nil), params...)
	if r.session == "" {
		return out
	}
	// Without a valid session the references stay as they are.
	_ = r.read(func(v view) error {
		for i, p := range out {
			class, ok := v.ClassOf(p)
			if !ok {
				continue
			}
			rec, ok := v.Lookup(class, p)
			uuid := class.Field("uuid")
			if !ok || uuid == nil {
				continue
			}
			out[i] = uuid.Type.Text(uuid.Get(rec))
			if name := class.Field("name_label"); name != nil {
				out[i] += " (" + name.Type.Text(name.Get(rec)) + ")"
			}
		}
		return nil
	})
	return out
}

// sentences explain the errors that users meet most.
var sentences = map[string]string{
	xapi.ErrUUIDInvalid:                   "The uuid you supplied was invalid.",
	xapi.ErrHandleInvalid:                 "You gave an invalid object reference. The object may have recently been deleted. The handle parameter echoes the bad value given.",
	xapi.ErrInternalError:                 "The server failed to handle your request, due to an internal error. The given message may give details useful for debugging the problem.",
	xapi.ErrNotImplemented:                "The requested method or operation is not implemented by this server.",
	xapi.ErrSessionInvalid:                "You gave an invalid session reference. It may have been invalidated by a server restart, or timed out.",
	xapi.ErrRBACPermissionDenied:          "The role of this user does not permit the operation.",
	xapi.ErrPermissionDenied:              "You do not have the required permissions to perform the operation.",
	xapi.ErrOperationNotAllowed:           "You attempted an operation that was not allowed.",
	xapi.ErrOtherOperationInProgress:      "Another operation involving the object is currently in progress.",
	xapi.ErrTaskCancelled:                 "The request was asynchronously cancelled.",
	xapi.ErrInvalidValue:                  "The value given is invalid.",
	xapi.ErrValueNotSupported:             "You attempted to set a value that is not supported by this implementation.",
	xapi.ErrFieldTypeError:                "The value specified is of the wrong type.",
	xapi.ErrMapDuplicateKey:               "You tried to add a key-value pair to a map, but that key is already there.",
	xapi.ErrMessageMethodUnknown:          "You tried to call a method that does not exist.",
	xapi.ErrMessageRemoved:                "This function is no longer available.",
	xapi.ErrMessageDeprecated:             "This message has been deprecated.",
	xapi.ErrMessageParameterCountMismatch: "You tried to call a method with the incorrect number of parameters.",
	xapi.ErrVDIInUse:                      "This operation cannot be performed because this disk is in use by some other operation.",
	xapi.ErrVDINeedsVMForMigrate:          "Only a disk of a VM can be migrated. This one has none: vdi-copy copies it.",
	xapi.ErrVDIReadonly:                   "The operation required write access but this disk is read-only.",
	xapi.ErrVDINotManaged:                 "This operation cannot be performed because the system does not manage this disk.",
	xapi.ErrVDIIncompatibleType:           "This operation cannot be performed because the disk has an incompatible type.",
	xapi.ErrVDIIsAPhysicalDevice:          "The operation cannot be performed on physical devices.",
	xapi.ErrVDITooSmall:                   "The disk is too small. Please resize it to at least the minimum size.",
	xapi.ErrVDITooLarge:                   "The disk is too large.",
	xapi.ErrVDIMissing:                    "This operation cannot be performed because the specified disk could not be found on the storage repository.",
	xapi.ErrVDINoCBTMetadata:              "The requested operation is not allowed because the disk has no metadata of changed blocks.",
	xapi.ErrVDINotSparse:                  "The disk is not stored using a sparse format.",
	xapi.ErrSRFull:                        "The storage repository is full. Requested new size exceeds the maximum size.",
	xapi.ErrSRHasPBD:                      "The storage repository is still connected to a host by a PBD. It cannot be destroyed or forgotten.",
	xapi.ErrSRUnknownDriver:               "The storage repository could not be connected because the driver was not recognised.",
	xapi.ErrSRHasNoPBDs:                   "The storage repository has no PBDs.",
	xapi.ErrSRNotAttached:                 "The storage repository is not attached.",
	xapi.ErrSRNotEmpty:                    "The storage repository is not empty.",
	xapi.ErrSROperationNotSupported:       "The storage repository does not support the operation.",
	xapi.ErrVMBadPowerState:               "You attempted an operation on a VM that was not in an appropriate power state at the time.",
	xapi.ErrVMIsTemplate:                  "The operation attempted is not valid for a template VM.",
	xapi.ErrDeviceAlreadyExists:           "A device with the name given already exists on the selected VM.",
	xapi.ErrDeviceAlreadyAttached:         "The device is already attached to a VM.",
	xapi.ErrDeviceAlreadyDetached:         "The device is not currently attached.",
	xapi.ErrUnimplementedInSMBackend:      "You have attempted a function which is not implemented by the storage backend.",
	xapi.ErrHostIsSlave:                   "You cannot make regular API calls directly on a pool member. Please pass API calls via the coordinator.",
	xapi.ErrEventSubscriptionParseFailure: "The server failed to parse your event subscription.",
	xapi.ErrSSLVerifyError:                "The certificate of the server is not one to trust.",
	xapi.ErrCannotContactHost:             "The server cannot be reached.",
	xapi.ErrSessionAuthenticationFailed:   "The credentials given by the user are incorrect.",
}

// sentence returns the explanation of an error code, or makes one of its words.
func sentence(code string) string {
	if s, ok := sentences[code]; ok {
		return s
	}
	return "The operation failed: " + strings.ToLower(strings.ReplaceAll(code, "_", " ")) + "."
}

// unknownParameter reports a param-name that no field of a noun has.
type unknownParameter struct{ noun, name string }

func (e *unknownParameter) Error() string { return "unknown parameter " + e.name }
