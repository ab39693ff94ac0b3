package cow

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"coppice/internal/vfs"
)

const (
	superName  = "super"
	superTemp  = "super.new"
	superSlots = 4
	slotSize   = 4096
	superSize  = 512 // bytes of a slot in use: one sector, so that it is written whole or not at all
	superMagic = "COPPICE\n"

	formatVersion = 1

	// Feature bits that this version knows. Unknown ones: an incompatible bit
	// keeps a store from being opened at all, a read-only one from being
	// written; a compatible bit is ignored and kept.
	knownIncompat = 0
	knownReadOnly = 0
)

// super is the superblock: everything that one write switches over.
type super struct {
	compat, readOnly uint32 // features
	incompat         uint32
	geo              Geometry
	uuid, logKey     [16]byte
	gen              uint64 // generation, one per checkpoint
	epoch            uint64 // the next layer is sealed at this epoch
	nextID           uint64 // of the next volume record
	log              logPos // where replay starts
	logSize          uint64 // bytes of the ring
	table            entry  // root of the volume table
	queue            entry  // top block of the reap queue
	queueLen         uint64 // entries in the queue
	regions          uint64 // records in the region table
	tableCRC         uint32 // CRC32C of the CRCs of the region table's pages
}

func (s *super) encode() []byte {
	b := make([]byte, superSize)
	le := binary.LittleEndian
	copy(b, superMagic)
	le.PutUint32(b[8:], formatVersion)
	le.PutUint32(b[12:], s.compat)
	le.PutUint32(b[16:], s.readOnly)
	le.PutUint32(b[20:], s.incompat)
	le.PutUint32(b[24:], uint32(s.geo.UnitSize))
	le.PutUint32(b[28:], uint32(s.geo.Fanout))
	le.PutUint32(b[32:], uint32(s.geo.PageCounters))
	le.PutUint32(b[36:], uint32(s.geo.RegionsPerFile))
	copy(b[40:], s.uuid[:])
	copy(b[56:], s.logKey[:])
	le.PutUint64(b[72:], s.gen)
	le.PutUint64(b[80:], s.epoch)
	le.PutUint64(b[88:], s.nextID)
	le.PutUint64(b[96:], s.log.off)
	le.PutUint64(b[104:], s.log.seq)
	le.PutUint32(b[112:], s.log.prev)
	le.PutUint32(b[116:], s.tableCRC)
	s.table.put(b[120:])
	s.queue.put(b[136:])
	le.PutUint64(b[152:], s.queueLen)
	le.PutUint64(b[160:], s.regions)
	le.PutUint64(b[168:], s.logSize)
	le.PutUint32(b[superSize-4:], checksum(b[:superSize-4]))
	return b
}

// writable reports why a store must not be written by this version.
func (s *super) writable() error {
	if f := s.readOnly &^ knownReadOnly; f != 0 {
		return &UnsupportedError{Version: formatVersion, ReadOnly: f}
	}
	return nil
}

// errNoSlot marks a slot that holds no superblock, torn ones included.
var errNoSlot = errors.New("no superblock in the slot")

