package server

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"coppice/internal/xapi"
)

// detectBytes is how much of a body the formats are told apart by, in bytes.
const detectBytes = 512

// tooLong refuses a raw body of length bytes where there is room for fewer.
func tooLong(format string, length, room int64) error {
	hint := ""
	if format == "" {
		hint = ", and without format= data is taken as raw"
	}
	return badBody("%d bytes do not fit a disk of %d bytes%s", length, room, hint)
}

// readUndeclared is readRaw for a client that did not say what it sends, which
// means raw. One that sends an image has forgotten to say so: its bytes as they
// are would be of no use as a disk, and are refused before any is written.
func readUndeclared(ctx context.Context, body io.Reader, length int64, u *upload) error {
	if u.offset > 0 {
		return readRaw(ctx, body, length, u)
	}
	start := make([]byte, detectBytes)
	n, err := io.ReadFull(body, start)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF { // of ReadFull: the body has its end here
		return &bodyError{err}
	}
	start = start[:n]
	for _, f := range formats() {
		if f.begins != nil && f.begins(start) {
			return xapi.NewError(xapi.ErrValueNotSupported, "format", "raw", fmt.Sprintf(
				"The data is an image of the format %s, and no format was given. "+
					"Give format=%[1]s, or format=raw to store the bytes of the image as they are", f.name))
		}
	}
	return readRaw(ctx, io.MultiReader(bytes.NewReader(start), body), length, u)
}
