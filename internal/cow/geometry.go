package cow

import (
	"fmt"
	"math/bits"
)

// pagesPerRegion is the number of counter pages of a region; each exists
// twice. It is part of the format: a region record has a bit for each.
const pagesPerRegion = 8

// Geometry is the set of sizes that a store is built from. It is written in
// the superblock and never changes. Tests use tiny ones, in which every
// boundary is a few units away.
type Geometry struct {
	UnitSize       int // bytes of a unit, the grain of mapping, sharing and checksums
	Fanout         int // entries of a map page
	PageCounters   int // reference counters of a counter page
	RegionsPerFile int // regions of one space file
}

// DefaultGeometry is the geometry of an ordinary store: units of 4 KiB,
// regions of 32 MiB, space files of 1 TiB.
func DefaultGeometry() Geometry {
	return Geometry{UnitSize: 4096, Fanout: 256, PageCounters: 1024, RegionsPerFile: 1 << 15}
}

func (g Geometry) validate() error {
	pow2 := func(n int) bool { return n > 0 && n&(n-1) == 0 }
	switch {
	case !pow2(g.UnitSize) || g.UnitSize < 512 || g.UnitSize > 64<<10:
		return fmt.Errorf("%w: unit size %d", ErrInvalid, g.UnitSize)
	case !pow2(g.Fanout) || g.Fanout < 4 || g.Fanout*entrySize > g.UnitSize:
		return fmt.Errorf("%w: fan-out %d", ErrInvalid, g.Fanout)
	case !pow2(g.PageCounters) || g.PageCounters < 4 || g.PageCounters*4 > g.UnitSize:
		return fmt.Errorf("%w: %d counters per page", ErrInvalid, g.PageCounters)
	case g.RegionsPerFile < 1 || g.RegionsPerFile > 1<<20:
		return fmt.Errorf("%w: %d regions per file", ErrInvalid, g.RegionsPerFile)
	}
	return nil
}

// regionUnits is the number of units of a region, counter pages included.
func (g Geometry) regionUnits() int { return pagesPerRegion * g.PageCounters }

// metaUnits is the number of units at the start of a region that hold its
// counter pages.
func (g Geometry) metaUnits() int { return 2 * pagesPerRegion }

// dataUnits is the number of units of a region that can be allocated.
func (g Geometry) dataUnits() int { return g.regionUnits() - g.metaUnits() }

// regionBytes is the size of a region in its space file.
func (g Geometry) regionBytes() int64 { return int64(g.regionUnits()) * int64(g.UnitSize) }

// maxRegions is how many regions 40 bits of address can name.
func (g Geometry) maxRegions() int { return int(maxAddr / uint64(g.regionUnits())) }

// spaceFiles is how many files hold the given number of regions.
func (g Geometry) spaceFiles(regions int) int {
	return (regions + g.RegionsPerFile - 1) / g.RegionsPerFile
}

// copyOf is where the copy of a unit is that has one: at the same place of
// the next region, so that a stretch of the medium that goes bad takes one of
// the two.
func (g Geometry) copyOf(addr uint64) uint64 { return addr + uint64(g.regionUnits()) }

// frameAlign is what frames of the log begin at multiples of: a page of the
// host, or a unit if that is smaller.
func (g Geometry) frameAlign() uint64 { return uint64(min(g.UnitSize, 4096)) }

// fanBits is log2 of the fan-out.
func (g Geometry) fanBits() uint { return uint(bits.TrailingZeros(uint(g.Fanout))) }

// span is the number of units below one entry of a page of the given level;
// a tree of height h maps span(h) units.
func (g Geometry) span(level int) uint64 {
	if s := uint(level) * g.fanBits(); s < 63 {
		return 1 << s
	}
	return 1 << 63
}

// height is the height of the smallest tree that maps n units, at least 1.
func (g Geometry) height(n uint64) int {
	h := 1
	for g.span(h) < n {
		h++
	}
	return h
}

// units is the number of units that n bytes take.
func (g Geometry) units(n int64) uint64 {
	return uint64(n+int64(g.UnitSize)-1) / uint64(g.UnitSize)
}

// maxAttrs is the largest attribute blob: MaxAttrs, or one page of units.
func (g Geometry) maxAttrs() int { return min(MaxAttrs, g.Fanout*g.UnitSize) }

// recordsPerUnit is the number of volume records in a leaf of the table.
func (g Geometry) recordsPerUnit() int { return g.UnitSize / recordSize }

// linksPerUnit is the number of queue entries in a block of the reap queue.
func (g Geometry) linksPerUnit() int { return g.UnitSize/entrySize - 1 }
