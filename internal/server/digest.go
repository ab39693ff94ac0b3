package server

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"hash"
	"io"
	"net/http"
	"net/textproto"
	"strings"
)

// hashed computes the SHA-256 of what goes through it, beside sending it.
type hashed struct {
	w    io.Writer
	h    hash.Hash
	work chan []byte
	done chan struct{}
}

// hashBeside is from how many bytes on a goroutine of its own does the work.
const hashBeside = 32 << 10

// newHashed returns a hashed writer; sum must be called once in the end.
func newHashed(w io.Writer) *hashed {
	d := &hashed{w: w, h: sha256.New(), work: make(chan []byte), done: make(chan struct{})}
	go func() {
		defer close(d.done)
		for p := range d.work {
			d.h.Write(p)
			d.done <- struct{}{}
		}
	}()
	return d
}

func (d *hashed) Write(p []byte) (int, error) {
	if len(p) < hashBeside {
		d.h.Write(p)
		return d.w.Write(p)
	}
	d.work <- p
	n, err := d.w.Write(p)
	<-d.done
	return n, err
}

func (d *hashed) sum() []byte {
	close(d.work)
	<-d.done
	return d.h.Sum(nil)
}

// sha256Key is the key in the other_config of a task under which the SHA-256
// of the body that was sent appears.
const sha256Key = "coppice:sha256"

func sumText(sum []byte) string { return hex.EncodeToString(sum) }

// digestTrailer is the trailer with the hash of a body, nothing for none.
func digestTrailer(sum []byte) string {
	if sum == nil {
		return ""
	}
	return "Content-Digest: sha-256=:" + base64.StdEncoding.EncodeToString(sum) + ":\r\n"
}

// wantsDigest tells whether a client may be interested in the SHA-256 of a
// body. It costs more than all else about an export, so one that has a use for
// the speed can decline it: Want-Content-Digest with sha-256=0, as RFC 9530
// (section 4) says.
func wantsDigest(h http.Header) bool {
	for _, line := range h.Values("Want-Content-Digest") {
		for item := range strings.SplitSeq(line, ",") {
			if key, value, _ := strings.Cut(textproto.TrimString(item), "="); key == "sha-256" && value == "0" {
				return false
			}
		}
	}
	return true
}