// decodeSuper decodes one slot. errNoSlot means that another slot may do;
// ErrUnsupported and ErrCorrupt are final.
func decodeSuper(b []byte) (*super, error) {
	if len(b) < superSize || string(b[:8]) != superMagic {
		return nil, errNoSlot
	}
	b = b[:superSize]
	le := binary.LittleEndian
	if le.Uint32(b[superSize-4:]) != checksum(b[:superSize-4]) {
		return nil, errNoSlot
	}
	if v := le.Uint32(b[8:]); v != formatVersion {
		return nil, &UnsupportedError{Version: v}
	}
	s := &super{
		compat:   le.Uint32(b[12:]),
		readOnly: le.Uint32(b[16:]),
		incompat: le.Uint32(b[20:]),
		geo: Geometry{
			UnitSize:       int(le.Uint32(b[24:])),
			Fanout:         int(le.Uint32(b[28:])),
			PageCounters:   int(le.Uint32(b[32:])),
			RegionsPerFile: int(le.Uint32(b[36:])),
		},
		uuid:     [16]byte(b[40:56]),
		logKey:   [16]byte(b[56:72]),
		gen:      le.Uint64(b[72:]),
		epoch:    le.Uint64(b[80:]),
		nextID:   le.Uint64(b[88:]),
		log:      logPos{off: le.Uint64(b[96:]), seq: le.Uint64(b[104:]), prev: le.Uint32(b[112:])},
		tableCRC: le.Uint32(b[116:]),
		table:    getEntry(b[120:]),
		queue:    getEntry(b[136:]),
		queueLen: le.Uint64(b[152:]),
		regions:  le.Uint64(b[160:]),
		logSize:  le.Uint64(b[168:]),
	}
	if f := s.incompat &^ knownIncompat; f != 0 {
		return nil, &UnsupportedError{Version: formatVersion, Incompatible: f, ReadOnly: s.readOnly &^ knownReadOnly}
	}
	if err := s.geo.validate(); err != nil {
		return nil, &CorruptError{Detail: "superblock: " + err.Error()}
	}
	if s.regions > uint64(s.geo.maxRegions()) || s.epoch > maxEpoch || s.queueLen > 1<<40 {
		return nil, &CorruptError{Detail: "superblock: count out of range"}
	}
	if checkLogSize(int64(s.logSize), s.geo) != nil || s.log.off > s.logSize || s.log.off%s.geo.frameAlign() != 0 {
		return nil, &CorruptError{Detail: "superblock: log position out of range"}
	}
	return s, nil
}

// slots is what the slots of the superblock hold.
type slots struct {
	super [superSlots]*super // nil where there is none
	bad   []int              // neither a superblock nor what a new store has there, zeros; a power cut leaves none
}

// readSlots reads the slots. One that the host cannot read is a bad one.
func readSlots(f vfs.File) (*slots, error) {
	sl := &slots{}
	for i := range superSlots {
		b := make([]byte, superSize)
		if _, err := f.ReadAt(b, int64(i)*slotSize); err != nil && !errors.Is(err, io.EOF) {
			sl.bad = append(sl.bad, i)
			continue
		}
		s, err := decodeSuper(b)
		switch {
		case err == nil:
			sl.super[i] = s
		case !errors.Is(err, errNoSlot):
			return nil, err
		case !isZero(b):
			sl.bad = append(sl.bad, i)
		}
	}
	return sl, nil
}

// newest returns the newest superblock that can be read.
func (sl *slots) newest() (newest *super, err error) {
	for _, s := range sl.super {
		if s != nil && (newest == nil || s.gen > newest.gen) {
			newest = s
		}
	}
	if newest == nil {
		return nil, &CorruptError{Detail: "no superblock slot is readable"}
	}
	return newest, nil
}

// certain reports why the newest superblock that can be read may not be the
// newest that was written: the slots of the generations of the other parity
// hold none, although there must have been one, or both are damaged.
func (sl *slots) certain() error {
	s, err := sl.newest()
	if err != nil {
		return err
	}
	a := int(1 - s.gen%2)
	b := a + superSlots/2
	switch {
	case sl.super[a] != nil || sl.super[b] != nil:
		return nil
	case s.gen == 1 && !(slices.Contains(sl.bad, a) && slices.Contains(sl.bad, b)): // there has been no other
		return nil
	}
	return &CorruptError{Detail: fmt.Sprintf("superblock: slots %d and %d are damaged, and may have held a later generation than %d", a, b, s.gen)}
}

// writeSuper writes both slots of s.gen and makes them durable. The slots of
// the generation before are not touched.
func writeSuper(f vfs.File, s *super) error {
	b := s.encode()
	for i := range uint64(2) {
		if _, err := f.WriteAt(b, int64(s.gen%2+2*i)*slotSize); err != nil {
			return fmt.Errorf("writing superblock: %w", err)
		}
	}
	if err := f.Datasync(); err != nil {
		return fmt.Errorf("syncing superblock: %w", err)
	}
	return nil
}

// createSuper makes the file with its first superblock. The rename is what
// turns a directory into a store.
func createSuper(dir vfs.FS, s *super) (vfs.File, error) {
	f, err := dir.Create(superTemp)
	if err != nil {
		return nil, err
	}
	err = f.Allocate(0, superSlots*slotSize)
	if err == nil {
		err = writeSuper(f, s)
	}
	if err == nil {
		err = dir.SyncDir()
	}
	if err == nil {
		err = dir.Rename(superTemp, superName)
	}
	if err == nil {
		err = dir.SyncDir()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
