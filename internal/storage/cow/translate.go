package cow

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	engine "coppice/internal/cow"
	"coppice/internal/storage"
	"coppice/internal/vfs"
)

// volumeID is the name of a volume outside of the engine.
func volumeID(id engine.ID) storage.ID { return storage.ID(id.String()) }

// engineID is the name of a volume in the engine. What is no valid ID becomes
// the zero ID, which no volume has.
func engineID(id storage.ID) engine.ID {
	var out engine.ID
	if id.Valid() {
		b, err := hex.DecodeString(strings.ReplaceAll(string(id), "-", ""))
		if err == nil {
			copy(out[:], b)
		}
	}
	return out
}

// kinds are the errors of lower layers and what the contract calls them; the
// first that matches counts.
var kinds = []struct{ lower, contract error }{
	{engine.ErrNotFound, storage.ErrNotFound},
	{engine.ErrExists, storage.ErrExists},
	{engine.ErrInvalid, storage.ErrInvalid},
	{engine.ErrReadOnly, storage.ErrReadOnly},
	{engine.ErrNoData, storage.ErrNoData},
	{engine.ErrNoLineage, storage.ErrNoLineage},
	{engine.ErrClosed, storage.ErrClosed},
	{engine.ErrFailed, storage.ErrRepoReadOnly},
	{engine.ErrNoStore, storage.ErrNoRepo},
	{fs.ErrNotExist, storage.ErrNoRepo},
	{vfs.ErrLocked, storage.ErrLocked},
	{syscall.ENOSPC, storage.ErrNoSpace}, // from writes of data to hosts that keep no promise of space
	{syscall.EDQUOT, storage.ErrNoSpace},
}

// translate says what was being done to which volume in an error, and gives it
// the kind that the contract has for it. nil stays nil.
func translate(doing string, id storage.ID, err error) error {
	if err == nil {
		return nil
	}
	if id != "" {
		doing += " volume " + string(id)
	}
	e := &driverError{doing: doing, cause: err}
	if space, ok := errors.AsType[*engine.SpaceError](err); ok {
		e.kind = &storage.SpaceError{Needed: space.Needed, Free: space.Free}
		return e
	}
	if damage, ok := errors.AsType[*engine.CorruptError](err); ok {
		e.kind = &storage.CorruptError{Off: damage.Off, Detail: damage.Detail}
		if damage.Volume != (engine.ID{}) {
			e.kind = &storage.CorruptError{Volume: volumeID(damage.Volume), Off: damage.Off, Detail: damage.Detail}
		}
		return e
	}
	for _, k := range kinds {
		if errors.Is(err, k.lower) {
			e.kind = k.contract
			return e
		}
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// driverError is an error of the engine that is also one of the contract.
type driverError struct {
	doing string
	kind  error // of the contract
	cause error // of the engine, whose text says it all
}

func (e *driverError) Error() string   { return e.doing + ": " + e.cause.Error() }
func (e *driverError) Unwrap() []error { return []error{e.kind, e.cause} }
