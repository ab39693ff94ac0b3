package vhd

import (
	"iter"
	"math/bits"
)

// BlockSet is a set of block indexes of one disk, one bit for each block.
type BlockSet struct {
	words  []uint64
	blocks int64 // of the disk
	count  int64 // in the set
}

// NewBlockSet returns an empty set for a disk of size bytes.
func NewBlockSet(size int64) *BlockSet {
	blocks := (size + BlockSize - 1) / BlockSize
	return &BlockSet{words: make([]uint64, (blocks+63)/64), blocks: blocks}
}

// Add puts every block into the set that the bytes [off, off+n) of the disk
// touch.
func (s *BlockSet) Add(off, n int64) {
	if n <= 0 {
		return
	}
	for i := off / BlockSize; i <= (off+n-1)/BlockSize; i++ {
		if bit := uint64(1) << (i & 63); s.words[i>>6]&bit == 0 {
			s.words[i>>6] |= bit
			s.count++
		}
	}
}

// Has tells whether the block is in the set.
func (s *BlockSet) Has(index int64) bool {
	return index >= 0 && index < s.blocks && s.words[index>>6]&(1<<(index&63)) != 0
}

// Len is the number of blocks in the set.
func (s *BlockSet) Len() int64 { return s.count }

// All yields the blocks of the set in ascending order.
func (s *BlockSet) All() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for i := s.next(0); i >= 0 && yield(i); i = s.next(i + 1) {
		}
	}
}

// next returns the first block of the set from index on, -1 when there is none.
func (s *BlockSet) next(index int64) int64 {
	for i := index >> 6; i < int64(len(s.words)); i++ {
		word := s.words[i]
		if i == index>>6 {
			word &= ^uint64(0) << (index & 63)
		}
		if word != 0 {
			return i<<6 + int64(bits.TrailingZeros64(word))
		}
	}
	return -1
}
