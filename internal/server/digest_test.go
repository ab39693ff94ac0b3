package server

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
)

func TestHashed(t *testing.T) {
	var parts [][]byte
	for _, n := range []int{0, 1, hashCopied, hashCopied + 1, 3, 5 * hashCopied} {
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
	if _, err := h.Write(make([]byte, 2*hashCopied)); !errors.Is(err, errTest) {
		t.Errorf("error %v", err)
	}
	h.sum()
}

// What is lent may be changed as soon as it is given back, and what is not lent
// as soon as it is written.
func TestHashedLent(t *testing.T) {
	var out, want bytes.Buffer
	h := newHashed(&out)
	released := 0 // before sum returns, by the goroutine that hashes
	const writes = 3 * hashQueue
	for i := range writes {
		n := int64([]int{5, hashCopied, hashCopied + 1, 4 * hashCopied}[i%4])
		p := random(n, byte(i), [2]int64{0, n})
		want.Write(p)
		write := func() error { _, err := h.Write(p); return err }
		if i%3 == 0 {
			if err := write(); err != nil {
				t.Fatal(err)
			}
			clear(p)
			continue
		}
		if err := h.lend(write, func() { released++; clear(p) }); err != nil {
			t.Fatal(err)
		}
	}
	sum := sha256.Sum256(want.Bytes())
	if got := h.sum(); !bytes.Equal(got, sum[:]) || !bytes.Equal(out.Bytes(), want.Bytes()) {
		t.Error("wrong hash, or not what was written")
	}
	if released != writes*2/3 {
		t.Errorf("%d of %d buffers given back", released, writes*2/3)
	}
}

// A buffer that is lent has been sent when it is not hashed yet, and is given
// back once that has happened, whether it could be sent or not.
func TestHashedBehind(t *testing.T) {
	for _, fails := range []error{nil, errTest} {
		h := newHashed(writerFunc(func(p []byte) (int, error) { return len(p), fails }))
		gate, released := make(chan struct{}), make(chan struct{})
		h.work <- hashing{then: func() { <-gate }}
		err := h.lend(func() error { _, err := h.Write(make([]byte, 2*hashCopied)); return err }, func() { close(released) })
		if err != fails {
			t.Errorf("error %v, want %v", err, fails)
		}
		select {
		case <-released:
			t.Error("given back before it is hashed")
		default:
		}
		close(gate)
		<-released
		h.sum()
	}
}

func TestWantsDigest(t *testing.T) {
	for value, want := range map[string][2]bool{ // when nobody would see it, and when somebody does
		"": {false, true}, "sha-256=0": {}, "sha-256=1": {true, true}, "sha-512=0": {false, true}, "sha-512=3, sha-256=0": {},
		"sha-256": {false, true}, "sha-256=10": {true, true}, "sha-256=11": {false, true}, "sha-256=-1": {false, true}, "=,=0,": {false, true},
		"sha-256=0,sha-256=2": {true, true},
	} {
		for i, seen := range []bool{false, true} {
			for _, field := range []string{"Want-Content-Digest", "Want-Repr-Digest"} {
				if got := wantsDigest(http.Header{field: {value}}, seen); got != want[i] {
					t.Errorf("%s: %q, seen %v: %v, want %v", field, value, seen, got, want[i])
				}
			}
		}
	}
}

func TestDigests(t *testing.T) {
	var d digests
	tag := func(i int) string { return fmt.Sprintf(`"%d"`, i) }
	for i := range maxDigests {
		d.put(tag(i), []byte{byte(i), byte(i >> 8)})
	}
	if got := d.get(tag(0)); !bytes.Equal(got, []byte{0, 0}) {
		t.Fatalf("the first one is %x", got)
	}
	d.put(tag(2), []byte{2}) // known already
	d.put("new", nil)
	for i, known := range map[int]bool{0: true, 1: false, 2: true, 3: true, maxDigests - 1: true, maxDigests: false} {
		if got := d.get(tag(i)); (got != nil) != known {
			t.Errorf("%d: %x, want it to be known: %v", i, got, known)
		}
	}
	if n := d.mu.order.Len(); n != maxDigests || n != len(d.mu.byTag) {
		t.Errorf("%d digests in order, %d by tag, want %d", n, len(d.mu.byTag), maxDigests)
	}
}

// The digest of a body is computed for those who see it, and known from then
// on: to whoever gets the same bytes, or a part of them.
func TestDigestRemembered(t *testing.T) {
	d := newYard(t)
	ref := d.disks[0]
	for name, target := range map[string]string{
		"raw": d.url("/export_raw_vdi", "vdi", ref), "vhd": d.url("/export_raw_vdi", "vdi", ref, "format", "vhd"),
		"xva": d.url("/export", "ref", d.vm),
	} {
		t.Run(name, func(t *testing.T) {
			fetch := func(task string, headers ...string) (body []byte, repr string, noted any) {
				t.Helper()
				at := target
				if task != "" {
					at += "&task_id=" + task
				}
				resp := d.fetch("GET", at, headers...)
				body = readBody(t, resp)
				if task = resp.Header.Get("task-id"); d.settled(task)[0] != "success" {
					t.Errorf("task says %q", d.settled(task))
				}
				config := d.do("task.get_other_config", d.session, task).(map[string]any)
				return body, resp.Header.Get("Repr-Digest"), config[sha256Key]
			}
			body, repr, noted := fetch("")
			if repr != "" || noted != nil {
				t.Errorf("Repr-Digest %q, the task says %v: nobody has asked", repr, noted)
			}
			hash := sha256.Sum256(body)
			field, text := strings.TrimPrefix(digestField("", hash[:]), ": "), sumText(hash[:])
			if _, repr, noted = fetch("", "Want-Content-Digest", "sha-256=3"); repr != "" || noted != text {
				t.Errorf("Repr-Digest %q, the task says %v, want %s", repr, noted, text)
			}
			for range 2 {
				if again, repr, noted := fetch(d.task()); repr != field || noted != text || !bytes.Equal(again, body) {
					t.Errorf("again: Repr-Digest %q, the task says %v, want %s and %s", repr, noted, field, text)
				}
			}
			part, repr, noted := fetch(d.task(), "Range", "bytes=1000-99999")
			if sum := sha256.Sum256(part); repr != field || noted != sumText(sum[:]) || len(part) != 99000 {
				t.Errorf("%d bytes of it: Repr-Digest %q, the task says %v, want %s and %x", len(part), repr, noted, field, sum)
			}
			if repr := d.fetch("HEAD", target).Header.Get("Repr-Digest"); repr != field {
				t.Errorf("HEAD: Repr-Digest %q, want %s", repr, field)
			}
		})
	}
	d.upload(ref, "raw", []byte("changed"))
	target := d.url("/export_raw_vdi", "vdi", ref)
	if repr := d.fetch("HEAD", target).Header.Get("Repr-Digest"); repr != "" {
		t.Errorf("a disk that was written has the digest %q", repr)
	}
	if part := d.fetch("GET", target+"&task_id="+d.task(), "Range", "bytes=0-99"); len(readBody(t, part)) != 100 {
		t.Error("not the first 100 bytes")
	}
	if repr := d.fetch("HEAD", target).Header.Get("Repr-Digest"); repr != "" {
		t.Errorf("the digest of a part is that of the whole: %q", repr)
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
