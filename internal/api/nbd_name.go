package api

import (
	"net/url"
	"strings"

	"coppice/internal/storage"
	"coppice/internal/xapi"
)

// nbdMode says how a disk is attached by NBD.
type nbdMode string

const (
	// nbdReadOnly shows the contents of the instant of attaching, as exports
	// do. It hinders nobody.
	nbdReadOnly nbdMode = "ro"
	// nbdReadWrite is the disk itself. There is one such client at a time, unless
	// the disk is sharable.
	nbdReadWrite nbdMode = "rw"
	// nbdCopyOnWrite is a clone of the instant of attaching that vanishes with
	// its last connection, or becomes a disk then.
	nbdCopyOnWrite nbdMode = "cow"
)

// What a name begins with that is none of a disk.
const (
	nbdOfVBD   = "vbd"
	nbdOfToken = "once"
)

// nbdName is a parsed export name:
//
//	[/] [ro/ | rw/ | cow/] VDI-UUID [? session_id=REF & keep=LABEL]
//	[/] vbd/ VBD-UUID [? session_id=REF]
//	[/] once/ TOKEN
//
// The first without a mode, which means ro, is what VDI.get_nbd_info gives.
type nbdName struct {
	kind    string // "" for a disk, nbdOfVBD, nbdOfToken
	id      string // UUID or token
	mode    nbdMode
	session xapi.Ref[xapi.Session] // "" when not given
	keep    string                 // label of the disk that a cow clone becomes
}

// parseNBDName parses an export name. What is no name at all is
// VDI_MISSING.
func parseNBDName(s string) (n nbdName, err error) {
	bad := xapi.NewError(xapi.ErrVDIMissing)
	path, query, _ := strings.Cut(strings.TrimPrefix(s, "/"), "?")
	n.mode = nbdReadOnly
	n.id = path
	if kind, id, ok := strings.Cut(path, "/"); ok {
		n.id = id
		switch kind {
		case nbdOfVBD, nbdOfToken:
			n.kind = kind
		case string(nbdReadOnly), string(nbdReadWrite), string(nbdCopyOnWrite):
			n.mode = nbdMode(kind)
		default:
			return n, bad
		}
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return n, bad
	}
	for key, v := range values {
		switch {
		case len(v) > 1:
			return n, bad
		case key == "session_id" && n.kind != nbdOfToken:
			n.session = xapi.Ref[xapi.Session](v[0])
		case key == "keep" && n.mode == nbdCopyOnWrite && v[0] != "":
			n.keep = v[0]
		default:
			return n, bad
		}
	}
	if n.kind != nbdOfToken && !storage.ID(n.id).Valid() || n.id == "" {
		return n, bad
	}
	return n, nil
}

// action is the HTTP action whose role the use of a disk by this name needs.
func (n nbdName) action() string {
	if n.mode == nbdReadWrite || n.keep != "" {
		return "put_import_raw_vdi"
	}
	return "get_export_raw_vdi"
}

// nbdURI is the URI of an export on the Unix socket.
func nbdURI(socket, export string) string {
	name := url.URL{Path: export}
	path := url.URL{Path: socket}
	return "nbd+unix:///" + name.EscapedPath() + "?socket=" + path.EscapedPath()
}
