package thincli

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	maxFromServer = 256 << 20 // of a frame, in bytes; lists of a whole pool come in one

	// heartbeat is how often a busy client reminds the server that it lives.
	heartbeat = 300 * time.Second
)

const usage = `Usage:
    xe <command>
      [ -s <server> ]            host name, address, or path of a Unix socket
      [ -p <port> ]              port number
      [ -u <username> -pw <password> | -pwf <password file> ]
                                 user authentication
      [ --nossl ]                disable TLS
      [ --debug ]                trace to standard error
      [ --debug-on-fail ]        the same, shown only on failure
      [ --traceparent <value> ]  distributed tracing context
      [ <other arguments> ... ]  arguments of the command

A full list of commands can be obtained by running
    xe help [ -s <server> -p <port> ]
`

// client is one run of xe.
type client struct {
	*options
	env       *Env
	permitted map[string]bool
	received  received
	trace     io.Writer // nil unless asked for

	out sync.Mutex // guards Stdout and Stderr of env, and trace

	w struct {
		sync.Mutex // guards writing to conn
		conn       io.Writer
	}
}

// A failure ends the run with a text for standard error and an exit code.
type failure struct {
	text string
	code int
}

func (f *failure) Error() string { return f.text }

func failf(format string, args ...any) error {
	return &failure{fmt.Sprintf(format, args...), 1}
}

// Run is the whole of xe: it connects to the server that its options name,
// sends args (without the program's name) and does what the server says.
// The result is the exit code; like the stock client, it is 0 when all that
// happened is that the usage was shown. When ctx ends, so does the run, with
// code 1. A file that is received gets its name only when the run succeeds.
func Run(ctx context.Context, env Env, args []string) int {
	env.stdin = bufio.NewReader(env.Stdin)
	o, err := parseOptions(&env, args)
	if errors.Is(err, errVersion) {
		fmt.Fprintf(env.Stdout, "ThinCLI protocol: %d.%d\n", major, minor)
		return 0
	}
	var code int
	var kept strings.Builder
	c := &client{options: o, env: &env, received: received{env: &env}}
	if err == nil {
		c.permitted = permitted(&env, o.args)
		switch {
		case o.debug:
			c.trace = env.Stderr
		case o.debugOnFail:
			c.trace = &kept
		}
		code, err = c.run(ctx)
	}
	switch {
	case err == nil && code == 0:
		if !c.received.broken {
			err = c.received.keep()
		}
	case ctx.Err() != nil:
		err = failf("Interrupted.\n") // whatever came of that
	}
	if f, ok := errors.AsType[*failure](err); ok {
		fmt.Fprint(env.Stderr, f.text)
		code = f.code
	}
	fmt.Fprint(env.Stderr, c.received.drop())
	if code != 0 {
		fmt.Fprint(env.Stderr, kept.String())
	}
	return code
}

