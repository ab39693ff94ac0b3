package xecmd

import (
	"bytes"
	"context"
	"encoding/hex"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/api"
	"coppice/internal/thincli"
	"coppice/internal/xapi"
)

// recorded returns bytes recorded between the stock client and server.
func recorded(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "thincli", "testdata", "wire", name+".hexdump"))
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for line := range strings.Lines(string(text)) {
		digits, _, _ := strings.Cut(line[4:], "|")
		b, err := hex.DecodeString(strings.Join(strings.Fields(digits), ""))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b...)
	}
	return out
}

const (
	diskUUID = "3f1d2c4b-5a69-4788-9c0d-1e2f3a4b5c6d"
	session  = "OpaqueRef:5e551071-0000-4000-8000-000000000001"
	taskRef  = "OpaqueRef:7a5c0000-0000-4000-8000-000000000002"
	diskRef  = "OpaqueRef:0d150000-0000-4000-8000-000000000003"
)

// fakeAPI has one disk and one task, whose life is a list of states.
type fakeAPI struct {
	task   []xapi.Task // what each event.from finds
	pauses []time.Duration
	login  error

	calls []string
}

func (f *fakeAPI) Login(context.Context, api.Origin, string, string) (xapi.Ref[xapi.Session], error) {
	f.calls = append(f.calls, "login")
	return session, f.login
}

func (f *fakeAPI) Logout(s xapi.Ref[xapi.Session]) error {
	f.calls = append(f.calls, "logout")
	return nil
}

func (f *fakeAPI) Read(xapi.Ref[xapi.Session], func(api.View) error) error {
	return xapi.NewError(xapi.ErrSessionInvalid, session)
}

func (f *fakeAPI) Invoke(ctx context.Context, o api.Origin, method string, params []any) (api.Result, error) {
	f.calls = append(f.calls, method)
	class, name, _ := strings.Cut(method, ".")
	res := api.Result{Type: xapi.Datamodel().Classes[class].Methods[name].Result}
	switch method {
	case "VDI.get_by_uuid":
		res.Value = diskRef
	case "task.create":
		res.Value = taskRef
	case "event.from":
		if len(f.task) == 0 {
			<-ctx.Done()
			return res, context.Cause(ctx)
		}
		select {
		case <-time.After(f.pauses[0]):
		case <-ctx.Done():
			return res, context.Cause(ctx)
		}
		res.Value = &xapi.EventBatch{Events: []*xapi.Event{{Ref: taskRef, Snapshot: &f.task[0]}}}
		f.task, f.pauses = f.task[1:], f.pauses[1:]
	}
	return res, nil
}

// playExport runs the recorded export against f; client plays the client's
// part from the HTTPGet on. It returns what the server sent.
func playExport(t *testing.T, f *fakeAPI, client func(conn net.Conn)) (sent []byte, exit int) {
	here, there := net.Pipe()
	done := make(chan []byte)
	go func() {
		var all bytes.Buffer
		banner := make([]byte, len(recorded(t, "banner")))
		if _, err := io.ReadFull(there, banner); err != nil || !bytes.Equal(banner, recorded(t, "banner")) {
			t.Errorf("banner %q, %v", banner, err)
		}
		if _, err := there.Write(banner); err != nil {
			t.Error(err)
		}
		request := make([]byte, len(recorded(t, "export-get")))
		n, err := io.ReadFull(there, request)
		if err != nil {
			t.Errorf("request %q, %v", request[:n], err)
		}
		all.Write(request)
		go client(there)
		_, _ = io.Copy(&all, there)
		done <- all.Bytes()
	}()
	body := recorded(t, "export-body")
	args, err := thincli.ReadArgs(bytes.NewReader(body), int64(len(body)))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := thincli.Accept(here, nil)
	if err != nil {
		t.Fatal(err)
	}
	exit = Serve(t.Context(), f, []string{"vhd"}, api.Origin{}, conn, args)
	conn.Close()
	return <-done, exit
}

func say(t *testing.T, conn net.Conn, m thincli.Message) {
	if _, err := conn.Write(thincli.AppendMessage(nil, m)); err != nil {
		t.Error(err)
	}
}

var (
	pending = xapi.Task{Status: xapi.TaskStatusTypePending}
	success = xapi.Task{Status: xapi.TaskStatusTypeSuccess, Progress: 1}
	failed  = xapi.Task{Status: xapi.TaskStatusTypeFailure, ErrorInfo: []string{xapi.ErrNotImplemented, "x"}}
)

// The recorded export, byte for byte.
func TestTranscriptExport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeAPI{task: []xapi.Task{pending, success}, pauses: []time.Duration{0, 1500 * time.Millisecond}}
		sent, exit := playExport(t, f, func(conn net.Conn) {
			time.Sleep(time.Second)
			say(t, conn, thincli.OK)
		})
		var want []byte
		for _, name := range []string{"export-get", "export-bar", "export-newline", "export-total", "export-exit"} {
			want = append(want, recorded(t, name)...)
		}
		if !bytes.Equal(sent, want) || exit != 0 {
			t.Errorf("exit %d, sent\n%q, want\n%q", exit, sent, want)
		}
		calls := "login VDI.get_by_uuid task.create event.from event.from task.destroy logout"
		if got := strings.Join(f.calls, " "); got != calls {
			t.Errorf("calls %s, want %s", got, calls)
		}
	})
}

