// Package thincli is both ends of the protocol spoken by the xe command line.
//
// The client knows no commands. It sends its arguments as text to POST /cli
// and then obeys: print this, read that file, fetch this URL into that file,
// exit with this code. Commands live in the server; this package carries
// their words.
//
// # Wire
//
// After the request, which gets no HTTP reply, both sides send a banner of
// 35 bytes (27 of text, int32 major 0, int32 minor 2), the server first.
// Frames follow. All integers are 32 bits, little-endian:
//
//	frame    length of payload · payload
//	payload  kind: 9 command, 10 response, 11 blob · tag · fields
//	string   length · bytes
//	list     count · elements
//
//	command   0 Print text         server → client; Print adds a newline
//	          1 Load file          answered by a response and, if OK, a blob
//	          3 Prompt             answered by a blob
//	          4 Exit code
//	         12 HTTPGet file url   answered by a response
//	         13 HTTPPut file url   answered by a response
//	         14 Error code params
//	         15 Debug text
//	         16 PrintStderr text
//	         17 HTTPConnect url    answered by a response
//	response  5 OK, 6 Failed, 18 Wait   client → server; Wait is a heartbeat
//	blob      7 Chunk n, 8 End     n raw bytes follow the Chunk frame
//
// Disk images never travel here: HTTPGet and HTTPPut make the client open a
// second connection.
//
// # Ends
//
// A server reads the request body with [ReadArgs], takes over the connection
// and calls [Accept]; the resulting [Server] has one method per command.
// [Run] is the whole client program: options, files, terminal and exit codes.
package thincli

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	banner = "XenSource thin CLI protocol"
	major  = 0
	minor  = 2
)

// bannerLen is the length of the text and both version numbers.
const bannerLen = len(banner) + 8

func appendBanner(b []byte) []byte {
	b = append(b, banner...)
	b = binary.LittleEndian.AppendUint32(b, major)
	return binary.LittleEndian.AppendUint32(b, minor)
}

// Message is the payload of one frame: a command, a [Response], a [Chunk] or an [End].
type Message interface {
	appendPayload(b []byte) []byte
}

// The commands of the server.
type (
	// Print writes Text and a newline to standard output.
	Print struct{ Text string }
	// Load asks for the contents of a file.
	Load struct{ File string }
	// Prompt asks for a line of standard input.
	Prompt struct{}
	// Exit ends the session.
	Exit struct{ Code int32 }
	// HTTPGet asks the client to save what URL yields; an empty File is standard output.
	HTTPGet struct{ File, URL string }
	// HTTPPut asks the client to send a file to URL.
	HTTPPut struct{ File, URL string }
	// Error reports an error of the API that has no better text.
	Error struct {
		Code   string
		Params []string
	}
	// Debug is shown by clients that were asked to trace.
	Debug struct{ Text string }
	// PrintStderr writes Text, as it is, to standard error.
	PrintStderr struct{ Text string }
	// HTTPConnect asks the client to connect its terminal to URL.
	HTTPConnect struct{ URL string }
)

// Response is the client's answer to Load, HTTPGet, HTTPPut and HTTPConnect.
type Response uint32

// The responses.
const (
	OK     Response = 5
	Failed Response = 6
	Wait   Response = 18 // not an answer yet: still busy
)

func (r Response) String() string {
	switch r {
	case OK:
		return "OK"
	case Failed:
		return "Failed"
	case Wait:
		return "Wait"
	}
	return fmt.Sprintf("Response(%d)", uint32(r))
}

type (
	// Chunk announces Length raw bytes, which follow its frame.
	Chunk struct{ Length uint32 }
	// End ends a blob.
	End struct{}
)

const (
	kindCommand  = 9
	kindResponse = 10
	kindBlob     = 11

	tagPrint       = 0
	tagLoad        = 1
	tagPrompt      = 3
	tagExit        = 4
	tagChunk       = 7
	tagEnd         = 8
	tagHTTPGet     = 12
	tagHTTPPut     = 13
	tagError       = 14
	tagDebug       = 15
	tagPrintStderr = 16
	tagHTTPConnect = 17
)

func appendHead(b []byte, kind, tag uint32) []byte {
	b = binary.LittleEndian.AppendUint32(b, kind)
	return binary.LittleEndian.AppendUint32(b, tag)
}

func appendString(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

func appendText(b []byte, tag uint32, fields ...string) []byte {
	b = appendHead(b, kindCommand, tag)
	for _, s := range fields {
		b = appendString(b, s)
	}
	return b
}

func (m Print) appendPayload(b []byte) []byte   { return appendText(b, tagPrint, m.Text) }
func (m Load) appendPayload(b []byte) []byte    { return appendText(b, tagLoad, m.File) }
func (m Prompt) appendPayload(b []byte) []byte  { return appendText(b, tagPrompt) }
func (m HTTPGet) appendPayload(b []byte) []byte { return appendText(b, tagHTTPGet, m.File, m.URL) }

func (m HTTPPut) appendPayload(b []byte) []byte     { return appendText(b, tagHTTPPut, m.File, m.URL) }
func (m Debug) appendPayload(b []byte) []byte       { return appendText(b, tagDebug, m.Text) }
func (m PrintStderr) appendPayload(b []byte) []byte { return appendText(b, tagPrintStderr, m.Text) }
func (m HTTPConnect) appendPayload(b []byte) []byte { return appendText(b, tagHTTPConnect, m.URL) }
func (r Response) appendPayload(b []byte) []byte    { return appendHead(b, kindResponse, uint32(r)) }
func (m End) appendPayload(b []byte) []byte         { return appendHead(b, kindBlob, tagEnd) }

func (m Exit) appendPayload(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(appendHead(b, kindCommand, tagExit), uint32(m.Code))
}

func (m Error) appendPayload(b []byte) []byte {
	b = appendText(b, tagError, m.Code)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.Params)))
	for _, p := range m.Params {
		b = appendString(b, p)
	}
	return b
}

