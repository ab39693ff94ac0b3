package api

import "coppice/internal/xapi"

// holdKey is the key in other_config of a disk or a VM that protects it: as
// long as it is there, whatever its value, nobody destroys the object, and
// schedules prune around it.
const holdKey = "coppice:hold"

// held is OPERATION_BLOCKED [ref, why] for an object on hold.
func held(ref string, otherConfig map[string]string) error {
	why, ok := otherConfig[holdKey]
	if !ok {
		return nil
	}
	return xapi.NewError(xapi.ErrOperationBlocked, ref, holdKey+": "+why)
}
