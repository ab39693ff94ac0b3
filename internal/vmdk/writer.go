package vmdk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zlib"
)

// Options describe an image to write.
type Options struct {
	Size int64  // of the disk in bytes: a multiple of SectorSize, at most MaxSize
	CID  uint32 // identity of the contents
}

// Writer sends an image. It is not safe for concurrent use; after an error it
// returns that for ever.
type Writer struct {
	w       io.Writer
	head    header
	sector  int64 // of the next byte
	next    int64 // the least grain that may come
	table   [perTable]uint32
	inTable int64 // the table that is being filled, -1 when it is empty
	places  []uint32
	err     error
}

// NewWriter sends everything that comes before the grains.
func NewWriter(w io.Writer, o Options) (*Writer, error) {
	if o.Size <= 0 || o.Size%SectorSize != 0 || o.Size > MaxSize {
		return nil, fmt.Errorf("vmdk: size %d is not a positive multiple of %d up to %d", o.Size, SectorSize, int64(MaxSize))
	}
	v := &Writer{w: w, inTable: -1}
	v.places = make([]uint32, (o.Size+perTable*GrainSize-1)/(perTable*GrainSize))
	v.head = header{
		magic: headMagic, version: 3, flags: flagNewline | flagCompressed | flagMarkers,
		capacity: uint64(o.Size / SectorSize), grain: GrainSize / SectorSize,
		descriptorAt: descriptorAt, descriptorN: descriptorSize, perTable: perTable,
		directoryAt: atEnd, overhead: overheadSectors, newlines: goodNewlines, compression: 1,
	}
	b := make([]byte, overheadSectors*SectorSize)
	copy(b, v.head.encode())
	copy(b[descriptorAt*SectorSize:(descriptorAt+descriptorSize)*SectorSize], descriptor(o))
	return v, v.write(b)
}

// descriptor is the text that describes the disk.
func descriptor(o Options) string {
	sectors := o.Size / SectorSize
	const perCylinder = 255 * 63
	return fmt.Sprintf(`# Disk DescriptorFile
version=1
CID=%08x
parentCID=ffffffff
createType="streamOptimized"

# Extent description
RW %d SPARSE "disk.vmdk"

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "%d"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.adapterType = "lsilogic"
`, o.CID, sectors, (sectors+perCylinder-1)/perCylinder)
}

// Grain is a compressed grain, ready to be sent.
type Grain struct {
	index int64
	buf   bytes.Buffer
	z     *zlib.Writer
}

// Compress makes the grain of an index out of its contents, zero behind the
// end of the disk. It may be called on any goroutine.
func (g *Grain) Compress(index int64, contents []byte) error {
	g.index = index
	g.buf.Reset()
	g.buf.Write(make([]byte, grainHead))
	if g.z == nil {
		z, err := zlib.NewWriterLevel(&g.buf, zlib.BestSpeed)
		if err != nil {
			return err
		}
		g.z = z
	} else {
		g.z.Reset(&g.buf)
	}
	if _, err := g.z.Write(contents); err != nil {
		return err
	}
	if err := g.z.Close(); err != nil {
		return err
	}
	b := g.buf.Bytes()
	binary.LittleEndian.PutUint64(b, uint64(index*GrainSize/SectorSize))
	binary.LittleEndian.PutUint32(b[8:], uint32(len(b)-grainHead))
	g.buf.Write(make([]byte, roundUp(int64(len(b)), SectorSize)-int64(len(b))))
	return nil
}

// Write sends a grain, which lies behind the one before.
func (v *Writer) Write(g *Grain) error {
	if v.err != nil {
		return v.err
	}
	if g.index < v.next || g.index/perTable >= int64(len(v.places)) {
		return v.fail(fmt.Errorf("vmdk: grain %d is not one from %d on", g.index, v.next))
	}
	if in := g.index / perTable; in != v.inTable {
		if err := v.endTable(); err != nil {
			return err
		}
		v.inTable = in
	}
	if v.sector+maxGrainSectors > 1<<32-1 {
		return v.fail(errors.New("vmdk: the image gets too large"))
	}
	v.table[g.index%perTable] = uint32(v.sector)
	v.next = g.index + 1
	return v.write(g.buf.Bytes())
}

// endTable sends the table of the grains that were sent last.
func (v *Writer) endTable() error {
	if v.inTable < 0 {
		return nil
	}
	b := marker(tableSectors, markerTable)
	v.places[v.inTable] = uint32(v.sector + 1)
	for _, place := range v.table {
		b = binary.LittleEndian.AppendUint32(b, place)
	}
	clear(v.table[:])
	v.inTable = -1
	return v.write(b)
}

// marker is a sector that says what follows.
func marker(sectors uint64, kind uint32) []byte {
	b := make([]byte, SectorSize)
	binary.LittleEndian.PutUint64(b, sectors)
	binary.LittleEndian.PutUint32(b[12:], kind)
	return b
}

// Close sends everything that comes behind the grains.
func (v *Writer) Close() error {
	if v.err != nil {
		return v.err
	}
	if err := v.endTable(); err != nil {
		return err
	}
	size := roundUp(4*int64(len(v.places)), SectorSize)
	b := marker(uint64(size/SectorSize), markerDirectory)
	v.head.directoryAt = uint64(v.sector + 1)
	for _, place := range v.places {
		b = binary.LittleEndian.AppendUint32(b, place)
	}
	b = append(b, make([]byte, size-4*int64(len(v.places)))...)
	b = append(b, marker(1, markerFooter)...)
	b = append(b, v.head.encode()...)
	b = append(b, make([]byte, SectorSize)...)
	if err := v.write(b); err != nil {
		return err
	}
	v.err = errors.New("vmdk: writer is closed")
	return nil
}

func (v *Writer) write(b []byte) error {
	if _, err := v.w.Write(b); err != nil {
		return v.fail(err)
	}
	v.sector += int64(len(b)) / SectorSize
	return nil
}

func (v *Writer) fail(err error) error {
	v.err = err
	return err
}
