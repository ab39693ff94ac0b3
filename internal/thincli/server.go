package thincli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxArgs      = 200 << 10 // of a request body, in bytes
	maxLoad      = 32 << 20  // of a file that the client sends, in bytes
	maxFromThere = 4 << 10   // of a frame from a client: responses and chunk heads only

	greeting = 30 * time.Second // for the client to send its banner
	goodbye  = 2 * time.Second  // for the client to hang up after Exit
)

var (
	// ErrFailed means that the client could not do what it was asked to.
	ErrFailed = errors.New("thincli: the client reported failure")
	// ErrGone means that the client hung up.
	ErrGone = errors.New("thincli: the client is gone")
)

// ReadArgs reads the body of a POST /cli request and splits it into arguments.
// The length is that of the Content-Length header, which is mandatory.
func ReadArgs(body io.Reader, length int64) ([]string, error) {
	if length < 0 || length > maxArgs {
		return nil, fmt.Errorf("%w: request of %d bytes", ErrProtocol, length)
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(body, b); err != nil {
		return nil, fmt.Errorf("thincli: reading arguments: %w", err)
	}
	if len(b) == 0 {
		return nil, nil
	}
	args := strings.Split(string(b), "\n")
	for i, a := range args {
		args[i] = strings.TrimSuffix(a, "\r")
	}
	return args, nil
}

// Server is the server's end of a connection. Its methods may be called by
// several goroutines, but only one at a time may wait for an answer of the
// client (Wait, Load and Prompt).
type Server struct {
	conn net.Conn

	w struct {
		sync.Mutex // guards writing; held as long as the client does not read
		buf        []byte
	}
	exited atomic.Bool // Exit has been sent
	r      struct {
		sync.Mutex // guards expect
		expect     expectation
	}
	answers chan answer   // from the reader, in order
	gone    chan struct{} // closed by the reader at its end
	closed  chan struct{} // closed by Close
	once    sync.Once
}

// expectation is what the client may send next.
type expectation uint8

const (
	nothing        expectation = iota
	aResponse                  // OK or Failed
	responseToLoad             // Failed, or OK and then a blob
	aBlob
)

// answer is a response, or a piece of a blob.
type answer struct {
	response Response
	data     []byte
	end      bool
}

// Accept exchanges banners with a client whose request has been read, and
// returns the connection ready for commands. The reader may hold bytes that
// were buffered behind the request, as http.Hijacker's does; nil means none.
// The connection belongs to the Server from here on, also after an error.
func Accept(conn net.Conn, r *bufio.Reader) (*Server, error) {
	if r == nil {
		r = bufio.NewReader(conn)
	}
	if err := greet(conn, r); err != nil {
		conn.Close()
		return nil, err
	}
	s := &Server{
		conn:    conn,
		answers: make(chan answer, 1),
		gone:    make(chan struct{}),
		closed:  make(chan struct{}),
	}
	go s.read(r)
	return s, nil
}

func greet(conn net.Conn, r *bufio.Reader) error {
	if err := conn.SetDeadline(time.Now().Add(greeting)); err != nil {
		return fmt.Errorf("thincli: %w", err)
	}
	if _, err := conn.Write(appendBanner(nil)); err != nil {
		return fmt.Errorf("thincli: sending the banner: %w", err)
	}
	var b [bannerLen]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return fmt.Errorf("thincli: reading the banner: %w", err)
	}
	if string(b[:len(banner)]) != banner {
		return fmt.Errorf("%w: no banner", ErrProtocol)
	}
	if v := binary.LittleEndian.Uint32(b[len(banner):]); v != major {
		return fmt.Errorf("%w: client speaks version %d", ErrProtocol, v)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("thincli: %w", err)
	}
	return nil
}

// read passes what the client sends to whoever waits for it. A client that
// speaks out of turn is cut off.
func (s *Server) read(r *bufio.Reader) {
	defer close(s.gone)
	defer s.conn.Close()
	for {
		m, err := ReadMessage(r, maxFromThere)
		if err != nil {
			return
		}
		if m == Wait {
			continue
		}
		a, ok := s.advance(m)
		if !ok {
			return
		}
		if c, ok := m.(Chunk); ok {
			if a.data, err = readN(r, c.Length); err != nil {
				return
			}
		}
		select {
		case s.answers <- a:
		case <-s.closed:
			return
		}
	}
}

// advance checks m against what is expected and says what may follow.
func (s *Server) advance(m Message) (a answer, ok bool) {
	s.r.Lock()
	defer s.r.Unlock()
	switch m := m.(type) {
	case Response:
		switch {
		case s.r.expect == responseToLoad && m == OK:
			s.r.expect = aBlob
		case s.r.expect == responseToLoad || s.r.expect == aResponse:
			s.r.expect = nothing
		default:
			return a, false
		}
		return answer{response: m}, true
	case Chunk:
		return a, s.r.expect == aBlob && m.Length <= maxLoad
	case End:
		ok = s.r.expect == aBlob
		s.r.expect = nothing
		return answer{end: true}, ok
	}
	return a, false
}

