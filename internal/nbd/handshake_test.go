package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
)

func wantRefusal(t *testing.T, what string, err error, code uint32) {
	t.Helper()
	if r, ok := errors.AsType[*Refusal](err); !ok || r.Code != code {
		t.Errorf("%s: %v, want the refusal %#x", what, err, code)
	}
}

func TestNegotiation(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	r := newRig(t, map[string]*Export{"a": {Device: v}, "b": {Device: v, ReadOnly: true}}, Options{}, nil)
	d := r.begin()
	names, err := d.List()
	if err != nil || !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("exports %q, %v", names, err)
	}
	i, err := d.Info("b")
	want := Info{"b", "the disk b", 1 << 20, FlagHasFlags | FlagReadOnly | FlagSendFlush | FlagMultiConn | FlagSendCache, 1, 4096, maxRequest}
	if err != nil || i != want {
		t.Errorf("info %+v, %v, want %+v", i, err, want)
	}
	_, err = d.Info("c")
	wantRefusal(t, "unknown export", err, repErrUnknown)
	_, err = d.Option(99, nil)
	wantRefusal(t, "unknown option", err, repErrUnsupported)
	for opt, data := range map[uint32]string{
		optList: "x", optStructuredReply: "x", optExtendedHeaders: "x",
		optInfo: "\x00\x00\x00\x05abc", optGo: "\x00\x00\x00\x01a\x00\x02\x00\x01",
	} {
		_, err = d.Option(opt, []byte(data))
		wantRefusal(t, fmt.Sprintf("malformed option %d", opt), err, repErrInvalid)
	}
	_, err = d.Option(optStartTLS, nil)
	wantRefusal(t, "TLS", err, repErrPolicy)
	_, err = d.Option(optInfo, make([]byte, maxOption+1))
	wantRefusal(t, "too long", err, repErrTooBig)
	_, err = d.ListContexts("a")
	wantRefusal(t, "contexts before structured replies", err, repErrInvalid)
	if err := d.Structured(); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, "twice", d.Structured(), repErrInvalid)
	contexts, err := d.ListContexts("a")
	if err != nil || !slices.Equal(contexts, []string{ContextAllocation}) {
		t.Errorf("contexts %q, %v", contexts, err)
	}
	contexts, err = d.SetContexts("a", "base:", "base:other", "x:y", ContextAllocation, ContextAllocation)
	if err != nil || !slices.Equal(contexts, []string{ContextAllocation}) {
		t.Errorf("chosen contexts %q, %v", contexts, err)
	}
	_, err = d.SetContexts("c", ContextAllocation)
	wantRefusal(t, "contexts of an unknown export", err, repErrUnknown)
	if err := d.Extended(); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, "back from extended headers", d.Structured(), repErrExtRequired)
	i, err = d.Info("a")
	flags := uint16(FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagSendTrim | FlagSendWriteZeroes | FlagSendDF |
		FlagMultiConn | FlagSendCache | FlagSendFastZero | FlagStatusPayload)
	if err != nil || i.Flags != flags {
		t.Errorf("flags %#x, %v, want %#x", i.Flags, err, flags)
	}
	if err := d.Abort(); err != nil {
		t.Errorf("abort: %v", err)
	}
}

// TestContextsOfAnother has contexts chosen for one export and another
// opened.
func TestContextsOfAnother(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	r := newRig(t, map[string]*Export{"a": {Device: v}, "b": {Device: v}}, Options{}, nil)
	d := r.begin()
	upgrade(t, d, wireStructured)
	if _, err := d.SetContexts("a", ContextAllocation); err != nil {
		t.Fatal(err)
	}
	c, err := d.Go("b")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Abort()
	_, err = c.BlockStatus(0, 4096, 0)
	wantErrno(t, "status", err, EINVAL)
}

