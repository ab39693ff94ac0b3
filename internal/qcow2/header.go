package qcow2

import (
	"encoding/binary"
	"fmt"
)

// Limits of what is read, those of qemu.
const (
	minClusterBits, maxClusterBits = 9, 21

	maxL1Bytes       = 32 << 20
	maxRefTableBytes = 8 << 20
)

// header is what the header of an image says.
type header struct {
	version     uint32
	clusterBits uint32
	size        int64 // of the disk in bytes
	l1Entries   int64
	l1At        int64
	refTableAt  int64
	refTable    int64 // bytes
	backing     bool
	extended    bool // entries of 128 bits
	zstd        bool
}

func (h *header) clusterSize() int64 { return 1 << h.clusterBits }

// entrySize is that of L2 entries in bytes.
func (h *header) entrySize() int64 {
	if h.extended {
		return 16
	}
	return 8
}

// perTable is how many clusters of the disk an L2 table describes.
func (h *header) perTable() int64 { return h.clusterSize() / h.entrySize() }

// tables is how many L2 tables the disk can have.
func (h *header) tables() int64 { return ceilDiv(h.size, h.perTable()<<h.clusterBits) }

// headPeek is how much of an image is looked at as its header, in bytes: up
// to the compression type.
const headPeek = 112

// IsImage tells whether data begins with the header of an image, one that can
// be read or not, by its first 72 bytes.
func IsImage(start []byte) bool {
	be := binary.BigEndian
	if len(start) < headSizeV2 || be.Uint32(start) != magic {
		return false
	}
	version, bits := be.Uint32(start[4:]), be.Uint32(start[20:])
	return (version == 2 || version == 3) && bits >= minClusterBits && bits <= maxClusterBits
}

// parseHeader reads the first bytes of an image, headPeek of them or all
// there are.
func parseHeader(b []byte) (*header, error) {
	be := binary.BigEndian
	if len(b) < headSizeV2 {
		return nil, cut(int64(len(b)), "header")
	}
	if m := be.Uint32(b); m != magic {
		return nil, field(0, "magic", fmt.Sprintf("%#08x", m), fmt.Sprintf("%#08x", uint32(magic)))
	}
	h := &header{version: be.Uint32(b[4:]), clusterBits: be.Uint32(b[20:])}
	if h.version != 2 && h.version != 3 {
		return nil, field(4, "version", h.version, "2 or 3")
	}
	if h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
		return nil, field(20, "cluster bits", h.clusterBits, fmt.Sprintf("%d to %d", minClusterBits, maxClusterBits))
	}
	if crypt := be.Uint32(b[32:]); crypt != 0 {
		return nil, field(32, "encryption", crypt, "0, none")
	}
	h.backing = be.Uint64(b[8:]) != 0
	if name := be.Uint64(b[8:]); name != 0 {
		n := uint64(be.Uint32(b[16:]))
		if n > maxBackName {
			return nil, field(16, "backing file size", n, fmt.Sprintf("at most %d", maxBackName))
		}
		if name > uint64(h.clusterSize())-min(n, uint64(h.clusterSize())) {
			return nil, field(8, "backing file offset", name, "a name within the first cluster")
		}
	}
	if h.version == 3 {
		if len(b) < headSizeV3 {
			return nil, cut(int64(len(b)), "header")
		}
		if err := h.parseFeatures(b); err != nil {
			return nil, err
		}
	}
	return h, h.parseTables(b)
}

func (h *header) parseFeatures(b []byte) error {
	be := binary.BigEndian
	length := be.Uint32(b[100:])
	if length < headSizeV3 || length%8 != 0 || int64(length) > h.clusterSize() {
		return field(100, "header length", length, fmt.Sprintf("a multiple of 8 from %d to a cluster", headSizeV3))
	}
	if order := be.Uint32(b[96:]); order > 6 {
		return field(96, "refcount order", order, "at most 6")
	}
	features := be.Uint64(b[72:])
	const known = incompatDirty | incompatCompress | incompatExtended
	switch {
	case features&incompatCorrupt != 0:
		return field(72, "incompatible features", fmt.Sprintf("%#x", features), "an image that is not marked corrupt")
	case features&incompatDataFile != 0:
		return field(72, "incompatible features", fmt.Sprintf("%#x", features), "an image without an external data file")
	case features&^uint64(known) != 0:
		return field(72, "incompatible features", fmt.Sprintf("%#x", features), fmt.Sprintf("none but %#x", known))
	}
	h.extended = features&incompatExtended != 0
	if h.extended && h.clusterBits < 14 {
		return field(20, "cluster bits", h.clusterBits, "at least 14 with extended entries")
	}
	var compression byte
	if length > headSizeV3 {
		if len(b) <= headSizeV3 {
			return cut(int64(len(b)), "header")
		}
		compression = b[104]
	}
	if marked := features&incompatCompress != 0; marked != (compression != compressionDeflate) || compression > compressionZstd {
		return field(104, "compression type", compression, "0 (deflate), or 1 (zstd) with its feature bit")
	}
	h.zstd = compression == compressionZstd
	return nil
}

func (h *header) parseTables(b []byte) error {
	be := binary.BigEndian
	size, entries := be.Uint64(b[24:]), int64(be.Uint32(b[36:]))
	if size > maxFile {
		return field(24, "size", size, fmt.Sprintf("at most %d", int64(maxFile)))
	}
	h.size = int64(size)
	if entries*8 > maxL1Bytes {
		return field(36, "L1 entries", entries, fmt.Sprintf("at most %d", maxL1Bytes/8))
	}
	h.l1Entries = h.tables()
	if entries < h.l1Entries {
		return field(36, "L1 entries", entries, fmt.Sprintf("at least %d for %d bytes", h.l1Entries, h.size))
	}
	table := int64(be.Uint32(b[56:])) << h.clusterBits
	if table > maxRefTableBytes {
		return field(56, "refcount table clusters", be.Uint32(b[56:]), fmt.Sprintf("at most %d bytes", maxRefTableBytes))
	}
	h.refTable = table
	for _, f := range []struct {
		at   int64
		name string
		n    int64
		to   *int64
	}{
		{40, "L1 table offset", 8 * entries, &h.l1At},
		{48, "refcount table offset", table, &h.refTableAt},
	} {
		off := be.Uint64(b[f.at:])
		if off > maxFile || f.n > 0 && (off%uint64(h.clusterSize()) != 0 || off == 0) {
			return field(f.at, f.name, off, fmt.Sprintf("a multiple of %d behind the header", h.clusterSize()))
		}
		*f.to = int64(off)
	}
	return nil
}