// run connects, talks and returns the exit code that the server asked for.
// Its error is a *failure.
func (c *client) run(ctx context.Context) (int, error) {
	conn, err := c.dialServer(ctx)
	if err != nil {
		return 0, dialFailure(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // closes conn, too
	context.AfterFunc(ctx, func() { conn.Close() })

	r := bufio.NewReaderSize(conn, 64<<10)
	if _, err := conn.Write(c.request()); err != nil {
		c.debugf("sending the request: %v", err)
		return 0, failf("Unable to contact server. Please check server and port settings.\n")
	}
	if err := c.greet(r); err != nil {
		return 0, err
	}
	if _, err := conn.Write(appendBanner(nil)); err != nil {
		return 0, c.lost(err)
	}
	c.w.conn = conn

	frames := make(chan frame)
	wg.Go(func() { c.readFrames(ctx, r, frames) })
	return c.obey(ctx, frames)
}

// request returns the head and the body of the request.
func (c *client) request() []byte {
	// Copied, because c.args also serves the check of file names.
	body := strings.Join(append(append([]string(nil), c.args...), "username="+c.username, "password="+c.password), "\n")
	var b strings.Builder
	b.WriteString("POST /cli HTTP/1.0\r\nUser-agent: xe-cli/Unix/" + strconv.Itoa(major) + "." + strconv.Itoa(minor) + "\r\noriginator: cli\r\n")
	if c.traceparent != "" {
		b.WriteString("traceparent: " + c.traceparent + "\r\n")
	}
	if baggage := c.env.getenv("BAGGAGE"); baggage != "" {
		b.WriteString("baggage: " + baggage + "\r\n")
	}
	b.WriteString("content-length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body)
	return []byte(b.String())
}

// greet reads the server's banner.
func (c *client) greet(r *bufio.Reader) error {
	var b [bannerLen]byte
	n, err := io.ReadFull(r, b[:len(banner)])
	switch {
	case strings.HasPrefix(string(b[:n]), "HTTP"):
		return failf("Server internal error.\n%s", notXE)
	case err != nil:
		c.debugf("reading the banner: %v", err)
		return failf("Unable to contact server. Please check server and port settings.\n")
	case string(b[:n]) != banner:
		return failf("Failed to contact a running management agent.\nTry specifying a server name and port.\n%s", usage)
	}
	v := b[len(banner):]
	if _, err := io.ReadFull(r, v); err != nil {
		return c.lost(err)
	}
	theirs, theirMinor := binary.LittleEndian.Uint32(v), binary.LittleEndian.Uint32(v[4:])
	if theirs != major {
		return failf("Protocol version mismatch: Server has protocol version %d.%d. Client has %d.%d.\n"+
			"Try specifying a server name and port on the command-line.\n%s", theirs, theirMinor, major, minor, usage)
	}
	return nil
}

// notXE follows the text of the stock client for a server that answers as one of
// the web.
const notXE = "What answers there does not take commands of xe: is the port right? A port with TLS is not for --nossl and 127.0.0.1.\n"

func (c *client) lost(err error) error {
	c.debugf("connection: %v", err)
	return failf("Lost connection to the server.\n")
}

// obey carries out commands until Exit. Text is shown at once, also while a
// transfer runs; everything that needs an answer waits for the transfer before it.
func (c *client) obey(ctx context.Context, frames <-chan frame) (code int, err error) {
	var running job
	defer func() {
		if e := running.stop(); err == nil {
			err = e
		}
	}()
	for {
		var f frame
		select {
		case <-ctx.Done():
			return 1, nil
		case f = <-frames:
		case <-running.done:
			if err := running.wait(); err != nil {
				return 0, err
			}
			continue
		}
		if err := running.failure(); err != nil {
			return 0, err
		}
		if f.err != nil {
			return 0, c.readFailure(f.err)
		}
		c.debugf("server: %#v", f.m)
		switch m := f.m.(type) {
		case Print:
			if err := c.write(c.env.Stdout, m.Text+"\n"); err != nil && len(c.received.files) == 0 {
				return 0, cmp.Or(unread(err), failf("Standard output: %s\n", reason(err)))
			}
		case PrintStderr:
			_ = c.write(c.env.Stderr, m.Text)
		case Debug:
			c.debugf("%s", m.Text)
		case Error:
			_ = c.write(c.env.Stderr, "Error code: "+m.Code+"\nError parameters: "+strings.Join(m.Params, ", ")+"\n")
		case Exit:
			if m.Code != 0 {
				return int(m.Code), nil
			}
			return 0, running.wait()
		case Load, Prompt, HTTPGet, HTTPPut, HTTPConnect:
			if err := running.wait(); err != nil {
				return 0, err
			}
			running = c.start(ctx, m)
		default:
			return 0, failf("Unexpected message from server: %s", describe(m))
		}
	}
}

func describe(m Message) string {
	switch m := m.(type) {
	case Response:
		return "Response " + m.String()
	case Chunk:
		return fmt.Sprintf("Blob Chunk %d", m.Length)
	case End:
		return "Blob End"
	}
	return fmt.Sprintf("%#v", m)
}

func (c *client) readFailure(err error) error {
	if e, ok := errors.AsType[*UnknownTagError](err); ok {
		return failf("Unhandled exception\nCli_protocol.Unknown_tag(%q, %d)\n", e.What, e.Tag)
	}
	return c.lost(err)
}

type frame struct {
	m   Message
	err error
}

// readFrames reads the CLI connection until it fails or ctx ends.
func (c *client) readFrames(ctx context.Context, r *bufio.Reader, frames chan<- frame) {
	for {
		m, err := ReadMessage(r, maxFromServer)
		select {
		case frames <- frame{m, err}:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

// job is a command that runs beside the others. The zero job is none.
type job struct {
	failed <-chan error    // takes the error of the job before the server hears of it
	done   <-chan struct{} // nil for none
	err    *error          // of the job, once done is closed
	cancel context.CancelFunc
	stuck  bool // may not notice cancel: it reads a file, which may be a pipe, or writes to standard output
}

// failure returns the error of a job that has told the server that it failed,
// if not more. What the server makes of that says less than the error does.
func (j *job) failure() error {
	select {
	case err := <-j.failed:
		return err
	default:
		return nil
	}
}

// wait waits for the job and turns it into none.
func (j *job) wait() error {
	if j.done == nil {
		return nil
	}
	<-j.done
	j.cancel()
	err := *j.err
	*j = job{}
	return err
}

// stop cuts the job short, unless it has ended by itself: then it returns its
// error. A job that is waiting for a pipe that nobody writes to, or reads from,
// or even to open it, is left behind for the end of the program.
func (j *job) stop() error {
	if j.done == nil {
		return nil
	}
	select {
	case <-j.done:
		return j.wait()
	default:
	}
	j.cancel()
	if !j.stuck {
		_ = j.wait() // of a job cut short
	}
	return nil
}

// start runs a command that needs an answer.
func (c *client) start(ctx context.Context, m Message) job {
	ctx, cancel := context.WithCancel(ctx)
	failed, done := make(chan error, 1), make(chan struct{})
	_, upload := m.(HTTPPut)
	download, ok := m.(HTTPGet)
	printing := ok && download.File == ""
	j := job{failed: failed, done: done, err: new(error), cancel: cancel, stuck: upload || printing}
	go func() {
		defer close(done)
		switch m := m.(type) {
		case Load:
			*j.err = c.load(m)
		case Prompt:
			*j.err = c.prompt(ctx)
		case HTTPGet:
			*j.err = c.beating(ctx, failed, func() (Response, error) { return c.get(ctx, m) })
		case HTTPPut:
			*j.err = c.beating(ctx, failed, func() (Response, error) { return c.put(ctx, m) })
		case HTTPConnect:
			*j.err = c.beating(ctx, failed, func() (Response, error) { return c.console(ctx, m) })
		}
	}()
	return j
}

// beating runs fn with heartbeats and sends its response, also if it failed;
// then the error goes to failed before.
func (c *client) beating(ctx context.Context, failed chan<- error, fn func() (Response, error)) error {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTicker(heartbeat)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				if c.send(Wait) != nil {
					return
				}
			case <-stop:
				return
			}
		}
	})
	r, err := fn()
	close(stop)
	wg.Wait()
	if r == 0 || ctx.Err() != nil {
		return err
	}
	if err != nil {
		failed <- err
	}
	if e := c.send(r); err == nil && e != nil {
		err = c.lost(e)
	}
	return err
}

// send writes messages to the server.
func (c *client) send(ms ...Message) error {
	var b []byte
	for _, m := range ms {
		c.debugf("client: %#v", m)
		b = AppendMessage(b, m)
	}
	return c.sendBytes(b)
}

func (c *client) sendBytes(b []byte) error {
	c.w.Lock()
	defer c.w.Unlock()
	_, err := c.w.conn.Write(b)
	return err
}

// blob appends data as a blob to b.
func blob(b, data []byte) []byte {
	b = AppendMessage(b, Chunk{uint32(len(data))})
	b = append(b, data...)
	return AppendMessage(b, End{})
}

// load sends a whole file over the CLI connection.
func (c *client) load(m Load) error {
	if err := c.mayTouch(m.File); err != nil {
		return err
	}
	var b []byte
	data, err := os.ReadFile(c.env.path(m.File))
	if err == nil && len(data) <= maxLoad {
		b = blob(AppendMessage(nil, OK), data)
	} else {
		b = AppendMessage(nil, Failed)
	}
	if err := c.sendBytes(b); err != nil {
		return c.lost(err)
	}
	return nil
}

// prompt sends a line of standard input. Reading a terminal cannot be
// interrupted: when ctx ends first, a goroutine stays behind in Read until
// the program exits, which is what comes next.
func (c *client) prompt(ctx context.Context) error {
	type input struct {
		line string
		err  error
	}
	typed := make(chan input, 1)
	go func() {
		line, err := c.env.stdin.ReadString('\n')
		typed <- input{line, err}
	}()
	select {
	case <-ctx.Done():
		return nil
	case in := <-typed:
		if in.err != nil && in.line == "" {
			c.debugf("standard input: %v", in.err)
			return failf("There is no answer on standard input. Commands that ask for confirmation do without with --force.\n")
		}
		if err := c.sendBytes(blob(nil, []byte(strings.TrimSuffix(in.line, "\n")))); err != nil {
			return c.lost(err)
		}
		return nil
	}
}

// mayTouch refuses files that the user did not name.
func (c *client) mayTouch(name string) error {
	if c.permitted[c.env.path(name)] {
		return nil
	}
	return failf("File not permitted: Blocked upload/download of the file %s, which was requested by the server. "+
		"The file name was not present on the command line\n.\n", name)
}

func (c *client) write(w io.Writer, text string) error {
	c.out.Lock()
	defer c.out.Unlock()
	_, err := fmt.Fprint(w, text)
	return err
}

// unread is what ends a run that is there for its standard output alone when nobody
// reads that any more: silently and as SIGPIPE would. It is nil for other errors.
func unread(err error) error {
	if errors.Is(err, syscall.EPIPE) {
		return &failure{"", 128 + int(syscall.SIGPIPE)}
	}
	return nil
}

func (c *client) debugf(format string, args ...any) {
	if c.trace != nil {
		_ = c.write(c.trace, "debug: "+fmt.Sprintf(format, args...)+"\n")
	}
}
