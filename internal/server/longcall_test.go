package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"coppice/internal/rpc"
)

// gauge counts bodies that are being read beyond what is read of every call.
type gauge struct{ now, most atomic.Int32 }

func (g *gauge) enter() {
	n := g.now.Add(1)
	for most := g.most.Load(); n > most && !g.most.CompareAndSwap(most, n); most = g.most.Load() {
	}
}

// measuredBody is a body that the gauge counts from the first byte that only
// long calls are read for until its end. It waits there for the gate, if it has one.
type measuredBody struct {
	r       io.Reader
	n       int
	gauge   *gauge
	reached chan<- struct{} // closed when it waits
	gate    <-chan struct{}
	entered bool
}

func (b *measuredBody) Read(p []byte) (int, error) {
	if b.n > shortCall && !b.entered {
		b.entered = true
		b.gauge.enter()
		if b.gate != nil {
			close(b.reached)
			<-b.gate
		}
	}
	n, err := b.r.Read(p)
	if b.n += n; err == io.EOF && b.entered {
		b.gauge.now.Add(-1)
	}
	return n, err
}

// answer calls a method with a parameter of a length more than those given,
// past the network.
func (f *fixture) answer(t *testing.T, d rpc.Dialect, gauge *gauge, long int, reached chan<- struct{}, gate <-chan struct{}, method string, params ...any) (any, error) {
	t.Helper()
	var text bytes.Buffer
	if err := rpc.WriteCall(&text, d, 1, method, append(params, strings.Repeat("x", long))...); err != nil {
		t.Error(err)
	}
	path := "/jsonrpc"
	if d == rpc.XMLRPC {
		path = "/"
	}
	r := httptest.NewRequest(http.MethodPost, path, &measuredBody{r: &text, gauge: gauge, reached: reached, gate: gate})
	w := httptest.NewRecorder()
	f.ServeHTTP(w, r)
	return rpc.ReadResponse(d, w.Body, 16<<20)
}

// All long calls are answered, and only so many are read at a time.
func TestLongCalls(t *testing.T) {
	f := start(t, time.Minute)
	session := f.login(t)
	for name, tt := range map[string]struct {
		session string
		most    int32
		want    string // of a failure
	}{
		"with a session":    {session, acquaintedAtOnce, ""},
		"without a session": {"OpaqueRef:6e2f6f0e-5f0a-4f3e-8a56-8ad3c2a1a001", strangersAtOnce, "SESSION_INVALID"},
	} {
		var g gauge
		var all sync.WaitGroup
		for i := range 24 {
			all.Go(func() {
				v, err := f.answer(t, rpc.Dialect(i%3), &g, 3*shortCall, nil, nil, "VDI.get_by_name_label", tt.session)
				e, _ := err.(*rpc.Fault)
				if list, ok := v.([]any); tt.want == "" && (err != nil || !ok || len(list) != 0) || tt.want != "" && (e == nil || e.Code != tt.want) {
					t.Errorf("%s: %v, %v, want %q", name, v, err, tt.want)
				}
			})
		}
		all.Wait()
		if most := g.most.Load(); most == 0 || most > tt.most {
			t.Errorf("%s: %d at a time, want up to %d", name, most, tt.most)
		}
	}
}

// A stranger who sends slowly keeps nobody waiting who has a session, or says
// little; other strangers wait, but not when the server stops.
func TestLongCallOfAStranger(t *testing.T) {
	f := start(t, time.Minute)
	session := f.login(t)
	var g gauge
	reached, gate := make(chan struct{}), make(chan struct{})
	var all sync.WaitGroup
	stranger := func(reached chan<- struct{}, gate <-chan struct{}) {
		all.Go(func() {
			_, err := f.answer(t, rpc.JSONRPC2, &g, 2*shortCall, reached, gate, "session.login_with_password", "nobody")
			if e, ok := err.(*rpc.Fault); !ok || e.Code != "SESSION_AUTHENTICATION_FAILED" {
				t.Errorf("a stranger: %v", err)
			}
		})
	}
	stranger(reached, gate)
	<-reached
	stranger(nil, nil)
	for _, d := range []rpc.Dialect{rpc.XMLRPC, rpc.JSONRPC1} {
		if _, err := f.answer(t, d, new(gauge), 3*shortCall, nil, nil, "VDI.get_by_name_label", session); err != nil {
			t.Errorf("a long call beside a stranger's: %v", err)
		}
	}
	f.login(t)
	close(gate)
	all.Wait()
	if most := g.most.Load(); most != strangersAtOnce {
		t.Errorf("%d long calls of strangers at a time", most)
	}

	reached, gate = make(chan struct{}), make(chan struct{})
	all.Go(func() { _, _ = f.answer(t, rpc.JSONRPC2, &g, 2*shortCall, reached, gate, "session.logout") })
	<-reached
	waiting := make(chan error, 1)
	go func() {
		_, err := f.answer(t, rpc.JSONRPC2, &g, 2*shortCall, nil, nil, "session.logout")
		waiting <- err
	}()
	f.stop()
	select {
	case err := <-waiting:
		if err == nil {
			t.Error("the call of a stranger that waited when the server stopped was carried out")
		}
	case <-time.After(patience):
		t.Error("a stranger waits although the server stops")
	}
	close(gate)
	all.Wait()
}

