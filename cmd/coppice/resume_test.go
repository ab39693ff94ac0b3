package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// world is a server that is killed and started again on the same data.
type world struct {
	*testing.T
	*process
	data, password string
	session        string
}

func (w *world) restart() {
	w.Helper()
	if w.process != nil {
		if err := w.cmd.Process.Signal(syscall.SIGKILL); err != nil {
			w.Fatal(err)
		}
		_ = w.cmd.Wait()
	}
	w.process = startProcess(w.T, w.data, "--admin-password-file", w.password)
	w.session = w.login(w.T)
}

func (w *world) do(method string, params ...any) any {
	w.Helper()
	v, err := w.call(method, append([]any{w.session}, params...)...)
	if err != nil {
		w.Fatalf("%s: %v", method, err)
	}
	return v
}

func (w *world) disk(size int) string {
	w.Helper()
	var sr any
	for _, r := range w.do("pool.get_all_records").(map[string]any) {
		sr = r.(map[string]any)["default_SR"]
	}
	return w.do("VDI.create", map[string]any{
		"SR": sr, "virtual_size": size, "type": "user", "sharable": false, "read_only": false, "other_config": map[string]any{}, "name_label": "disk",
	}).(string)
}

// put sends a body, at most limit bytes of it, and returns how its task ended.
func (w *world) put(vdi string, body []byte, limit int, more string) string {
	w.Helper()
	task := w.do("task.create", "upload", "").(string)
	src := io.MultiReader(bytes.NewReader(body[:limit]), &breaking{})
	if limit == len(body) {
		src = bytes.NewReader(body)
	}
	url := fmt.Sprintf("%s/import_raw_vdi?session_id=%s&task_id=%s&vdi=%s%s", w.url, w.session, task, vdi, more)
	req, err := http.NewRequestWithContext(w.Context(), http.MethodPut, url, src)
	if err != nil {
		w.Fatal(err)
	}
	req.ContentLength = int64(len(body))
	if resp, err := http.DefaultClient.Do(req); err == nil {
		_, _ = io.Copy(io.Discard, resp.Body) // what became of it the task says
		resp.Body.Close()
	}
	for token := ""; ; {
		if status := w.do("task.get_status", task).(string); status != "pending" {
			return status
		}
		batch := w.do("event.from", []string{"task/" + task}, token, 30.0).(map[string]any)
		token = batch["token"].(string)
	}
}

// breaking is a client that dies.
type breaking struct{}

func (breaking) Read([]byte) (int, error) { return 0, errors.New("the client is gone") }

// get reads at most limit bytes of an export from an offset on, and cuts the
// connection; tag is that of what is had already.
func (w *world) get(query string, from, limit int, tag string) (part []byte, length int, newTag string) {
	w.Helper()
	req, err := http.NewRequestWithContext(w.Context(), http.MethodGet, w.url+"/export_raw_vdi?session_id="+w.session+query, nil)
	if err != nil {
		w.Fatal(err)
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	if tag != "" {
		req.Header.Set("If-Range", tag)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		w.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent {
		w.Fatalf("%s from %d on: %s", query, from, resp.Status)
	}
	part, err = io.ReadAll(io.LimitReader(resp.Body, int64(limit)))
	if err != nil {
		w.Fatal(err)
	}
	return part, from + int(resp.ContentLength), resp.Header.Get("ETag")
}

// TestResume: downloads and uploads that are cut at any point, by a client that
// dies or a server that is killed, go on to the same bytes.
func TestResume(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	w := &world{T: t, data: filepath.Join(t.TempDir(), "data"), password: writePassword(t)}
	w.restart()

	const size = 24 << 20
	contents := make([]byte, size)
	noise := rand.NewChaCha8([32]byte{1})
	for _, r := range [][2]int{{0, 5 << 20}, {9<<20 + 4096, 300 << 10}, {20 << 20, 4 << 20}} {
		_, _ = noise.Read(contents[r[0] : r[0]+r[1]])
	}
	vdi := w.disk(size)
	for sent := 0; ; {
		resp, err := http.Head(fmt.Sprintf("%s/import_raw_vdi?session_id=%s&vdi=%s", w.url, w.session, vdi))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		at, err := strconv.Atoi(resp.Header.Get("Upload-Offset"))
		if err != nil || at < sent {
			t.Fatalf("the server has %s bytes, had %d", resp.Header.Get("Upload-Offset"), sent)
		}
		sent = at
		rest := contents[at:]
		limit := min(len(rest), 1+rng.IntN(size/3))
		status := w.put(vdi, rest, limit, "&coppice-offset="+strconv.Itoa(at))
		if limit == len(rest) {
			if status != "success" {
				t.Fatalf("the last part: task is %s", status)
			}
			break
		}
		w.restart()
	}

	base := w.do("VDI.snapshot", vdi).(string)
	copy(contents[21<<20:], "changed")
	clear(contents[1<<20 : 2<<20])
	if status := w.put(vdi, contents, size, ""); status != "success" {
		t.Fatalf("import: task is %s", status)
	}
	snapshot := w.do("VDI.snapshot", vdi).(string)

	for _, query := range []string{
		"&format=raw&vdi=" + snapshot, "&format=vhd&vdi=" + snapshot, "&format=qcow2&vdi=" + snapshot, "&format=tar&vdi=" + snapshot,
		"&format=vhd&vdi=" + snapshot + "&base=" + base, "&format=qcow2&vdi=" + snapshot + "&base=" + base, "&format=vhd&vdi=" + vdi,
	} {
		want, length, tag := w.get(query, 0, 1<<30, "")
		if len(want) != length {
			t.Fatalf("%s: %d bytes of %d", query, len(want), length)
		}
		var got []byte
		for len(got) < length {
			part, total, again := w.get(query, len(got), 1+rng.IntN(length), tag)
			if total != length || again != tag {
				t.Fatalf("%s: %d bytes with tag %s, before %d with %s", query, total, again, length, tag)
			}
			if got = append(got, part...); rng.IntN(2) == 0 {
				w.restart()
			}
		}
		if sha256.Sum256(got) != sha256.Sum256(want) {
			t.Errorf("%s: another file", query)
		}
		if query == "&format=raw&vdi="+snapshot && !bytes.Equal(got, contents) {
			t.Error("the disk is not what was uploaded")
		}
	}
}
