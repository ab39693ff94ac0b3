package vhd

import (
	"encoding/binary"
	"fmt"
	"time"
	"unicode/utf16"
)

// Disk types of a footer.
const (
	TypeFixed        = 2
	TypeDynamic      = 3
	TypeDifferencing = 4
)

const (
	footerSize = 512
	headerSize = 1024

	cookieFooter = "conectix"
	cookieHeader = "cxsparse"
	cookiePoison = "v_poison" // libvhd's mark of a file that must not be used

	version1    = 0x00010000
	noOffset    = 0xFFFFFFFFFFFFFFFF
	unallocated = 0xFFFFFFFF

	featureReserved = 2
	creatorWindows  = 0x77696E20 // "win "
	creatorTapdisk  = 0x74617000 // "tap\0"
	hostWindows     = 0x5769326B // "Wi2k"
	platformW2ru    = 0x57327275 // relative path in UTF-16LE

	checksumFooterAt = 64
	checksumHeaderAt = 36
)

// epoch is 2000-01-01T00:00:00Z in Unix seconds, the zero of VHD timestamps.
const epoch = 946684800

// Footer is the 512-byte structure at both ends of an image.
type Footer [footerSize]byte

// Cookie is "conectix".
func (f *Footer) Cookie() string { return string(f[0:8]) }

// Features has bit 1 always set; bit 0 marks a temporary disk.
func (f *Footer) Features() uint32 { return be32(f[8:]) }

// Version is the format version, major in the upper half.
func (f *Footer) Version() uint32 { return be32(f[12:]) }

// DataOffset is where the dynamic header lies, all ones in a fixed image.
func (f *Footer) DataOffset() uint64 { return be64(f[16:]) }

// Timestamp is the modification time, to the second.
func (f *Footer) Timestamp() time.Time { return fromStamp(be32(f[24:])) }

// Creator is the four-byte code of the program that wrote the image.
func (f *Footer) Creator() string { return string(f[28:32]) }

// CreatorVersion is that program's version, major in the upper half.
func (f *Footer) CreatorVersion() uint32 { return be32(f[32:]) }

// CreatorHost is the code of the system the program ran on.
func (f *Footer) CreatorHost() uint32 { return be32(f[36:]) }

// OriginalSize is the size of the disk when it was made, in bytes.
func (f *Footer) OriginalSize() uint64 { return be64(f[40:]) }

// CurrentSize is the size of the disk, in bytes.
func (f *Footer) CurrentSize() uint64 { return be64(f[48:]) }

// Geometry is the disk geometry; nothing here relies on it.
func (f *Footer) Geometry() Geometry {
	return Geometry{Cylinders: binary.BigEndian.Uint16(f[56:]), Heads: f[58], Sectors: f[59]}
}

// Type is TypeFixed, TypeDynamic or TypeDifferencing.
func (f *Footer) Type() uint32 { return be32(f[60:]) }

// Checksum is the checksum as stored.
func (f *Footer) Checksum() uint32 { return be32(f[checksumFooterAt:]) }

// UUID is the identity of the image, in RFC 4122 byte order.
func (f *Footer) UUID() [16]byte { return [16]byte(f[68:84]) }

// SavedState is non-zero when the image belongs to a suspended machine.
func (f *Footer) SavedState() byte { return f[84] }

func (f *Footer) seal() { put32(f[checksumFooterAt:], checksum(f[:], checksumFooterAt)) }

// Header is the 1024-byte structure of dynamic and differencing images.
type Header [headerSize]byte

// Cookie is "cxsparse".
func (h *Header) Cookie() string { return string(h[0:8]) }

// DataOffset is not used by the format: all ones.
func (h *Header) DataOffset() uint64 { return be64(h[8:]) }

// TableOffset is where the BAT lies, in bytes.
func (h *Header) TableOffset() uint64 { return be64(h[16:]) }

// Version is the header version, major in the upper half.
func (h *Header) Version() uint32 { return be32(h[24:]) }

// TableEntries is the number of entries of the BAT, at least one per block.
func (h *Header) TableEntries() uint32 { return be32(h[28:]) }

// BlockSize is the size of a block's data, in bytes.
func (h *Header) BlockSize() uint32 { return be32(h[32:]) }

// Checksum is the checksum as stored.
func (h *Header) Checksum() uint32 { return be32(h[checksumHeaderAt:]) }