// Whatever goes wrong, the command ends, says why, and removes its task.
func TestTransferEnds(t *testing.T) {
	get := recordedGet
	for _, tc := range []struct {
		name   string
		task   []xapi.Task
		pauses []time.Duration
		client func(t *testing.T, conn net.Conn)
		after  time.Duration
		sent   []thincli.Message // besides HTTPGet and progress
		cancel bool
	}{
		{
			name: "task finished before it was seen",
			task: []xapi.Task{success}, pauses: []time.Duration{0},
			client: func(t *testing.T, conn net.Conn) { say(t, conn, thincli.OK) },
			sent:   []thincli.Message{thincli.Exit{}},
		},
		{
			name: "slow client",
			task: []xapi.Task{success}, pauses: []time.Duration{0},
			client: func(t *testing.T, conn net.Conn) {
				for range 12 {
					time.Sleep(5 * time.Minute)
					say(t, conn, thincli.Wait)
				}
				say(t, conn, thincli.OK)
			},
			after: time.Hour,
			sent:  []thincli.Message{thincli.Exit{}},
		},
		{
			name: "task failed",
			task: []xapi.Task{failed}, pauses: []time.Duration{time.Minute},
			client: func(t *testing.T, conn net.Conn) { say(t, conn, thincli.OK) },
			after:  time.Minute,
			sent:   errorOf(failed),
		},
		{
			name: "both failed",
			task: []xapi.Task{failed}, pauses: []time.Duration{500 * time.Millisecond},
			client: func(t *testing.T, conn net.Conn) { say(t, conn, thincli.Failed) },
			after:  500 * time.Millisecond,
			sent:   errorOf(failed),
		},
		{
			name:   "client failed before the task began",
			client: func(t *testing.T, conn net.Conn) { say(t, conn, thincli.Failed) },
			after:  afterFailure,
			sent:   []thincli.Message{thincli.Error{Code: "CLIENT_ERROR", Params: []string{}}, thincli.Exit{Code: 1}},
			cancel: true,
		},
		{
			name: "client failed though the server is content",
			task: []xapi.Task{success}, pauses: []time.Duration{0},
			client: func(t *testing.T, conn net.Conn) { say(t, conn, thincli.Failed) },
			sent:   []thincli.Message{thincli.Error{Code: "CLIENT_ERROR", Params: []string{}}, thincli.Exit{Code: 1}},
		},
		{
			name: "task failed and the client does not notice",
			task: []xapi.Task{failed}, pauses: []time.Duration{0},
			client: func(t *testing.T, conn net.Conn) {},
			after:  lastAnswer,
			sent:   errorOf(failed),
		},
		{
			name:   "client gone",
			client: func(t *testing.T, conn net.Conn) { time.Sleep(time.Minute); conn.Close() },
			after:  time.Minute,
			cancel: true,
		},
		{
			name: "client gone after its answer",
			client: func(t *testing.T, conn net.Conn) {
				say(t, conn, thincli.OK)
				time.Sleep(time.Minute)
				conn.Close()
			},
			after:  time.Minute,
			cancel: true,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeAPI{task: tc.task, pauses: tc.pauses}
				start := time.Now()
				sent, exit := playExport(t, f, func(conn net.Conn) { tc.client(t, conn) })
				if took := time.Since(start); took != tc.after {
					t.Errorf("took %v, want %v", took, tc.after)
				}
				want := get(t)
				for _, m := range tc.sent {
					want = thincli.AppendMessage(want, m)
				}
				if !bytes.Equal(sent, want) {
					t.Errorf("sent\n%q, want\n%q", sent, want)
				}
				if wantExit := btoi(len(tc.sent) == 0 || tc.sent[len(tc.sent)-1] != thincli.Exit{}); exit != wantExit {
					t.Errorf("exit %d, want %d", exit, wantExit)
				}
				end := " task.destroy logout"
				if tc.cancel {
					end = " task.cancel" + end
				}
				if calls := strings.Join(f.calls, " "); !strings.HasSuffix(calls, "event.from"+end) {
					t.Errorf("calls %s, want …%s", calls, end)
				}
			})
		})
	}
}

func recordedGet(t *testing.T) []byte { return recorded(t, "export-get") }

// errorOf is how NOT_IMPLEMENTED is reported.
func errorOf(task xapi.Task) []thincli.Message {
	return []thincli.Message{
		thincli.PrintStderr{Text: sentence(task.ErrorInfo[0]) + "\n"},
		thincli.PrintStderr{Text: "function: " + task.ErrorInfo[1] + "\n"},
		thincli.Exit{Code: 1},
	}
}
