package server

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"coppice/internal/qcow2"
	"coppice/internal/vhd"
	"coppice/internal/vmdk"
	"coppice/internal/xapi"
)

// format is an image format of the transfer handlers.
type format struct {
	name        string // of the parameter, and the extension of a file
	contentType string // of a download

	// fullOnly is set where an image cannot say that it is a delta, or what of: a
	// tar lacks chunks that are zero, and readers take a delta for a whole
	// disk; a VMDK names its parent by 32 bits, and most readers of
	// streamOptimized ones know no parents.
	fullOnly bool

	// encode plans the image of a disk. Every limit of the format is checked
	// here, before anything is sent.
	encode func(ctx context.Context, d *download) (image, error)
	decode decoder

	// begins tells by the first detectBytes of data whether it is an image of
	// this format; nil when that does not tell.
	begins func(start []byte) bool
}

// image is a planned image of a disk.
type image interface {
	// length is the exact length in bytes; below zero when it is known only
	// once the image has been sent.
	length() int64

	// etag is the entity tag: equal ones stand for equal bytes.
	etag() string

	// send writes the image, or what the window wants of it, and reports how
	// far in it w is.
	send(ctx context.Context, w *window, done func(int64)) error
}

// formats are all the formats there are.
func formats() []format {
	return []format{
		{name: "raw", contentType: "application/octet-stream", encode: planRaw, decode: readRaw},
		{name: "vhd", contentType: "application/vhd", encode: planVHD, decode: readVHD, begins: vhd.HasFooter},
		{name: "tar", contentType: "application/x-tar", fullOnly: true, encode: planTar, decode: readTar, begins: isDiskTar},
		{name: "qcow2", contentType: "application/x-qemu-disk", encode: planQcow2, decode: readQcow2, begins: qcow2.IsImage},
		{name: "vmdk", contentType: "application/x-vmdk", fullOnly: true, encode: planVMDK, decode: readVMDK, begins: vmdk.IsSparse},
	}
}

// findFormat returns the format with a name in any case; "" means raw.
func findFormat(name string) (format, error) {
	if name == "" {
		name = "raw"
	}
	for _, f := range formats() {
		if strings.EqualFold(f.name, name) {
			return f, nil
		}
	}
	return format{}, unknownFormat(fmt.Sprintf("Unknown format %s (there are %s)", name, strings.Join(formatNames(), ", ")))
}

// formatNames returns the names of all formats.
func formatNames() (names []string) {
	for _, f := range formats() {
		names = append(names, f.name)
	}
	return names
}

// unknownFormat is what a format that the handler does not know, or not in
// this form, is answered with.
func unknownFormat(text string) error {
	return &statusError{http.StatusNotFound, xapi.NewError(xapi.ErrInternalError, text)}
}

// wholeOnly refuses a delta in a format that has none, and says which have.
func wholeOnly(f format) error {
	var others []string
	for _, f := range formats() {
		if !f.fullOnly {
			others = append(others, f.name)
		}
	}
	return &statusError{http.StatusBadRequest, xapi.NewError(xapi.ErrValueNotSupported, "format", f.name,
		"An image of this format cannot say what it is the difference to. Those that base= can be used with are: "+strings.Join(others, ", "))}
}
