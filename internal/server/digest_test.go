package server

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"net/http"
	"slices"
	"testing"
)

func TestHashed(t *testing.T) {
	var parts [][]byte
	for _, n := range []int{0, 1, hashBeside - 1, hashBeside, 3, 5 * hashBeside} {
		parts = append(parts, random(int64(n), byte(n), [2]int64{0, int64(n)}))
	}
	var out bytes.Buffer
	h := newHashed(&out)
	for _, p := range parts {
		if _, err := h.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	want := slices.Concat(parts...)
	if sum := sha256.Sum256(want); !bytes.Equal(h.sum(), sum[:]) || !bytes.Equal(out.Bytes(), want) {
		t.Error("wrong hash, or not what was written")
	}
	h = newHashed(writerFunc(func([]byte) (int, error) { return 0, errTest }))
	if _, err := h.Write(make([]byte, 2*hashBeside)); !errors.Is(err, errTest) {
		t.Errorf("error %v", err)
	}
	h.sum()
}

func TestWantsDigest(t *testing.T) {
	for value, want := range map[string]bool{
		"": true, "sha-256=0": false, "sha-256=1": true, "sha-512=0": true, "sha-512=3, sha-256=0": false, "sha-256": true, "sha-256=10": true, "=,=0,": true,
	} {
		if got := wantsDigest(http.Header{"Want-Content-Digest": {value}}); got != want {
			t.Errorf("%q: %v, want %v", value, got, want)
		}
	}
}

// A client that declines the digest gets the same bytes, and nobody is told
// their hash.
func TestDigestDeclined(t *testing.T) {
	d := newDepot(t)
	ref, _ := d.filled(random(4*mib, 1, [2]int64{0, 2 * mib}))
	for _, accept := range []string{"identity", "zstd"} {
		export := func(headers ...string) (body []byte, trailer http.Header, config map[string]any) {
			task := d.task()
			resp := d.fetch("GET", d.url("/export_raw_vdi", "vdi", ref, "task_id", task), append(headers, "Accept-Encoding", accept)...)
			body = readBody(t, resp)
			if o := d.settled(task); o[0] != "success" {
				t.Errorf("task says %q", o)
			}
			return body, resp.Trailer, d.do("task.get_other_config", d.session, task).(map[string]any)
		}
		want, _, _ := export()
		got, trailer, config := export("Want-Content-Digest", "sha-256=0")
		if !bytes.Equal(got, want) {
			t.Errorf("%s: other bytes without a digest", accept)
		}
		if sum, ok := config[sha256Key]; ok || len(trailer) > 0 {
			t.Errorf("%s: the task says %v, the trailer %v, want neither", accept, sum, trailer)
		}
	}
}
