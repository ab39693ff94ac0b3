package thincli

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// unhex decodes hex digits, ignoring white space.
func unhex(s string) []byte {
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		panic(err)
	}
	return b
}

// vectors are frames recorded from the stock client and server.
var vectors = []struct {
	m     Message
	bytes string
}{
	{Print{"hello"}, `11000000 09000000 00000000 05000000 68656c6c6f`},
	{PrintStderr{"\n"}, `0d000000 09000000 10000000 01000000 0a`},
	{Error{"SOME_CODE", []string{"a", "b c"}}, `25000000 09000000 0e000000 09000000 534f4d455f434f4445 02000000 01000000 61 03000000 622063`},
	{Load{"f.pem"}, `11000000 09000000 01000000 05000000 662e70656d`},
	{HTTPGet{"", "/ok"}, `13000000 09000000 0c000000 00000000 03000000 2f6f6b`},
	{Prompt{}, `08000000 09000000 03000000`},
	{Exit{1}, `0c000000 09000000 04000000 01000000`},
	{OK, `08000000 0a000000 05000000`},
	{Failed, `08000000 0a000000 06000000`},
	{Wait, `08000000 0a000000 12000000`},
	{Chunk{7}, `0c000000 0b000000 07000000 07000000`},
	{End{}, `08000000 0b000000 08000000`},
	{HTTPPut{"a", "/b"}, `13000000 09000000 0d000000 01000000 61 02000000 2f62`},
	{Debug{"x"}, `0d000000 09000000 0f000000 01000000 78`},
	{HTTPConnect{"/c"}, `0e000000 09000000 11000000 02000000 2f63`},
	{Exit{-1}, `0c000000 09000000 04000000 ffffffff`},
}

func TestVectors(t *testing.T) {
	for _, v := range vectors {
		if got := AppendMessage(nil, v.m); !bytes.Equal(got, unhex(v.bytes)) {
			t.Errorf("%#v is written as % x, want % x", v.m, got, unhex(v.bytes))
		}
		got, err := ReadMessage(bufio.NewReader(bytes.NewReader(unhex(v.bytes))), 1<<10)
		if diff := cmp.Diff(v.m, got); diff != "" || err != nil {
			t.Errorf("%s is read as %#v, %v", v.bytes, got, err)
		}
	}
}

func TestBanner(t *testing.T) {
	want := unhex(`58656e536f75726365207468696e20434c492070726f746f636f6c 00000000 02000000`)
	if got := appendBanner(nil); !bytes.Equal(got, want) {
		t.Errorf("banner % x, want % x", got, want)
	}
}

func TestMalformedFrames(t *testing.T) {
	for _, tc := range []struct {
		name, bytes string
		want        error
	}{
		{"nothing", ``, io.EOF},
		{"half a length", `0800`, io.ErrUnexpectedEOF},
		{"half a payload", `08000000 09000000`, io.ErrUnexpectedEOF},
		{"no payload", `08000000`, io.ErrUnexpectedEOF},
		{"too long", `01040000`, ErrProtocol},
		{"negative length", `ffffffff`, ErrProtocol},
		{"too short for a tag", `04000000 09000000`, ErrProtocol},
		{"unknown kind", `08000000 0c000000 00000000`, ErrProtocol},
		{"unknown command", `08000000 09000000 63000000`, ErrProtocol},
		{"unknown response", `08000000 0a000000 07000000`, ErrProtocol},
		{"unknown blob", `08000000 0b000000 05000000`, ErrProtocol},
		{"string longer than the frame", `0d000000 09000000 00000000 02000000 61`, ErrProtocol},
		{"huge string", `0d000000 09000000 00000000 ffffffff 61`, ErrProtocol},
		{"huge list", `10000000 09000000 0e000000 00000000 ffffffff`, ErrProtocol},
		{"string missing", `08000000 09000000 00000000`, ErrProtocol},
		{"trailing byte", `0d000000 09000000 04000000 01000000 00`, ErrProtocol},
	} {
		m, err := ReadMessage(bufio.NewReader(bytes.NewReader(unhex(tc.bytes))), 1<<10)
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %#v, %v, want %v", tc.name, m, err, tc.want)
		}
	}
}

func FuzzMessage(f *testing.F) {
	for _, v := range vectors {
		f.Add(unhex(v.bytes))
	}
	f.Add(unhex(`0d000000 09000000 00000000 ffffffff 61`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		m, err := ReadMessage(r, 1<<16)
		if err != nil {
			return
		}
		rest, _ := io.ReadAll(r)
		if got := append(AppendMessage(nil, m), rest...); !bytes.Equal(got, b) {
			t.Fatalf("% x is written again as % x", b, got)
		}
	})
}
