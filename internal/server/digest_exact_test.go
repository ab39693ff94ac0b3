package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"sync"
	"testing"
)

// Digests are those of the bytes that were sent, and never of what a disk held
// before: after writes, a resize and a revert, of deltas, and of a disk that is
// being written.
func TestDigestsOfWhatWasSent(t *testing.T) {
	d := newDepot(t)
	ref, _ := d.filled(random(4*mib, 1, [2]int64{0, 3 * mib}))
	base := d.do("VDI.snapshot", d.session, ref).(string)

	// fetch downloads, compares all digests with the body, and returns it.
	fetch := func(format, base string, headers ...string) []byte {
		t.Helper()
		args := []string{"vdi", ref, "format", format, "task_id", d.task()}
		if base != "" {
			args = append(args, "base", base)
		}
		resp := d.fetch("GET", d.url("/export_raw_vdi", args...), headers...)
		body := readBody(t, resp)
		if o := d.settled(args[5]); o[0] != "success" {
			t.Fatalf("%s: task says %q", format, o)
		}
		sum := sha256.Sum256(body)
		config := d.do("task.get_other_config", d.session, args[5]).(map[string]any)
		if config[sha256Key] != hex.EncodeToString(sum[:]) {
			t.Errorf("%s, base %q: the task says %v, sent was %x", format, base, config[sha256Key], sum)
		}
		field := "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
		if got := resp.Header.Get("Repr-Digest"); got != "" && got != field {
			t.Errorf("%s, base %q: Repr-Digest %s, sent was %s", format, base, got, field)
		}
		chunked := len(resp.TransferEncoding) > 0
		if got := resp.Trailer.Get("Content-Digest"); got != field && (chunked || got != "") {
			t.Errorf("%s, base %q: trailer %q, sent was %s", format, base, got, field)
		}
		return body
	}
	all := func() map[string][]byte {
		t.Helper()
		bodies := map[string][]byte{}
		for range 2 { // computed, and remembered
			for _, format := range []string{"raw", "vhd", "qcow2", "tar", "vmdk"} {
				bodies[format] = fetch(format, "")
			}
			for _, format := range []string{"raw", "vhd", "qcow2"} {
				bodies[format+" delta"] = fetch(format, base)
			}
			bodies["zstd"] = fetch("raw", "", "Accept-Encoding", "zstd")
		}
		return bodies
	}
	before := all()
	differ := func(what string, now map[string][]byte, names ...string) {
		t.Helper()
		for _, name := range names {
			if bytes.Equal(before[name], now[name]) {
				t.Errorf("%s: %s is what it was", what, name)
			}
		}
		before = now
	}
	d.upload(ref, "raw", []byte("changed"))
	differ("a write", all(), "raw", "vhd", "qcow2", "raw delta", "vhd delta", "qcow2 delta", "zstd")
	d.do("VDI.resize", d.session, ref, int64(6*mib))
	differ("a resize", all(), "raw", "vhd", "qcow2", "vhd delta")
	d.do("VDI.revert", d.session, base)
	differ("a revert", all(), "raw", "vhd", "qcow2", "raw delta", "vhd delta", "qcow2 delta")

	// Writes go on during exports: each one is of an instant.
	var writer sync.WaitGroup
	stop := make(chan struct{})
	writer.Go(func() {
		for n := byte(0); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			task, err := d.call("task.create", d.session, "writer", "")
			if err != nil {
				t.Error(err)
				return
			}
			// Whether it comes through, or in the way of another, is all the same.
			d.put(d.url("/import_raw_vdi", "task_id", task.(string), "vdi", ref, "format", "raw")+" HTTP/1.0",
				[]string{"Content-length: 1048576"}, string(bytes.Repeat([]byte{n}, mib)), true)
		}
	})
	all()
	close(stop)
	writer.Wait()
}
