package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The size of the database of benchAPI: VMs of ten disks each, with a snapshot
// each.
const (
	apiVMs   = 1000
	apiDisks = 10
)

// benchAPI measures what concerns the objects and not their bytes: clones of
// a golden image, then a server with 1,000 VMs, 10,000 disks and 10,000
// snapshots of disks.
func benchAPI(ctx context.Context, cfg config, _ *server) (err error) {
	dir := filepath.Join(cfg.scratch, "api")
	srv, _, err := startAPI(ctx, cfg, dir)
	if err != nil {
		return err
	}
	running := true
	defer func() {
		if running {
			err = errors.Join(err, srv.stop())
		}
	}()
	fmt.Printf("\nObjects (JSON-RPC over loopback, the client on the same machine)\n")
	if err := cloneGolden(ctx, srv); err != nil {
		return fmt.Errorf("clones: %w", err)
	}
	if err := fillAPI(ctx, srv); err != nil {
		return fmt.Errorf("fill: %w", err)
	}
	running = false
	if err := srv.stop(); err != nil {
		return err
	}

	var starts []time.Duration
	for range 3 {
		var took time.Duration
		if srv, took, err = startAPI(ctx, cfg, dir); err != nil {
			return err
		}
		starts = append(starts, took)
		if err := srv.stop(); err != nil {
			return err
		}
	}
	row("start to first answer", median(starts).Round(time.Millisecond).String())
	if srv, _, err = startAPI(ctx, cfg, dir); err != nil {
		return err
	}
	running = true
	for _, step := range []func(context.Context, *server) error{
		dumpRecords, firstEvents, eventLatency, snapshotEight, crowd,
	} {
		if err := step(ctx, srv); err != nil {
			return err
		}
	}
	peak, err := srv.peakRSS()
	if err != nil {
		return err
	}
	row("memory of the server, at most", fmt.Sprintf("%d MiB", peak))
	return nil
}

func row(name, value string) { fmt.Printf("  %-56s %s\n", name, value) }

// startAPI starts a server on dir and says how long it took until it answered.
func startAPI(ctx context.Context, cfg config, dir string) (*server, time.Duration, error) {
	// Like an operator's, the file stays as it is from start to start.
	pw := filepath.Join(cfg.scratch, "password")
	if _, err := os.Stat(pw); err != nil {
		if err := os.WriteFile(pw, []byte(password+"\n"), 0o600); err != nil {
			return nil, 0, err
		}
	}
	const address = "127.0.0.1:18090"
	log, err := os.OpenFile(filepath.Join(cfg.scratch, "api.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, 0, err
	}
	defer log.Close()
	cmd := exec.Command(cfg.binary, "serve", "--data", dir, "--admin-password-file", pw, "--http", address, "--https", "off", "--nbd", "off")
	cmd.Stdout, cmd.Stderr = log, log
	s := &server{cmd: cmd, base: "http://" + address, client: &http.Client{
		Transport: &http.Transport{ReadBufferSize: 256 << 10, MaxIdleConnsPerHost: 600},
	}}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, 0, err
	}
	var alive any
	for s.call(ctx, &alive, "system.isAlive", "hello") != nil {
		if time.Since(begin) > 20*time.Second || ctx.Err() != nil {
			text, _ := os.ReadFile(log.Name())
			return nil, 0, errors.Join(fmt.Errorf("the server does not answer: %s", text), s.stop())
		}
		time.Sleep(time.Millisecond)
	}
	took := time.Since(begin)
	if err := s.login(ctx); err != nil {
		return nil, 0, errors.Join(err, s.stop())
	}
	return s, took, nil
}

// ref makes a call that returns a reference.
func (s *server) ref(ctx context.Context, method string, params ...any) (ref string, err error) {
	err = s.call(ctx, &ref, method, append([]any{s.session}, params...)...)
	return ref, err
}

// void makes a call that returns nothing.
func (s *server) void(ctx context.Context, method string, params ...any) error {
	_, err := s.ref(ctx, method, params...)
	return err
}