func TestExportName(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	r := newRig(t, map[string]*Export{"": {Device: v}}, Options{}, nil)
	for _, padded := range []bool{false, true} {
		nc := r.dial()
		d, err := Begin(nc)
		if err != nil {
			t.Fatal(err)
		}
		if padded { // a second hello, by hand, of a client that wants the zeroes
			nc.Close()
			nc = r.dial()
			if _, err := io.ReadFull(nc, make([]byte, 18)); err != nil {
				t.Fatal(err)
			}
			if _, err := nc.Write([]byte{0, 0, 0, flagFixedNewstyle}); err != nil {
				t.Fatal(err)
			}
			d.nc, d.noZeroes = nc, false
			d.in.Reset(nc)
		}
		c, err := d.ExportName("")
		if err != nil || c.Size() != 1<<20 {
			t.Fatalf("export: %v", err)
		}
		if _, err := c.ReadAt(make([]byte, 10), 5); err != nil {
			t.Errorf("read: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	d := r.begin()
	if _, err := d.ExportName("nothing"); !errors.Is(err, io.EOF) {
		t.Errorf("unknown export: %v, want the end", err)
	}
}

// TestLongList lists ten thousand exports, to a client that listens and to one
// that does not and goes.
func TestLongList(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	exports := map[string]*Export{}
	for i := range 10_000 {
		exports[fmt.Sprintf("%036d", i)] = &Export{Device: v}
	}
	r := newRig(t, exports, Options{}, nil)
	deaf := r.begin()
	if _, err := deaf.nc.Write(option(optList, nil)); err != nil {
		t.Fatal(err)
	}
	names, err := r.begin().List()
	if err != nil || len(names) != len(exports) || !slices.IsSorted(names) {
		t.Errorf("%d names, %v, want %d in order", len(names), err, len(exports))
	}
	deaf.nc.Close()
}

// TestFloodOfOptions has a client send options without waiting for answers, of
// every size that is looked at and beyond. It gets as many answers and can
// still open an export.
func TestFloodOfOptions(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	r := newRig(t, map[string]*Export{"disk": {Device: v}}, Options{}, nil)
	d := r.begin()
	if err := d.Structured(); err != nil {
		t.Fatal(err)
	}
	const rounds = 50
	var sending sync.WaitGroup
	sending.Go(func() {
		queries := append(appendString(nil, "disk"), 0, 0, 0x3f, 0)
		queries = append(queries, make([]byte, 4*0x3f00-1)...) // nearly that many empty strings
		for i := range rounds {
			for _, o := range [][]byte{
				option(optInfo, append(appendString(nil, "none"), 0, 0)),
				option(optListMetaContext, queries[:len(queries)-i]),
				option(99, make([]byte, i*maxOption/rounds)),
				option(optSetMetaContext, make([]byte, maxOption+i)),
			} {
				if _, err := d.nc.Write(o); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	for i := range 4 * rounds {
		var h [20]byte
		if _, err := io.ReadFull(d.in, h[:]); err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
		if typ := binary.BigEndian.Uint32(h[12:]); typ < repErrSmallestCode {
			t.Fatalf("answer %d to option %d is of type %d, want a refusal", i, binary.BigEndian.Uint32(h[8:]), typ)
		}
		if _, err := io.CopyN(io.Discard, d.in, int64(binary.BigEndian.Uint32(h[16:]))); err != nil {
			t.Fatal(err)
		}
	}
	sending.Wait()
	c, err := d.Go("disk")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ReadAt(make([]byte, 1), 0); err != nil {
		t.Error(err)
	}
	c.Abort()
}

// TestStrings has names that the protocol does not allow.
func TestStrings(t *testing.T) {
	_, v := newVolume(t, 1<<20)
	long := strings.Repeat("x", maxString+1)
	r := newRig(t, map[string]*Export{"a\x00b": {Device: v}, "a\xffb": {Device: v}, long: {Device: v}}, Options{}, nil)
	for name := range r.shelf.exports {
		_, err := r.begin().Info(name)
		wantRefusal(t, fmt.Sprintf("%.8q", name), err, repErrInvalid)
		if _, err := r.begin().ExportName(name); !errors.Is(err, io.EOF) {
			t.Errorf("%.8q by EXPORT_NAME: %v, want the end", name, err)
		}
	}
}

// TestListMany lists more than one reply's worth of memory, and a list that
// fails behind that.
func TestListMany(t *testing.T) {
	b := &shelf{exports: map[string]*Export{}}
	_, v := newVolume(t, 1<<20)
	var want []string
	for i := range 10_000 {
		name := fmt.Sprintf("%036d", i)
		b.exports[name] = &Export{Device: v}
		want = append(want, name)
	}
	r := newRig(t, b.exports, Options{}, nil)
	d := r.begin()
	got, err := d.List()
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%d names, %v, want %d", len(got), err, len(want))
	}
	r.shelf.broken = true
	if got, err := d.List(); err == nil {
		t.Errorf("a list that breaks off: %d names and no error", len(got))
	}
	if _, err := d.Go(want[0]); err != nil {
		t.Errorf("after it: %v", err)
	}
}
