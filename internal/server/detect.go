package server

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"

	"coppice/internal/xapi"
	"coppice/internal/xva"
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
// means raw. One that sends an image, or something compressed, has forgotten to
// say so: its bytes as they are would be of no use as a disk, and are refused
// before any is written.
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
	if what := forgotten(start); what != "" {
		return xapi.NewError(xapi.ErrValueNotSupported, "format", "raw", "The data is "+what)
	}
	return readRaw(ctx, io.MultiReader(bytes.NewReader(start), body), length, u)
}

// forgotten says what data that begins like that is, and how to send it; "" when
// it may be a disk as it is.
func forgotten(start []byte) string {
	for _, f := range formats() {
		if f.begins != nil && f.begins(start) {
			return fmt.Sprintf("an image of the format %s, and no format was given. "+
				"Give format=%[1]s, or format=raw to store the bytes of the image as they are", f.name)
		}
	}
	switch coding := compressed(start); {
	case coding != "":
		return fmt.Sprintf("compressed with %s, and neither that nor a format was given. "+
			"Send the header Content-Encoding: %[1]s, or give format=raw to store the compressed bytes as they are", coding)
	case firstFile(start) == xva.Manifest:
		return "the export of a VM, and no format was given. " +
			"Send it to /import, or give format=raw to store the bytes of the archive as they are"
	}
	return ""
}

// compressed tells by its first bytes how data is compressed, as one whose
// header could be the start of nothing else.
func compressed(start []byte) string {
	const reservedGzip, reservedZstd = 0xE0, 0x08 // bits
	switch {
	case len(start) < 10:
	case bytes.HasPrefix(start, []byte{0x1F, 0x8B, 8}) && start[3]&reservedGzip == 0:
		return "gzip"
	case bytes.HasPrefix(start, []byte{0x28, 0xB5, 0x2F, 0xFD}) && start[4]&reservedZstd == 0:
		return "zstd"
	}
	return ""
}

// isDiskTar tells whether data begins with the first chunk of a disk in an
// archive. Other archives may well stand on a disk.
func isDiskTar(start []byte) bool { return strings.HasSuffix(firstFile(start), "/00000000") }

// firstFile is the name of the first file of an archive, by its first 512 bytes;
// "" when there is no archive.
func firstFile(start []byte) string {
	h, err := tar.NewReader(bytes.NewReader(start)).Next()
	if err != nil {
		return ""
	}
	return h.Name
}
