package server

import (
	"bytes"
	"container/list"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"hash"
	"io"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"sync"
)

// hashed computes the SHA-256 of what goes through it, in a goroutine of its
// own, beside sending it. What is lent to it may be hashed behind its sending,
// so that neither waits for the other at each buffer. It is used by one
// goroutine.
type hashed struct {
	w    io.Writer
	h    hash.Hash
	work chan hashing
	done chan struct{}
	lent bool // what is written now stays as it is until it is given back
}

// hashing is bytes to be hashed, and what to call when that is done.
type hashing struct {
	p    []byte
	then func()
}

const (
	// hashCopied is up to how many bytes a write is copied for its hash.
	hashCopied = 32 << 10
	// hashQueue is how many writes may wait for their hash.
	hashQueue = 32
)

// newHashed returns a hashed writer; sum must be called once in the end.
func newHashed(w io.Writer) *hashed {
	d := &hashed{w: w, h: sha256.New(), work: make(chan hashing, hashQueue), done: make(chan struct{})}
	go func() {
		defer close(d.done)
		for j := range d.work {
			d.h.Write(j.p)
			if j.then != nil {
				j.then()
			}
		}
	}()
	return d
}

func (d *hashed) Write(p []byte) (int, error) {
	switch {
	case len(p) <= hashCopied:
		d.work <- hashing{p: bytes.Clone(p)}
		return d.w.Write(p)
	case d.lent:
		d.work <- hashing{p: p}
		return d.w.Write(p)
	}
	hashed := make(chan struct{})
	d.work <- hashing{p, func() { close(hashed) }}
	n, err := d.w.Write(p)
	<-hashed
	return n, err
}

func (d *hashed) lend(write func() error, release func()) error {
	d.lent = true
	err := write()
	d.lent = false
	d.work <- hashing{then: release}
	return err
}

// sum waits until everything has been hashed.
func (d *hashed) sum() []byte {
	close(d.work)
	<-d.done
	return d.h.Sum(nil)
}

// sha256Key is the key in the other_config of a task under which the SHA-256
// of the body that was sent appears.
const sha256Key = "coppice:sha256"

func sumText(sum []byte) string { return hex.EncodeToString(sum) }

// digestField is a header field, or trailer, with a SHA-256.
func digestField(name string, sum []byte) string {
	return name + ": sha-256=:" + base64.StdEncoding.EncodeToString(sum) + ":"
}

// wantsDigest tells whether the SHA-256 of a body is to be computed. It costs as
// much as all else about an export, so it is done when somebody is going to see
// it: a client that brought a task, or gets a trailer; others ask for it, and
// those two can decline it, with Want-Content-Digest or Want-Repr-Digest as RFC
// 9530 (section 4) says.
func wantsDigest(h http.Header, seen bool) bool {
	for _, name := range []string{"Want-Content-Digest", "Want-Repr-Digest"} {
		if wish, ok := digestWish(h.Values(name)); ok {
			return wish
		}
	}
	return seen
}

// digestWish is what a preference of digests says about SHA-256, if it does:
// an integer from 0, not wanted, to 10.
func digestWish(lines []string) (wanted, ok bool) {
	for _, line := range lines {
		for item := range strings.SplitSeq(line, ",") {
			key, value, _ := strings.Cut(textproto.TrimString(item), "=")
			if key != "sha-256" {
				continue
			}
			if n, err := strconv.ParseUint(value, 10, 8); err == nil && n <= 10 {
				wanted, ok = n > 0, true
			}
		}
	}
	return wanted, ok
}

// maxDigests is how many digests a server remembers, some 100 bytes each.
const maxDigests = 1024

// digests remembers the SHA-256 of representations that have been sent, by
// their entity tags: equal ones stand for equal bytes. Of too many the one goes
// that has been asked for least recently. The zero value is ready to use.
type digests struct {
	mu struct {
		sync.Mutex
		byTag map[string]*list.Element
		order list.List // of knownDigest, the latest in front
	}
}

type knownDigest struct {
	tag string
	sum []byte
}

// get returns the digest of what has a tag, nil when it is not known.
func (d *digests) get(tag string) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.mu.byTag[tag]
	if e == nil {
		return nil
	}
	d.mu.order.MoveToFront(e)
	return e.Value.(knownDigest).sum
}

// put remembers the digest of what has a tag.
func (d *digests) put(tag string, sum []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.byTag == nil {
		d.mu.byTag = make(map[string]*list.Element)
	}
	if e := d.mu.byTag[tag]; e != nil {
		e.Value = knownDigest{tag, sum}
		d.mu.order.MoveToFront(e)
		return
	}
	d.mu.byTag[tag] = d.mu.order.PushFront(knownDigest{tag, sum})
	if len(d.mu.byTag) > maxDigests {
		last := d.mu.order.Back()
		d.mu.order.Remove(last)
		delete(d.mu.byTag, last.Value.(knownDigest).tag)
	}
}
