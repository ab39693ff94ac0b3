package server

import (
	"bufio"
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
// Go's HTTP client asks for gzip on its own account when its program said
// nothing; an exact length is worth more to such a program.
func acceptedEncoding(r *http.Request) string {
	accept := r.Header.Get("Accept-Encoding")
	if r.Header.Get("Range") != "" || accept == "gzip" && strings.HasPrefix(r.UserAgent(), "Go-http-client/") {
		return ""
	}
	best, quality := "", 0.0
	for item := range strings.SplitSeq(accept, ",") {
		name, params, _ := strings.Cut(item, ";")
		name = strings.ToLower(strings.TrimSpace(name))
		q := 1.0
		if v, ok := strings.CutPrefix(strings.ReplaceAll(params, " ", ""), "q="); ok {
			var err error
			if q, err = strconv.ParseFloat(v, 64); err != nil {
				q = 0
			}
		}
		switch {
		case name != "zstd" && name != "gzip" && name != "x-gzip":
		case q > quality, q == quality && q > 0 && name == "zstd":
			best, quality = strings.TrimPrefix(name, "x-"), q
		}
	}
	return best
}

// nopCloser makes a writer that needs no end.
type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// encoder compresses what is written to it; Close ends the data.
func encoder(name string, w io.Writer) (io.WriteCloser, error) {
	switch name {
	case "zstd":
		return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(2), zstd.WithWindowSize(1<<20))
	case "gzip":
		return gzip.NewWriterLevel(w, gzip.BestSpeed)
	}
	return nopCloser{w}, nil
}

// maxDecoderWindow is the largest window of a zstd body, in bytes: what the
// format's specification asks every decoder to support.
const maxDecoderWindow = 8 << 20

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

// end writes the last chunk and a trailer.
func (c *chunkedBody) end(trailer string) error {
	if err := c.frames.Close(); err != nil {
		return err
	}
	if _, err := c.out.WriteString(trailer + "\r\n\r\n"); err != nil {
		return err
	}
	return c.out.Flush()
}