func (m Chunk) appendPayload(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(appendHead(b, kindBlob, tagChunk), m.Length)
}

// AppendMessage appends the frame of m to b.
func AppendMessage(b []byte, m Message) []byte {
	start := len(b)
	b = m.appendPayload(append(b, 0, 0, 0, 0))
	binary.LittleEndian.PutUint32(b[start:], uint32(len(b)-start-4))
	return b
}

// ErrProtocol is wrapped by every error about a peer that broke the protocol.
var ErrProtocol = errors.New("thincli: protocol violation")

// UnknownTagError reports a frame with an unknown kind or tag.
type UnknownTagError struct {
	What string // "kind", or the kind that has no such tag: "command", "response", "blob"
	Tag  uint32
}

func (e *UnknownTagError) Error() string {
	return fmt.Sprintf("thincli: unknown %s tag %d", e.What, e.Tag)
}

func (e *UnknownTagError) Unwrap() error { return ErrProtocol }

// ReadMessage reads one frame whose payload is at most limit bytes. The raw
// bytes after a Chunk are left in r. The error is io.EOF only between frames.
func ReadMessage(r *bufio.Reader, limit uint32) (Message, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > limit {
		return nil, fmt.Errorf("%w: frame of %d bytes", ErrProtocol, n)
	}
	p, err := readN(r, n)
	if err != nil {
		return nil, err
	}
	return parseMessage(p)
}

// readN reads n bytes. It does not trust n with more memory than has arrived.
func readN(r io.Reader, n uint32) ([]byte, error) {
	const step = 64 << 10
	b := make([]byte, 0, min(n, step))
	for uint32(len(b)) < n {
		start := len(b)
		b = append(b, make([]byte, min(n-uint32(start), max(step, uint32(start))))...)
		if _, err := io.ReadFull(r, b[start:]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return b, nil
}

// fields takes a payload apart; the first fault sticks.
type fields struct {
	b   []byte
	err error
}

func (f *fields) int() uint32 {
	if len(f.b) < 4 {
		f.fail()
		return 0
	}
	n := binary.LittleEndian.Uint32(f.b)
	f.b = f.b[4:]
	return n
}

func (f *fields) string() string {
	n := f.int()
	if uint64(n) > uint64(len(f.b)) {
		f.fail()
		return ""
	}
	s := string(f.b[:n])
	f.b = f.b[n:]
	return s
}

func (f *fields) list() []string {
	n := f.int()
	if uint64(n)*4 > uint64(len(f.b)) {
		f.fail()
		return nil
	}
	out := make([]string, n)
	for i := range out {
		out[i] = f.string()
	}
	return out
}

func (f *fields) fail() {
	if f.err == nil {
		f.err = fmt.Errorf("%w: short frame", ErrProtocol)
	}
	f.b = nil
}

func parseMessage(p []byte) (Message, error) {
	f := &fields{b: p}
	kind, tag := f.int(), f.int()
	if f.err != nil {
		return nil, f.err
	}
	var m Message
	switch kind {
	case kindCommand:
		m = parseCommand(f, tag)
	case kindResponse:
		if r := Response(tag); r == OK || r == Failed || r == Wait {
			m = r
		} else {
			return nil, &UnknownTagError{"response", tag}
		}
	case kindBlob:
		switch tag {
		case tagChunk:
			m = Chunk{f.int()}
		case tagEnd:
			m = End{}
		default:
			return nil, &UnknownTagError{"blob", tag}
		}
	default:
		return nil, &UnknownTagError{"kind", kind}
	}
	switch {
	case m == nil:
		return nil, &UnknownTagError{"command", tag}
	case f.err != nil:
		return nil, f.err
	case len(f.b) > 0:
		return nil, fmt.Errorf("%w: %d bytes after the fields", ErrProtocol, len(f.b))
	}
	return m, nil
}

func parseCommand(f *fields, tag uint32) Message {
	switch tag {
	case tagPrint:
		return Print{f.string()}
	case tagLoad:
		return Load{f.string()}
	case tagPrompt:
		return Prompt{}
	case tagExit:
		return Exit{int32(f.int())}
	case tagHTTPGet:
		return HTTPGet{f.string(), f.string()}
	case tagHTTPPut:
		return HTTPPut{f.string(), f.string()}
	case tagError:
		return Error{f.string(), f.list()}
	case tagDebug:
		return Debug{f.string()}
	case tagPrintStderr:
		return PrintStderr{f.string()}
	case tagHTTPConnect:
		return HTTPConnect{f.string()}
	}
	return nil
}