// ParentUUID is the identity of the parent of a differencing image.
func (h *Header) ParentUUID() [16]byte { return [16]byte(h[40:56]) }

// ParentTimestamp is the modification time of the parent.
func (h *Header) ParentTimestamp() time.Time { return fromStamp(be32(h[56:])) }

// ParentName is the file name of the parent. It is foreign text: to show,
// never to open.
func (h *Header) ParentName() string {
	var units []uint16
	for at := 64; at < 576; at += 2 {
		u := binary.BigEndian.Uint16(h[at:])
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}

// Locator returns one of the eight parent locator entries.
func (h *Header) Locator(slot int) Locator {
	e := h[576+24*slot:]
	return Locator{Platform: be32(e), Space: be32(e[4:]), Length: be32(e[8:]), Offset: be64(e[16:])}
}

func (h *Header) setLocator(slot int, l Locator) {
	e := h[576+24*slot:]
	put32(e, l.Platform)
	put32(e[4:], l.Space)
	put32(e[8:], l.Length)
	put64(e[16:], l.Offset)
}

func (h *Header) seal() { put32(h[checksumHeaderAt:], checksum(h[:], checksumHeaderAt)) }

// Locator says where in the image a path of the parent is stored.
type Locator struct {
	Platform uint32 // kind of path, a four-byte code
	Space    uint32 // room for the path: sectors when below 512, else bytes
	Length   uint32 // bytes of the path
	Offset   uint64 // bytes into the image
}

// checksum is the complement of the sum of all bytes, the four of the checksum
// itself counted as zero.
func checksum(b []byte, at int) uint32 {
	var sum uint32
	for i, c := range b {
		if i < at || i >= at+4 {
			sum += uint32(c)
		}
	}
	return ^sum
}

// Geometry is a disk geometry as BIOSes know it.
type Geometry struct {
	Cylinders uint16
	Heads     uint8
	Sectors   uint8 // per track
}

// GeometryOf returns the geometry that the format prescribes for a disk of
// size bytes. It describes at most size bytes, often fewer.
func GeometryOf(size int64) Geometry {
	const most = 65535 * 16 * 255
	total := min((size+SectorSize-1)/SectorSize, most)
	var spt, heads, cth int64 // cth: cylinders times heads
	if total >= 65535*16*63 {
		spt, heads = 255, 16
		cth = total / spt
	} else {
		spt = 17
		cth = total / spt
		heads = max(4, (cth+1023)/1024)
		if cth >= heads*1024 || heads > 16 {
			spt, heads = 31, 16
			cth = total / spt
		}
		if cth >= heads*1024 {
			spt, heads = 63, 16
			cth = total / spt
		}
	}
	return Geometry{Cylinders: uint16(cth / heads), Heads: uint8(heads), Sectors: uint8(spt)}
}

// Size is the number of bytes that the geometry describes.
func (g Geometry) Size() int64 {
	return int64(g.Cylinders) * int64(g.Heads) * int64(g.Sectors) * SectorSize
}

func (g Geometry) String() string {
	return fmt.Sprintf("%d/%d/%d", g.Cylinders, g.Heads, g.Sectors)
}

// WellFormed returns u unchanged when readers accept it as the identity of an
// image, which are those of RFC 4122 versions 1 to 5; otherwise u with the
// version made 4 and the variant bits set.
func WellFormed(u [16]byte) [16]byte {
	if !wellFormed(u) {
		u[6] = u[6]&0x0F | 0x40
		u[8] = u[8]&0x3F | 0x80
	}
	return u
}

func wellFormed(u [16]byte) bool {
	v := u[6] >> 4
	return v >= 1 && v <= 5 && u[8]>>6 == 2
}

// toStamp converts to seconds since 2000; what cannot be said becomes 0.
func toStamp(t time.Time) uint32 {
	s := t.Unix() - epoch
	if s < 0 || s > 0xFFFFFFFF {
		return 0
	}
	return uint32(s)
}

func fromStamp(s uint32) time.Time { return time.Unix(epoch+int64(s), 0).UTC() }

// roundUp rounds n up to a multiple of unit, a power of two.
func roundUp(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }

func be32(b []byte) uint32     { return binary.BigEndian.Uint32(b) }
func be64(b []byte) uint64     { return binary.BigEndian.Uint64(b) }
func put32(b []byte, v uint32) { binary.BigEndian.PutUint32(b, v) }
func put64(b []byte, v uint64) { binary.BigEndian.PutUint64(b, v) }