// send writes one command; expect is what it makes the client answer.
func (s *Server) send(m Message, expect expectation) error {
	s.w.Lock()
	defer s.w.Unlock()
	if s.exited.Load() {
		return fmt.Errorf("%w: command after Exit", ErrProtocol)
	}
	if expect != nothing {
		s.r.Lock()
		busy := s.r.expect != nothing
		if !busy {
			s.r.expect = expect
		}
		s.r.Unlock()
		if busy {
			return fmt.Errorf("%w: the client has not answered yet", ErrProtocol)
		}
	}
	s.w.buf = AppendMessage(s.w.buf[:0], m)
	if _, err := s.conn.Write(s.w.buf); err != nil {
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	if _, ok := m.(Exit); ok {
		s.exited.Store(true)
	}
	return nil
}

// Done returns a channel that is closed when the client has hung up.
func (s *Server) Done() <-chan struct{} { return s.gone }

// Print writes text and a newline to the client's standard output.
func (s *Server) Print(text string) error { return s.send(Print{text}, nothing) }

// PrintStderr writes text, as it is, to the client's standard error.
func (s *Server) PrintStderr(text string) error { return s.send(PrintStderr{text}, nothing) }

// Debug writes text to the trace of a client that keeps one.
func (s *Server) Debug(text string) error { return s.send(Debug{text}, nothing) }

// Error shows an error code and its parameters on the client's standard error.
func (s *Server) Error(code string, params ...string) error {
	return s.send(Error{code, params}, nothing)
}

// Exit makes the client exit. It is the last command; Close comes next.
func (s *Server) Exit(code int) error { return s.send(Exit{int32(code)}, nothing) }

// HTTPGet makes the client fetch url into a file; an empty name is its
// standard output. It does not wait: that is for Wait.
func (s *Server) HTTPGet(file, url string) error {
	return s.send(HTTPGet{file, url}, aResponse)
}

// HTTPPut makes the client send a file to url. It does not wait: that is for Wait.
func (s *Server) HTTPPut(file, url string) error {
	return s.send(HTTPPut{file, url}, aResponse)
}

// Wait waits until the client has done what HTTPGet or HTTPPut asked for,
// through any number of heartbeats. It returns nil, [ErrFailed], [ErrGone] or
// the cause of ctx's end; after the latter it may be called again.
func (s *Server) Wait(ctx context.Context) error {
	a, err := s.next(ctx)
	if err != nil {
		return err
	}
	if a.response != OK {
		return ErrFailed
	}
	return nil
}

// Load returns the contents of a file of the client, up to 32 MiB.
func (s *Server) Load(ctx context.Context, file string) ([]byte, error) {
	if err := s.send(Load{file}, responseToLoad); err != nil {
		return nil, err
	}
	if err := s.Wait(ctx); err != nil {
		return nil, err
	}
	return s.blob(ctx)
}

// Prompt returns a line that the user typed, without its end.
func (s *Server) Prompt(ctx context.Context) (string, error) {
	if err := s.send(Prompt{}, aBlob); err != nil {
		return "", err
	}
	b, err := s.blob(ctx)
	return string(b), err
}

func (s *Server) blob(ctx context.Context) ([]byte, error) {
	var b bytes.Buffer
	for {
		a, err := s.next(ctx)
		if err != nil {
			return nil, err
		}
		if a.end {
			return b.Bytes(), nil
		}
		if b.Len()+len(a.data) > maxLoad {
			return nil, fmt.Errorf("%w: file of more than %d bytes", ErrProtocol, maxLoad)
		}
		b.Write(a.data)
	}
}

// next returns the next answer. What the client said before it hung up, or
// before ctx ended, counts.
func (s *Server) next(ctx context.Context) (answer, error) {
	select {
	case a := <-s.answers:
		return a, nil
	default:
	}
	select {
	case a := <-s.answers:
		return a, nil
	case <-s.gone:
		select {
		case a := <-s.answers:
			return a, nil
		default:
			return answer{}, ErrGone
		}
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
}

// Close ends the connection, whatever is blocked on it, and waits for its
// reader. After Exit it first lets the client hang up, so that nothing that
// was sent gets lost.
func (s *Server) Close() {
	s.once.Do(func() {
		close(s.closed)
		if half, ok := s.conn.(interface{ CloseWrite() error }); ok && s.exited.Load() && half.CloseWrite() == nil {
			t := time.NewTimer(goodbye)
			defer t.Stop()
			select {
			case <-s.gone:
			case <-t.C:
			}
		}
		s.conn.Close()
		<-s.gone
	})
}