// newVM makes a VM with disks.
func (s *server) newVM(ctx context.Context, name string, disks int) (vm string, err error) {
	var templates []string
	if err := s.call(ctx, &templates, "VM.get_by_name_label", s.session, "Other install media"); err != nil {
		return "", err
	}
	if vm, err = s.ref(ctx, "VM.clone", templates[0], name); err != nil {
		return "", err
	}
	if err := s.void(ctx, "VM.provision", vm); err != nil {
		return "", err
	}
	for n := range disks {
		vdi, err := s.createVDI(ctx, gib)
		if err != nil {
			return "", err
		}
		if _, err := s.ref(ctx, "VBD.create", map[string]any{
			"VM": vm, "VDI": vdi, "userdevice": strconv.Itoa(n), "bootable": false, "mode": "RW", "type": "Disk", "empty": false,
			"other_config": map[string]string{}, "qos_algorithm_type": "", "qos_algorithm_params": map[string]string{},
		}); err != nil {
			return "", err
		}
	}
	return vm, nil
}

// destroyVM destroys a VM and the disks it has.
func (s *server) destroyVM(ctx context.Context, vm string) error {
	var vbds []string
	if err := s.call(ctx, &vbds, "VM.get_VBDs", s.session, vm); err != nil {
		return err
	}
	var vdis []string
	for _, b := range vbds {
		vdi, err := s.ref(ctx, "VBD.get_VDI", b)
		if err != nil {
			return err
		}
		vdis = append(vdis, vdi)
	}
	err := s.void(ctx, "VM.destroy", vm)
	for _, vdi := range vdis {
		err = errors.Join(err, s.destroyVDI(ctx, vdi))
	}
	return err
}

// parallel runs n jobs on so many workers and returns how long it took.
func parallel(workers, n int, job func(i int) error) (time.Duration, error) {
	var next atomic.Int64
	var mu sync.Mutex
	var errs error
	begin := time.Now()
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := job(i); err != nil {
					mu.Lock()
					errs = errors.Join(errs, err)
					mu.Unlock()
					return
				}
			}
		})
	}
	all.Wait()
	return time.Since(begin), errs
}

// cloneGolden clones a template with one disk a thousand times.
func cloneGolden(ctx context.Context, srv *server) error {
	golden, err := srv.newVM(ctx, "golden", 1)
	if err != nil {
		return err
	}
	if err := srv.void(ctx, "VM.set_is_a_template", golden, true); err != nil {
		return err
	}
	for _, workers := range []int{1, 16} {
		vms := make([]string, apiVMs)
		took, err := parallel(workers, len(vms), func(i int) (err error) {
			vms[i], err = srv.ref(ctx, "VM.clone", golden, "machine")
			return err
		})
		if err != nil {
			return err
		}
		row(fmt.Sprintf("%d VM.clone of a golden image, %d at a time", len(vms), workers), took.Round(time.Millisecond).String())
		if _, err := parallel(8, len(vms), func(i int) error { return srv.destroyVM(ctx, vms[i]) }); err != nil {
			return err
		}
	}
	return srv.destroyVM(ctx, golden)
}

// fillAPI makes the VMs, disks and snapshots of the big database.
func fillAPI(ctx context.Context, srv *server) error {
	first, err := srv.newVM(ctx, "vm", apiDisks)
	if err != nil {
		return err
	}
	took, err := parallel(8, apiVMs-1, func(int) error {
		_, err := srv.ref(ctx, "VM.clone", first, "vm")
		return err
	})
	if err != nil {
		return err
	}
	row(fmt.Sprintf("%d VM.clone of %d disks, 8 at a time", apiVMs-1, apiDisks), took.Round(time.Millisecond).String())
	var vms []string
	if err := srv.call(ctx, &vms, "VM.get_by_name_label", srv.session, "vm"); err != nil {
		return err
	}
	took, err = parallel(8, len(vms), func(i int) error {
		_, err := srv.ref(ctx, "VM.snapshot", vms[i], "snapshot")
		return err
	})
	row(fmt.Sprintf("%d VM.snapshot of %d disks, 8 at a time", len(vms), apiDisks), took.Round(time.Millisecond).String())
	return err
}