// A call with too many values is answered with what is possible.
func TestTooManyValues(t *testing.T) {
	f := start(t, time.Minute)
	const want = "VALUE_NOT_SUPPORTED(parameters, more than 100000 values, " +
		"Each parameter, element of a set and entry of a map is a value: divide them among several calls.)"
	for i, in := range []string{
		"<methodCall><methodName>x</methodName><params><param><value><array><data>" + strings.Repeat("<value/>", rpc.MaxValues) +
			"</data></array></value></param></params></methodCall>",
		`{"method":"x","id":1,"params":[` + strings.Repeat("[],", rpc.MaxValues) + "0]}",
		`{"jsonrpc":"2.0","method":"x","id":1,"params":[` + strings.Repeat("[],", rpc.MaxValues) + "0]}",
	} {
		w := httptest.NewRecorder()
		f.ServeHTTP(w, httptest.NewRequest(http.MethodPost, []string{"/", "/jsonrpc", "/jsonrpc"}[i], strings.NewReader(in)))
		if _, err := rpc.ReadResponse(rpc.Dialect(i), w.Body, 1<<20); w.Code != http.StatusOK || fmt.Sprint(err) != want {
			t.Errorf("dialect %d: status %d, %v\nwant %s", i, w.Code, err, want)
		}
	}
}

// Only so many wait for a turn, and not for ever.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := newTurns(1)
		end, err := turns.take(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for range waitingAtMost {
			all.Go(func() {
				if _, err := turns.take(t.Context()); err != errManyCalls {
					t.Errorf("who has waited for long: %v", err)
				}
			})
		}
		synctest.Wait()
		began := time.Now()
		if _, err := turns.take(t.Context()); err != errManyCalls || time.Since(began) != 0 {
			t.Errorf("one who comes when too many wait: %v after %v", err, time.Since(began))
		}
		all.Wait()
		if waited := time.Since(began); waited != bodyTimeout {
			t.Errorf("they have waited %v", waited)
		}
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := turns.take(gone); err != context.Canceled {
			t.Errorf("who has gone: %v", err)
		}
		end()
		if end, err = turns.take(t.Context()); err != nil {
			t.Errorf("when it is free again: %v", err)
		} else {
			end()
		}
	})
}

// deadlines is a response that notes until when it can be written.
type deadlines struct {
	*httptest.ResponseRecorder
	until time.Time
}

func (d *deadlines) SetWriteDeadline(t time.Time) error {
	d.until = t
	return nil
}

// A client that has to take an answer by some time gets no more for taking some of it.
func TestAnswerInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &deadlines{ResponseRecorder: httptest.NewRecorder()}
		last := time.Now().Add(writeTimeout + time.Second)
		w := &reply{ResponseWriter: d, last: last}
		for _, want := range []time.Time{time.Now().Add(writeTimeout), last} {
			if _, err := w.Write([]byte("x")); err != nil || !d.until.Equal(want) {
				t.Errorf("until %v, want %v (%v)", d.until, want, err)
			}
			time.Sleep(2 * time.Second)
		}
	})
}

// What a client is told has no more of what it has sent than says what is meant.
func TestBadTextComesBackShort(t *testing.T) {
	f := start(t, time.Minute)
	w := httptest.NewRecorder()
	f.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/jsonrpc", strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"a","params":["`+strings.Repeat("\xff", 1<<20)+`"]}`)))
	if n := w.Body.Len(); w.Code != http.StatusOK || n > 16*badTextShown {
		t.Errorf("status %d, %d bytes", w.Code, n)
	}
}
