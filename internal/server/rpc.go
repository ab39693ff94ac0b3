package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"coppice/internal/rpc"
	"coppice/internal/xapi"
)

// replyBuffer is how much of an RPC answer is held back. An answer that fits
// goes out with its length; a longer one is streamed while it is made.
const replyBuffer = 64 << 10 // bytes

// listMethods is the one call whose XML-RPC answer has no Status around it.
const listMethods = "system.listMethods"

func (s *Server) xmlRPC(w http.ResponseWriter, r *request)  { s.rpc(w, r, rpc.XML) }
func (s *Server) jsonRPC(w http.ResponseWriter, r *request) { s.rpc(w, r, rpc.JSON) }

// rpc answers one remote procedure call. A failure of the call is an ordinary
// answer with status 200; only a request that is no call at all gets an error
// page.
func (s *Server) rpc(w http.ResponseWriter, r *request, syntax rpc.Syntax) {
	call, done, err := s.readCall(w, r, syntax)
	defer done()
	refusal := refused(err)
	switch {
	case errors.Is(err, rpc.ErrTooLarge):
		s.fail(w, r, &statusError{http.StatusRequestEntityTooLarge, fmt.Errorf("a call may have %d bytes", maxRPC)})
		return
	case err != nil && refusal == nil:
		s.fail(w, r, err)
		return
	}
	if l, ok := w.(*reply); ok {
		l.call = call.Method
	}

	h := w.Header()
	h.Set("Content-Type", syntax.ContentType())
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Allow-Headers", "X-Requested-With")
	out := s.newRPCWriter(w)
	if refusal != nil {
		err = call.WriteFailure(out, refusal.Code, refusal.Params...)
	} else {
		err = s.invoke(out, r, call)
	}
	if err == nil {
		err = out.finish()
	}
	s.replies.Put(out.held)
	if err != nil {
		// What is out already is no answer, and must not look like one.
		s.log.Debug("an answer was cut short", "call", call.Method, "error", err)
		panic(http.ErrAbortHandler)
	}
}

// badTextShown is how many bytes of a text that is not UTF-8 come back.
const badTextShown = 1 << 10

// refused is the failure with which a call is answered that was read with an
// error; nil when there is no answering it.
func refused(err error) *xapi.Error {
	if e, ok := errors.AsType[*rpc.EncodingError](err); ok {
		return xapi.NewError(xapi.ErrInvalidValue, "Invalid UTF-8 string in parameter", e.Value[:min(len(e.Value), badTextShown)])
	}
	if e, ok := errors.AsType[*rpc.TooManyValuesError](err); ok {
		return xapi.NewError(xapi.ErrValueNotSupported, "parameters", fmt.Sprintf("more than %d values", e.Limit),
			"Each parameter, element of a set and entry of a map is a value: divide them among several calls.")
	}
	return nil
}

// readCall reads and parses the body of r. The function it returns is called
// when the call has been answered.
//
// A body longer than shortCall waits until it is its turn. That of a stranger
// ends with the answer, in which anything of the call may come back, and which
// has to be taken in time.
func (s *Server) readCall(w http.ResponseWriter, r *request, syntax rpc.Syntax) (call *rpc.Request, done func(), err error) {
	done = func() {}
	if r.ContentLength > maxRPC {
		return nil, done, rpc.ErrTooLarge
	}
	defer s.limitBody(w, bodyTimeout)()
	start, err := io.ReadAll(io.LimitReader(r.Body, shortCall+1))
	if err != nil {
		return nil, done, err
	}
	if len(start) <= shortCall {
		call, err = rpc.ParseCall(syntax, start)
		return call, done, err
	}
	ctx, cancel := s.whileWanted(r.Context())
	defer cancel()
	if r.origin.Trusted || s.namesSession(start) {
		end, err := s.turns.acquaintances.take(ctx)
		if err != nil {
			return nil, done, err
		}
		defer end()
	} else {
		if done, err = s.turns.strangers.take(ctx); err != nil {
			return nil, func() {}, err
		}
		if l, ok := w.(*reply); ok {
			l.last = time.Now().Add(2 * bodyTimeout)
		}
	}
	s.limitBody(w, bodyTimeout) // waiting may have taken it
	call, err = rpc.ReadCall(syntax, io.MultiReader(bytes.NewReader(start), r.Body), maxRPC)
	return call, done, err
}

// limitBody gives the client so long to send the body. The limit ends with
// the function it returns. Connections that know no deadlines, as in tests,
// do without.
func (s *Server) limitBody(w http.ResponseWriter, d time.Duration) func() {
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(d))
	return func() { _ = rc.SetReadDeadline(time.Time{}) }
}

// invoke carries the call out and writes its answer.
func (s *Server) invoke(out *rpcWriter, r *request, call *rpc.Request) error {
	ctx, cancel := s.whileWanted(r.Context())
	defer cancel()
	result, err := s.api.Invoke(ctx, r.origin, call.Method, call.Params)
	if err != nil {
		e, ok := errors.AsType[*xapi.Error](err)
		if !ok {
			e = xapi.NewError(xapi.ErrInternalError, err.Error())
		}
		return call.WriteFailure(out, e.Code, e.Params...)
	}
	encode := func(enc rpc.Encoder) error { return result.Encode(enc) }
	if call.Method == listMethods {
		return call.WriteBare(out, encode)
	}
	return call.WriteSuccess(out, encode)
}

// whileWanted returns a context for waiting on behalf of a client: it ends
// when ctx does, which is when the client has gone after all of its request has
// been read, and when the server starts to stop.
func (s *Server) whileWanted(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(s.draining, func() { cancel(ErrStopping) })
	return ctx, func() {
		unhook()
		cancel(nil)
	}
}

// rpcWriter holds the beginning of an answer back until it is complete, so
// that it has a Content-Length, or until it outgrows replyBuffer.
type rpcWriter struct {
	w    http.ResponseWriter
	held *bytes.Buffer // of at most replyBuffer bytes
	sent bool
}

// newRPCWriter returns a writer to w whose buffer goes back to s.replies.
func (s *Server) newRPCWriter(w http.ResponseWriter) *rpcWriter {
	held, ok := s.replies.Get().(*bytes.Buffer)
	if !ok {
		held = new(bytes.Buffer)
	}
	held.Reset()
	return &rpcWriter{w: w, held: held}
}

func (o *rpcWriter) Write(p []byte) (int, error) {
	if o.sent {
		return o.w.Write(p)
	}
	if o.held.Len()+len(p) <= replyBuffer {
		return o.held.Write(p)
	}
	o.sent = true
	if _, err := o.held.WriteTo(o.w); err != nil {
		return 0, err
	}
	return o.w.Write(p)
}

// finish sends what is still held back.
func (o *rpcWriter) finish() error {
	if o.sent {
		return nil
	}
	o.w.Header().Set("Content-Length", strconv.Itoa(o.held.Len()))
	_, err := o.held.WriteTo(o.w)
	return err
}