// dumpRecords reads all disks in both dialects.
func dumpRecords(ctx context.Context, srv *server) error {
	call, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": "VDI.get_all_records", "params": []string{srv.session}})
	if err != nil {
		return err
	}
	xml := `<?xml version="1.0"?><methodCall><methodName>VDI.get_all_records</methodName><params><param><value><string>` +
		srv.session + `</string></value></param></params></methodCall>`
	for _, d := range []struct{ name, path, kind, body string }{
		{"JSON-RPC", "/jsonrpc", "application/json", string(call)},
		{"XML-RPC", "/", "text/xml", xml},
	} {
		var times []time.Duration
		var size int64
		for range 5 {
			begin := time.Now()
			resp, err := srv.client.Post(srv.base+d.path, d.kind, strings.NewReader(d.body))
			if err != nil {
				return err
			}
			size, err = io.Copy(io.Discard, resp.Body)
			if err = errors.Join(err, resp.Body.Close()); err != nil {
				return err
			}
			times = append(times, time.Since(begin))
		}
		if size < 10<<20 {
			return fmt.Errorf("%s: only %d bytes", d.name, size)
		}
		took := median(times)
		row("VDI.get_all_records, "+d.name, fmt.Sprintf("%s, %.1f MB, %.0f MB/s", round(took), float64(size)/1e6, float64(size)/1e6/took.Seconds()))
	}
	return nil
}

// firstEvents asks for everything that is.
func firstEvents(ctx context.Context, srv *server) error {
	begin := time.Now()
	var batch struct {
		Events []json.RawMessage `json:"events"`
	}
	if err := srv.call(ctx, &batch, "event.from", srv.session, []string{"*"}, "", 30.0); err != nil {
		return err
	}
	row("event.from of everything, read and parsed by the client", fmt.Sprintf("%s, %d events", round(time.Since(begin)), len(batch.Events)))
	return nil
}

// eventLatency measures from the answer of a setter to the event of it at 200
// watchers, which share the processors with the server.
func eventLatency(ctx context.Context, srv *server) error {
	const watchers, rounds = 200, 50
	var pools []string
	if err := srv.call(ctx, &pools, "pool.get_all", srv.session); err != nil {
		return err
	}
	watching, stop := context.WithCancelCause(ctx)
	arrivals := make(chan arrival, watchers*(rounds+1))
	var all sync.WaitGroup
	for range watchers {
		w, err := srv.newWatcher(ctx)
		if err != nil {
			stop(err)
			break
		}
		all.Go(func() {
			if err := w.watch(arrivals); watching.Err() == nil {
				stop(err)
			}
		})
		context.AfterFunc(watching, w.close)
	}
	defer func() {
		stop(nil)
		all.Wait()
	}()
	if watching.Err() != nil {
		return context.Cause(watching)
	}
	var latencies []time.Duration
	hear := func(label string, n int, since time.Time) error {
		for n > 0 {
			select {
			case a := <-arrivals:
				if a.label == label {
					latencies = append(latencies, a.at.Sub(since))
					n--
				}
			case <-watching.Done():
				return context.Cause(watching)
			}
		}
		return nil
	}
	if err := hear(waiting, watchers, time.Now()); err != nil {
		return err
	}
	latencies = nil
	before, err := cpuTime(srv.cmd.Process.Pid)
	if err != nil {
		return err
	}
	for i := range rounds {
		label := "round " + strconv.Itoa(i)
		begin := time.Now()
		if err := srv.void(ctx, "pool.set_name_label", pools[0], label); err != nil {
			return err
		}
		if err := hear(label, watchers, begin); err != nil {
			return err
		}
	}
	after, err := cpuTime(srv.cmd.Process.Pid)
	if err != nil {
		return err
	}
	slices.Sort(latencies)
	row(fmt.Sprintf("call to event at %d watchers, median and 99th percentile", watchers),
		fmt.Sprintf("%s, %s", round(latencies[len(latencies)/2]), round(latencies[len(latencies)*99/100])))
	row("processor time of the server for each of them", ((after - before) / time.Duration(len(latencies))).Round(time.Microsecond).String())
	return nil
}

// arrival is an event that one watcher has received.
type arrival struct {
	label string
	at    time.Time
}

