package qcow2

import "container/heap"

// claim is a place ahead in the stream that means something.
type claim struct {
	off  int64 // in the image
	at   int64 // on the disk, in bytes; of an L2 table its index
	n    int64 // bytes in the image
	kind claimKind
}

type claimKind uint8

const (
	claimData claimKind = iota
	claimCompressed
	claimL2
	claimL1
	claimRefTable
	claimRefBlock
	claimHeader
)

func (k claimKind) String() string {
	return [...]string{"data cluster", "compressed cluster", "L2 table", "L1 table", "refcount table", "refcount block", "header"}[k]
}

// claims is a heap of places, the nearest first.
type claims []claim

func (c claims) Len() int           { return len(c) }
func (c claims) Less(i, j int) bool { return c[i].off < c[j].off }
func (c claims) Swap(i, j int)      { c[i], c[j] = c[j], c[i] }
func (c *claims) Push(x any)        { *c = append(*c, x.(claim)) }

func (c *claims) Pop() any {
	last := len(*c) - 1
	x := (*c)[last]
	*c = (*c)[:last]
	return x
}

func (c *claims) add(x claim) { heap.Push(c, x) }
