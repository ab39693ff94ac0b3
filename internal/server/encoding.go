package server

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"strconv"
	"strings"

	"coppice/internal/xapi"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// acceptedEncoding is the content coding that a request asks for, "" for none.
// It asks by naming one and no other: HTTP libraries name several on their own
// account, and so does Go's client, which names gzip, for programs that said
// nothing and for which an exact length, and being able to resume, is worth
// more.
func acceptedEncoding(r *http.Request) string {
	accept := r.Header.Get("Accept-Encoding")
	if rangeOf(r) != "" || accept == "gzip" && strings.HasPrefix(r.UserAgent(), "Go-http-client/") {
		return ""
	}
	asked := ""
	for item := range strings.SplitSeq(accept, ",") {
		name, params, _ := strings.Cut(item, ";")
		name = strings.TrimPrefix(strings.ToLower(strings.TrimSpace(name)), "x-")
		if v, ok := strings.CutPrefix(strings.ReplaceAll(params, " ", ""), "q="); ok {
			if q, err := strconv.ParseFloat(v, 64); err != nil || q <= 0 {
				continue
			}
		}
		switch {
		case name == "" || name == "identity":
		case asked != "" || name != "zstd" && name != "gzip":
			return ""
		default:
			asked = name
		}
	}
	return asked
}

// encoder compresses what is written to it, as zstd or else as gzip; Close ends
// the data.
func encoder(name string, w io.Writer) (io.WriteCloser, error) {
	if name == "zstd" {
		return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(2), zstd.WithWindowSize(1<<20))
	}
	return gzip.NewWriterLevel(w, gzip.BestSpeed)
}

// maxDecoderWindow is the largest window of a zstd body, in bytes. It is what
// decoding takes of memory. The specification of the format asks decoders for 8
// MiB, which zstd -19 makes do with; -20 has 32 MiB.
const maxDecoderWindow = 32 << 20

// errWindow is what is wrong with a body of a larger one. Of the program's
// options those that it names are all that make one.
var errWindow = fmt.Errorf("it was compressed with a zstd window above the limit of %d MiB: compress it with zstd -19 or less and without --long", maxDecoderWindow>>20)

// decoded undoes the content coding of a body. What comes out is not bounded
// here, but by the disk that it is written to. The closer must be called.
func decoded(name string, body io.Reader) (io.Reader, func(), error) {
	switch strings.ToLower(strings.TrimSpace(name)) {
	case "", "identity":
		return body, func() {}, nil
	case "zstd":
		d, err := zstd.NewReader(body, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxDecoderWindow))
		if err != nil {
			return nil, nil, &bodyError{err}
		}
		return unbroken{d}, d.Close, nil
	case "gzip", "x-gzip":
		d, err := gzip.NewReader(body)
		if err != nil {
			return nil, nil, &bodyError{err}
		}
		return unbroken{d}, func() { _ = d.Close() }, nil // which only says what Read said
	}
	return nil, nil, unknownEncoding(name)
}

// unbroken tells the end of compressed data in its middle from that of a body
// which is merely shorter than what it is read for.
type unbroken struct{ io.Reader }

func (u unbroken) Read(p []byte) (int, error) {
	n, err := u.Reader.Read(p)
	if errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, zstd.ErrDecoderSizeExceeded) {
		err = errWindow
	}
	if err != nil && err != io.EOF {
		err = fmt.Errorf("compressed body: %w", err)
	}
	return n, err
}

// unknownEncoding refuses a content coding.
func unknownEncoding(name string) error {
	return &statusError{http.StatusUnsupportedMediaType, xapi.NewError(xapi.ErrInternalError, fmt.Sprintf("Cannot handle content encoding: %s", name))}
}

// knownEncoding tells whether decoded knows a coding.
func knownEncoding(name string) bool {
	switch strings.ToLower(strings.TrimSpace(name)) {
	case "", "identity", "zstd", "gzip", "x-gzip":
		return true
	}
	return false
}

// chunkedBody frames a body of unknown length.
type chunkedBody struct {
	out    *bufio.Writer
	frames io.WriteCloser
}

func newChunkedBody(w io.Writer) *chunkedBody {
	out := bufio.NewWriterSize(w, 256<<10)
	return &chunkedBody{out, httputil.NewChunkedWriter(out)}
}

func (c *chunkedBody) Write(p []byte) (int, error) { return c.frames.Write(p) }

// end writes the last chunk and the lines of a trailer.
func (c *chunkedBody) end(trailer string) error {
	if err := c.frames.Close(); err != nil {
		return err
	}
	if _, err := c.out.WriteString(trailer + "\r\n"); err != nil {
		return err
	}
	return c.out.Flush()
}