// watcher is a client on a connection of its own. It does as little as a client
// can, because it takes the time that it needs from the server that is measured:
// it looks for the two texts that it wants in what it reads.
type watcher struct {
	conn    net.Conn
	in      *bufio.Reader
	session string
}

func (s *server) newWatcher(ctx context.Context) (*watcher, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(s.base, "http://"))
	if err != nil {
		return nil, err
	}
	return &watcher{conn, bufio.NewReaderSize(conn, 16<<10), s.session}, nil
}

func (w *watcher) close() { _ = w.conn.Close() }

// waiting is what a watcher sends before it begins to wait.
const waiting = "waiting"

// watch sends the name_label of the pool, whenever it changes, until the
// connection is closed.
func (w *watcher) watch(to chan<- arrival) error {
	token := ""
	for first := true; ; first = false {
		body, at, err := w.ask(token)
		if err != nil {
			return err
		}
		var found bool
		if token, found = member(body, "token"); !found {
			return fmt.Errorf("no token in %.300q", body)
		}
		if first {
			to <- arrival{waiting, at}
		} else if label, found := member(body, "name_label"); found {
			to <- arrival{label, at}
		}
	}
}

// ask makes a call of event.from and says when its answer was complete.
func (w *watcher) ask(token string) (body []byte, at time.Time, err error) {
	call := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"event.from","params":[%q,["pool"],%q,30.0]}`, w.session, token)
	if _, err := fmt.Fprintf(w.conn, "POST /jsonrpc HTTP/1.1\r\nHost: coppice\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		len(call), call); err != nil {
		return nil, at, err
	}
	resp, err := http.ReadResponse(w.in, nil)
	if err != nil {
		return nil, at, err
	}
	body, err = io.ReadAll(resp.Body)
	return body, time.Now(), errors.Join(err, resp.Body.Close())
}

// member finds the last member of a name in JSON. Its text has no escapes.
func member(body []byte, name string) (text string, found bool) {
	key := []byte(`"` + name + `":"`)
	i := bytes.LastIndex(body, key)
	if i < 0 {
		return "", false
	}
	value, _, found := bytes.Cut(body[i+len(key):], []byte(`"`))
	return string(value), found
}

// snapshotEight takes snapshots of a VM of eight disks.
func snapshotEight(ctx context.Context, srv *server) error {
	vm, err := srv.newVM(ctx, "eight", 8)
	if err != nil {
		return err
	}
	var times []time.Duration
	for range 50 {
		begin := time.Now()
		snap, err := srv.ref(ctx, "VM.snapshot", vm, "s")
		if err != nil {
			return err
		}
		times = append(times, time.Since(begin))
		if err := srv.destroyVM(ctx, snap); err != nil {
			return err
		}
	}
	slices.Sort(times)
	row("VM.snapshot of 8 disks, median and 90th percentile", fmt.Sprintf("%s, %s", round(median(times)), round(times[len(times)*9/10])))
	return srv.destroyVM(ctx, vm)
}

// crowd has 500 clients make, change, snapshot and destroy disks, and watch,
// for a while. None of them may see an error.
func crowd(ctx context.Context, srv *server) error {
	const clients, runs = 500, 4
	var calls atomic.Int64
	took, err := parallel(clients, clients*runs, func(int) error {
		vdi, err := srv.createVDI(ctx, gib)
		if err != nil {
			return err
		}
		if err := srv.void(ctx, "VDI.set_name_label", vdi, "crowd"); err != nil {
			return err
		}
		snap, err := srv.snapshotVDI(ctx, vdi)
		if err != nil {
			return err
		}
		var rec map[string]any
		if err := srv.call(ctx, &rec, "VDI.get_record", srv.session, snap); err != nil {
			return err
		}
		calls.Add(6)
		return errors.Join(srv.destroyVDI(ctx, snap), srv.destroyVDI(ctx, vdi))
	})
	if err != nil {
		return fmt.Errorf("%d clients: %w", clients, err)
	}
	row(fmt.Sprintf("%d clients, %d calls, no error", clients, calls.Load()), fmt.Sprintf("%s, %.0f calls/s",
		took.Round(time.Millisecond), float64(calls.Load())/took.Seconds()))
	return nil
}
