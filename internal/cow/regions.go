package cow

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"coppice/internal/vfs"
)

const (
	regionRecordSize = 64
	tablePageSize    = 4096
	tablePageRecords = tablePageSize / regionRecordSize
)

// regionRecord says which copies of a region's counter pages are valid.
type regionRecord struct {
	crc      [pagesPerRegion]uint32
	second   uint8 // bit k: the valid copy of page k is the second one
	zero     uint8 // bit k: all counters of page k are zero, whatever the file says
	unbacked bool  // the host holds no space for the region
	free     uint32
}

const flagUnbacked = 1 << 0

func (r *regionRecord) put(b []byte) {
	le := binary.LittleEndian
	clear(b[:regionRecordSize])
	for k, c := range r.crc {
		le.PutUint32(b[4*k:], c)
	}
	b[32], b[33] = r.second, r.zero
	if r.unbacked {
		b[35] = flagUnbacked
	}
	le.PutUint32(b[36:], r.free)
}

func getRegionRecord(b []byte, g Geometry) (regionRecord, error) {
	le := binary.LittleEndian
	var r regionRecord
	for k := range r.crc {
		r.crc[k] = le.Uint32(b[4*k:])
	}
	r.second, r.zero = b[32], b[33]
	r.unbacked = b[35]&flagUnbacked != 0
	r.free = le.Uint32(b[36:])
	if int64(r.free) > int64(g.dataUnits()) || r.unbacked && int(r.free) != g.dataUnits() {
		return r, fmt.Errorf("%d free units", r.free)
	}
	return r, nil
}

func regionsName(gen uint64) string { return fmt.Sprintf("regions-%d", gen%2) }

// regionTable is the pair of files that hold the table of even and of odd
// generations. Generation g rewrites in its file the pages that changed in g
// or in g-1; the other pages there are still those of g-2 and right.
type regionTable struct {
	file  [2]vfs.File
	dirty [2]map[int]struct{} // pages to write into the file of either parity
	crc   []uint32            // of each page, as last written or read
}

// allocate has the host provide the space for the record of a region in both
// files, so that no generation is kept from being written by a full host.
func (t *regionTable) allocate(region int) error {
	for i, f := range t.file {
		if err := f.Allocate(int64(region/tablePageRecords)*tablePageSize, tablePageSize); err != nil {
			return fmt.Errorf("growing %s: %w", regionsName(uint64(i)), err)
		}
	}
	return nil
}

// mark notes that the record of a region has changed.
func (t *regionTable) mark(region int) {
	for i := range t.dirty {
		t.dirty[i][region/tablePageRecords] = struct{}{}
	}
}

// read loads the table of generation gen.
func (t *regionTable) read(gen uint64, n int, want uint32, g Geometry) ([]regionRecord, error) {
	fail := func(detail string, cause error) ([]regionRecord, error) {
		return nil, &CorruptError{Detail: "region table: " + detail, Cause: cause}
	}
	pages := (n + tablePageRecords - 1) / tablePageRecords
	f := t.file[gen%2]
	if size, err := f.Size(); err != nil {
		return fail("size", err)
	} else if size < int64(pages)*tablePageSize {
		return fail("file is short", nil)
	}
	var recs []regionRecord
	b := make([]byte, tablePageSize)
	t.crc = nil
	t.dirty = [2]map[int]struct{}{{}, {}}
	for p := range pages {
		if _, err := f.ReadAt(b, int64(p)*tablePageSize); err != nil && !errors.Is(err, io.EOF) {
			return fail(fmt.Sprintf("page %d", p), err)
		}
		t.crc = append(t.crc, checksum(b))
		t.dirty[1-gen%2][p] = struct{}{} // nothing is known about the other file
		for i := range min(tablePageRecords, n-p*tablePageRecords) {
			r, err := getRegionRecord(b[i*regionRecordSize:], g)
			if err != nil {
				return fail(fmt.Sprintf("region %d", len(recs)), err)
			}
			recs = append(recs, r)
		}
	}
	if t.sum() != want {
		return fail("checksum mismatch", nil)
	}
	return recs, nil
}

// sum is the checksum of the page checksums.
func (t *regionTable) sum() uint32 {
	b := make([]byte, 4*len(t.crc))
	for i, c := range t.crc {
		binary.LittleEndian.PutUint32(b[4*i:], c)
	}
	return checksum(b)
}

// encode returns the pages that generation gen has to write, and the checksum
// of the whole table. record returns the record of a region.
func (t *regionTable) encode(gen uint64, n int, record func(int) regionRecord) (map[int][]byte, uint32) {
	pages := (n + tablePageRecords - 1) / tablePageRecords
	for len(t.crc) < pages {
		t.crc = append(t.crc, 0)
	}
	out := make(map[int][]byte, len(t.dirty[gen%2]))
	for p := range t.dirty[gen%2] {
		b := make([]byte, tablePageSize)
		for i := range min(tablePageRecords, n-p*tablePageRecords) {
			r := record(p*tablePageRecords + i)
			r.put(b[i*regionRecordSize:])
		}
		t.crc[p] = checksum(b)
		out[p] = b
	}
	clear(t.dirty[gen%2])
	return out, t.sum()
}

// write stores encoded pages in the file of generation gen and makes them
// durable.
func (t *regionTable) write(gen uint64, pages map[int][]byte) error {
	f := t.file[gen%2]
	for p, b := range pages {
		if _, err := f.WriteAt(b, int64(p)*tablePageSize); err != nil {
			return fmt.Errorf("writing region table: %w", err)
		}
	}
	if err := f.Datasync(); err != nil {
		return fmt.Errorf("syncing region table: %w", err)
	}
	return nil
}

func (t *regionTable) close() error {
	var errs []error
	for _, f := range t.file {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}
