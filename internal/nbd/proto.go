package nbd

import "encoding/binary"

// Magic numbers.
const (
	magicServer          = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption          = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply     = 0x0003e889045565a9
	magicRequest         = 0x25609513
	magicExtendedRequest = 0x21e41c71
	magicSimpleReply     = 0x67446698
	magicChunk           = 0x668e33ef
	magicExtendedReply   = 0x6e8a278c
)

// Flags of the handshake; the client's have the same values.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Options.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
	optExtendedHeaders = 11
)

// Replies to options.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrUnsupported  = 1<<31 + 1
	repErrPolicy       = 1<<31 + 2
	repErrInvalid      = 1<<31 + 3
	repErrTLSRequired  = 1<<31 + 5
	repErrUnknown      = 1<<31 + 6
	repErrShutdown     = 1<<31 + 7
	repErrTooBig       = 1<<31 + 9
	repErrExtRequired  = 1<<31 + 10
	repErrSmallestCode = 1 << 31
)

// Items of information about an export.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags.
const (
	FlagHasFlags        = 1 << 0
	FlagReadOnly        = 1 << 1
	FlagSendFlush       = 1 << 2
	FlagSendFUA         = 1 << 3
	FlagSendTrim        = 1 << 5
	FlagSendWriteZeroes = 1 << 6
	FlagSendDF          = 1 << 7
	FlagMultiConn       = 1 << 8
	FlagSendCache       = 1 << 10
	FlagSendFastZero    = 1 << 11
	FlagStatusPayload   = 1 << 12
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Command flags.
const (
	CmdFUA        = 1 << 0
	CmdNoHole     = 1 << 1
	CmdDF         = 1 << 2
	CmdReqOne     = 1 << 3
	CmdFastZero   = 1 << 4
	cmdPayloadLen = 1 << 5
)

// Types of reply chunks, and their flag.
const (
	chunkNone           = 0
	chunkData           = 1
	chunkHole           = 2
	chunkBlockStatus    = 5
	chunkBlockStatusExt = 6
	chunkError          = 1<<15 + 1
	chunkErrorOffset    = 1<<15 + 2

	chunkDone = 1
)

// Status bits of BLOCK_STATUS.
const (
	StateHole  = 1 << 0 // base:allocation
	StateZero  = 1 << 1 // base:allocation
	StateDirty = 1 << 0 // changed contexts
)

// ContextAllocation is the metadata context that every export has.
const ContextAllocation = "base:allocation"

const (
	maxString    = 4096     // bytes of a name or other string, says the protocol
	maxRequest   = 32 << 20 // bytes of a READ or WRITE; also told to clients
	preferred    = 4096     // block size told to clients
	trimGrain    = 4096     // TRIM leaves what is not a whole grain alone
	maxOption    = 64 << 10 // bytes of an option's data that are looked at
	maxSkip      = 1 << 20  // bytes of a larger option that are read past
	maxErrorText = 1024     // bytes of a message in a reply
	maxContexts  = 16       // metadata contexts of one connection
)

// wire says how requests and replies are framed, from the poorest to the
// richest.
type wire int

const (
	wireSimple wire = iota
	wireStructured
	wireExtended
)

// request is a decoded request header.
type request struct {
	flags  uint16
	cmd    uint16
	cookie uint64
	off    uint64
	length uint64 // bytes of payload if it has the flag cmdPayloadLen or is a WRITE, else of effect
}

// Sizes of headers, in bytes.
const (
	requestSize         = 28
	extendedRequestSize = 32
	simpleReplySize     = 16
	chunkSize           = 20
	extendedReplySize   = 32
)

func (w wire) requestSize() int {
	if w == wireExtended {
		return extendedRequestSize
	}
	return requestSize
}

// decode reads a request header; ok is false when the magic is wrong.
func (w wire) decode(b []byte) (r request, ok bool) {
	be := binary.BigEndian
	r = request{flags: be.Uint16(b[4:]), cmd: be.Uint16(b[6:]), cookie: be.Uint64(b[8:]), off: be.Uint64(b[16:])}
	if w == wireExtended {
		r.length = be.Uint64(b[24:])
		return r, be.Uint32(b) == magicExtendedRequest
	}
	r.length = uint64(be.Uint32(b[24:]))
	return r, be.Uint32(b) == magicRequest
}

// appendRequest encodes a request header.
func (w wire) appendRequest(b []byte, r request) []byte {
	be := binary.BigEndian
	if w == wireExtended {
		b = be.AppendUint32(b, magicExtendedRequest)
	} else {
		b = be.AppendUint32(b, magicRequest)
	}
	b = be.AppendUint16(b, r.flags)
	b = be.AppendUint16(b, r.cmd)
	b = be.AppendUint64(b, r.cookie)
	b = be.AppendUint64(b, r.off)
	if w == wireExtended {
		return be.AppendUint64(b, r.length)
	}
	return be.AppendUint32(b, uint32(r.length))
}

// appendChunk encodes the header of a reply chunk with a payload of n bytes,
// which follows.
func (w wire) appendChunk(b []byte, r *request, flags, typ uint16, n int) []byte {
	be := binary.BigEndian
	if w == wireExtended {
		b = be.AppendUint32(b, magicExtendedReply)
	} else {
		b = be.AppendUint32(b, magicChunk)
	}
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, typ)
	b = be.AppendUint64(b, r.cookie)
	if w == wireExtended {
		b = be.AppendUint64(b, r.off)
		return be.AppendUint64(b, uint64(n))
	}
	return be.AppendUint32(b, uint32(n))
}

// appendSimple encodes a simple reply without its data.
func appendSimple(b []byte, cookie uint64, e Errno) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimpleReply)
	b = binary.BigEndian.AppendUint32(b, uint32(e))
	return binary.BigEndian.AppendUint64(b, cookie)
}

// appendDone encodes the success of a request that has no data to return.
func (w wire) appendDone(b []byte, r *request) []byte {
	if w == wireSimple || (w == wireStructured && r.cmd != cmdRead) {
		return appendSimple(b, r.cookie, 0)
	}
	return w.appendChunk(b, r, chunkDone, chunkNone, 0)
}

// appendError encodes the failure of a request.
func (w wire) appendError(b []byte, r *request, e Errno, text string) []byte {
	if w == wireSimple {
		return appendSimple(b, r.cookie, e)
	}
	text = text[:min(len(text), maxErrorText)]
	b = w.appendChunk(b, r, chunkDone, chunkError, 6+len(text))
	return appendErrorBody(b, e, text)
}

// appendErrorAt encodes the failure of a READ at a byte of the export, after
// which no more of it comes.
func (w wire) appendErrorAt(b []byte, r *request, e Errno, text string, at int64) []byte {
	text = text[:min(len(text), maxErrorText)]
	b = w.appendChunk(b, r, chunkDone, chunkErrorOffset, 6+len(text)+8)
	return binary.BigEndian.AppendUint64(appendErrorBody(b, e, text), uint64(at))
}

func appendErrorBody(b []byte, e Errno, text string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(e))
	b = binary.BigEndian.AppendUint16(b, uint16(len(text)))
	return append(b, text...)
}
