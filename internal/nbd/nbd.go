// Package nbd speaks the NBD protocol, both ends of it: a [Server] that makes
// block devices of whatever implements [Device], and a [Client]. It hides
// negotiation, framing, concurrency and memory; it knows nothing of disks'
// names, sessions or where bytes are kept.
//
// Source of all facts about the wire: the document doc/proto.md of the
// NetworkBlockDevice project, in its version with extended headers.
//
// # What the server speaks
//
// Fixed newstyle negotiation with the options EXPORT_NAME, ABORT, LIST,
// STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT
// and EXTENDED_HEADERS; the commands READ, WRITE, DISC, FLUSH, TRIM, CACHE,
// WRITE_ZEROES and BLOCK_STATUS with every flag defined for them. Not spoken:
// the oldstyle negotiation, which has neither names nor errors, and RESIZE,
// which was never finished.
//
// A listener either forces TLS, and then nothing but STARTTLS and ABORT is
// answered before it, or has none. What was said before STARTTLS is
// forgotten; bytes that arrive with it, behind it, end the connection, for
// somebody may have put them there.
//
// # Life of a connection
//
//	accept ─ handshake (handshake.go), within a time limit
//	       ─ Backend.Open ─ transmission (conn.go, execute.go)
//	       ─ DISC, an error, the end of Export.Context or of the server
//	       ─ requests in progress end ─ Export.Close
//
// Requests of one connection run concurrently and are answered in the order
// in which they end. conn.go explains who runs what.
//
// # Stopping
//
// At the end of the server or of an Export.Context requests that have been
// begun are answered and the connection is closed. Those that have not are not
// answered with ESHUTDOWN: clients that connect again repeat what has no
// answer, but pass an error on to whoever uses the disk.
//
// # Memory
//
// A request holds at most [pieceSize] bytes however long it is: longer reads
// and writes go piece by piece. A connection may always have one such piece;
// every further one comes out of a budget of the whole server. When that is
// used up a connection works on one request at a time. Nobody ever waits for
// memory, so nobody can be starved of it by a client that does not read its
// replies.
//
// # Durability
//
// A WRITE is in the device when it is answered, and durable after a FLUSH
// that was sent after the answer, on any connection to the device; with FUA it
// is durable when answered. A device that is opened by several connections
// must be coherent between them; the server says so to clients (multi-conn).
package nbd

import (
	"context"
	"errors"
	"iter"

	"coppice/internal/storage"
)

// Device is what an export reads and writes; a [storage.Volume] is one. It
// must be safe for concurrent use. Offsets and lengths are bytes, within
// Size, and need no alignment.
type Device interface {
	Size() int64
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Zero(ctx context.Context, off, n int64) error
	Flush(ctx context.Context) error
	Extents(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error]
}

// Export is a device that a client has been let in to.
type Export struct {
	Device
	ReadOnly bool

	// Context, unless nil, ends the connection when it ends: requests in
	// progress are finished, then the client is cut off. One that does not
	// take the replies is given 10 seconds.
	Context context.Context

	// Changed answers the metadata contexts that Backend.Contexts offered,
	// by their names. The extents are those that differ, ascending, within
	// [off, off+n); what lies between them is unchanged.
	Changed map[string]func(ctx context.Context, off, n int64) iter.Seq2[storage.Extent, error]

	// Close, unless nil, is called once, after the last request has ended.
	Close func()
}

// Description is what a client may know of an export before it is let in.
type Description struct {
	Size     int64 // bytes
	ReadOnly bool
	Text     string // for people, "" for none
}

// Backend is where the exports of one connection come from. Its methods are
// not called concurrently. An error that is or wraps a [*Refusal] is told to
// the client; of any other it learns nothing.
type Backend interface {
	// List yields the names of exports. ErrPolicy when they are nobody's
	// business.
	List(ctx context.Context) iter.Seq2[string, error]

	// Describe tells about an export without attaching it.
	Describe(ctx context.Context, name string) (Description, error)

	// Contexts returns the metadata contexts of an export that a query
	// selects, beside those of the namespace "base". An empty query selects
	// all there are. A name that ends in a colon stands for more contexts than
	// can be listed; clients are told of it, and cannot choose it.
	Contexts(ctx context.Context, name, query string) ([]string, error)

	// Open attaches an export. contexts are those, out of what Contexts
	// returned for this name, that the client wants to ask about.
	Open(ctx context.Context, name string, contexts []string) (*Export, error)
}

// Refusal is an answer to an option that says no.
type Refusal struct {
	Code    uint32 // an NBD_REP_ERR_ value
	Message string // for people
}

func (r *Refusal) Error() string { return r.Message }

// Is makes two refusals with the same code match.
func (r *Refusal) Is(target error) bool {
	t, ok := errors.AsType[*Refusal](target)
	return ok && t.Code == r.Code
}

// Refusals that backends give. Use Because to say more.
var (
	ErrUnknown  = &Refusal{repErrUnknown, "there is no such export"}
	ErrPolicy   = &Refusal{repErrPolicy, "not allowed"}
	ErrShutdown = &Refusal{repErrShutdown, "the server is stopping"}
)

// Because returns the refusal with another text.
func (r *Refusal) Because(message string) *Refusal { return &Refusal{r.Code, message} }

// Errno is an error of the transmission phase, as a number on the wire.
type Errno uint32

// The errors that the protocol knows.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

func (e Errno) Error() string {
	switch e {
	case EPERM:
		return "operation not permitted"
	case EIO:
		return "input/output error"
	case ENOMEM:
		return "cannot allocate memory"
	case EINVAL:
		return "invalid argument"
	case ENOSPC:
		return "no space left on device"
	case EOVERFLOW:
		return "value too large"
	case ENOTSUP:
		return "operation not supported"
	case ESHUTDOWN:
		return "server is in the process of being shut down"
	}
	return "unknown error"
}

// errnoOf translates what a device answered.
func errnoOf(err error) Errno {
	if e, ok := errors.AsType[Errno](err); ok {
		return e
	}
	switch {
	case errors.Is(err, storage.ErrNoSpace):
		return ENOSPC
	case errors.Is(err, storage.ErrReadOnly):
		return EPERM
	case errors.Is(err, storage.ErrInvalid):
		return EINVAL
	case errors.Is(err, storage.ErrClosed), errors.Is(err, context.Canceled):
		return ESHUTDOWN
	}
	return EIO
}
