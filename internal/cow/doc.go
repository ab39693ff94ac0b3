// Package cow is the storage engine: any number of volumes in one store, each
// of which may be snapshotted, cloned, reverted and deleted at any time. The
// first three take the same time whatever the size, the age and the number of
// relatives; a delete is acknowledged at once and its space comes back in the
// background. Every byte read has been verified.
//
// A store is a directory of a few files behind [vfs.FS]. One process has it
// open: [Create] and [Open] return a [Store], [Store.OpenDisk] a [Disk] to
// read and write. [Check], [Repair], [Dump] and [Destroy] work on a store
// that nobody has open.
//
// # Model
//
// A volume maps units of 4 KiB. Its map is a radix tree of pages of 256
// entries; volumes share pages and units. Nothing that is referred to is ever
// overwritten: a change goes to free units, and the way up to the root is
// written anew. Every unit has a counter of the references to it, so a unit
// is free when its counter is zero, whoever let go of it last.
//
// Between checkpoints trees do not change. A volume in memory is a view: the
// root of its tree under a short chain of layers, which hold what has been
// written since:
//
//	top      open: takes writes, is not in the log
//	caught   is being written to the log
//	logged   is in the log
//	sealed…  in the log and final; may lie under several volumes
//	tree     what the last checkpoint wrote
//
// A flush catches the top layer and writes it to the redo log: small writes
// with their contents, large ones, whose contents went to the space files at
// once, by address. Volume operations are records of the log, too. All that
// wait at the same time share a frame, which is one write, durable when it
// returns. A
// snapshot seals the layers of its source and puts them under both volumes;
// that is all it does. Ranges of a volume that another one gets, see
// [Store.CloneRanges], are the one thing that only a checkpoint can do.
//
// A checkpoint cuts all changed volumes at one moment between two frames,
// merges their logged and sealed layers into trees, writes counters and region
// table, and switches over with one write of the superblock, from where the
// log is replayed after a crash. It runs beside everything else.
//
// A merge moves a page whose counter is 1, its children going along, and
// copies one that is shared, each child gaining a reference. A reference to a
// page is given up by putting it on the reap queue, from which the reaper
// takes it within later checkpoints, a slice at a time: when it was the last,
// the page goes and what it refers to follows.
//
// A unit that has lost its last reference is reused only when the checkpoint
// that says so is durable and every read that may still see it has ended.
//
// Each entry carries the birth of its content: the epoch, a number that only
// grows, at which the layer that brought it was sealed. What is in a snapshot
// is no younger than the snapshot. Holes made by zeroing have a birth, too.
//
// # Failure
//
// After a crash a store has everything that was acknowledged as durable; of
// what was not, each unit is old or new. A write that does not fit fails with
// a *[SpaceError] before it is acknowledged; reads, flushes, deletes and
// reverts work on a full store. A unit that fails its checksum twice, and whose
// copy does if it has one, is a *[CorruptError]; [Store.Scrub] looks for such
// units ahead of time and writes anew what has a copy, [Store.Damage] lists what
// is known, and [Repair] puts right what can be while nobody has the store open.
// A damaged map page fails the writes below it; one that a checkpoint meets,
// damaged since, takes the range that it maps with it and not the store. Any failed write or sync of metadata
// makes the store read-only until it is opened again ([ErrFailed]), because
// after a failed sync nobody knows what the device has.
//
// # Format, version 1
//
// Integers are little endian; checksums are CRC32C. Sizes below are those of
// [DefaultGeometry]; a store has those of its superblock. The format is frozen:
// every later version opens a store of version 1. What is zero here is written
// as zero and not looked at.
//
//	super        superblock, 4 slots of 4 KiB
//	regions-0    region table of even generations
//	regions-1    region table of odd generations
//	space-0000…  units, 1 TiB per file
//	log          redo log, a ring of frames
//
// A unit is named by its address, 40 bits: its number in all space files, one
// behind the other. 8192 units are a region, 32 MiB, which begins with its own
// counters:
//
//	unit 0       8        16                                        8191
//	     ┌────────┬────────┬──────────────────────────────────────────┐
//	     │counters│counters│ data, map pages, table and queue         │
//	     │ copy 0 │ copy 1 │                                          │
//	     └────────┴────────┴──────────────────────────────────────────┘
//
// A counter page is 1024 counters of 4 bytes. A checkpoint writes a changed
// page over the copy that the generation before does not use.
//
// Entry, 16 bytes, the only kind of reference:
//
//	0         5         10       14   15   16
//	┌─────────┬─────────┬────────┬────┬─────┐   kind 0 hole
//	│ address │  birth  │ CRC of │kind│level│        1 data
//	│         │ (epoch) │the unit│    │     │        2 page
//	└─────────┴─────────┴────────┴────┴─────┘        3 lost
//
// The level is that of a page, 1 for a leaf, 0 otherwise; its bit 7 says that
// there is a copy of the unit, at the same place of the next region. A hole
// reads as zero. What is lost cannot be read: it stands where a page was that
// was damaged. Both have neither address nor CRC. Any other kind, or bit, is
// damage: 4 is reserved for compressed and 5 for encrypted contents.
//
// Pages of level 2 and above, all of the volume table and the blocks of the
// reap queue have copies where there is ample room. A unit and its copy have
// the same references, counted for both.
//
// A map page is 256 entries: data in a leaf, pages of the level below
// elsewhere, holes and what is lost in both. Entry i of a page of level l maps 256^(l-1) units. The
// level of a root is the height of its tree; units beyond a tree are holes of
// birth 0, and a tree grows by a new root whose entry 0 is the old one. It never
// shrinks, so that holes keep their births: the root of a volume that has been
// zeroed is a page of holes.
//
// Superblock, 512 bytes at the start of a slot. Generation g is in slots
// g mod 2 and g mod 2 + 2; the newest that is valid counts. A store both of
// whose slots of one generation are damaged is refused, because they may have
// held the newest:
//
//	 0  8 "COPPICE\n"               88  8 next volume number
//	 8  4 version, 1                96  8 log position: byte,
//	12  4 compatible features      104  8   number of the frame,
//	16  4 read-only features       112  4   payload CRC of the one before
//	20  4 incompatible features    116  4 CRC over the CRCs of the pages
//	24  4 unit size                         of the region table
//	28  4 entries per page         120 16 entry: root of the volume table
//	32  4 counters per page        136 16 entry: top block of the reap queue
//	36  4 regions per file         152  8 entries in the reap queue
//	40 16 store UUID               160  8 regions
//	56 16 log key                  168  8 bytes of the log
//	72  8 generation               176    zero
//	80  8 epoch                    508  4 CRC of bytes 0 to 507
//
// Bytes 0 to 23 and the CRC are the same in every version. A store of another
// version, or with an unknown incompatible feature, is refused; one with an
// unknown read-only feature is read and not written; unknown compatible
// features are kept. Version 1 has none of all three.
//
// Region table: 64 bytes per region in pages of 4 KiB. Generation g rewrites,
// in its file, the pages that changed in g or g-1:
//
//	 0 32 CRC of the valid copy of each of the 8 counter pages
//	32  1 bit k: the valid copy of page k is copy 1
//	33  1 bit k: all counters of page k are zero and the page is not read
//	34  1 zero
//	35  1 bit 0: the host has no space behind the units from 16 on
//	36  4 units whose counter is zero, counter pages not counted
//	40    zero
//
// Volume table: a tree like any other, whose units are 16 records of 256
// bytes. Record n is at place n mod 16 of unit n / 16:
//
//	 0  8 number n, never reused; 0 if there is no such volume
//	 8 16 ID
//	24  4 flags: 1 read-only, 2 pin, 4 mapped units are an upper bound,
//	     8 the contents have been given up
//	28  4 bytes of the attribute blob
//	32  8 size in bytes
//	40  8 number of the parent, 0 for none
//	48  8 epoch at which a read-only volume was sealed
//	56  8 mapped units
//	64 16 entry: root of the map
//	80 16 entry: attribute blob: one data unit, or a leaf of them
//	96    zero
//
// A pin keeps the contents of an open pinned disk; opening a store removes it.
//
// Reap queue: a stack in a chain of blocks. A block is the entry of the block
// below, of kind data, and 255 entries of roots to be given up.
//
// Log: frames, each at a multiple of the alignment: 4 KiB, or the unit size
// where that is less. The greatest frame is a quarter of the ring, at most 8
// MiB, rounded down to the alignment; one that would have less than that before
// the end of the ring is at byte 0. CRCs of a frame start from the CRC of the log key, so
// that no data in a volume passes for a frame:
//
//	 0  8 "COWFRAME"                44  4 bytes of payload
//	 8 16 store UUID                48  4 CRC of the payload
//	24  8 generation of the         52  8 zero
//	      superblock then           60  4 CRC of bytes 0 to 59
//	32  8 frame number              64    payload
//	40  4 payload CRC of the frame before
//
// A new log is zeros; it ends where a frame of the right number does not
// follow. The payload is records, applied in order; each starts with its kind,
// 1 byte, and a volume number, 8 bytes:
//
//	'W' first unit 8, count 8, contents of the units
//	'M' first unit 8, count 8, address 8, CRC of each unit 4: adjoining units
//	    in the space files, which were durable before the frame was written
//	'Z' first unit 8, count 8: zeros
//	'C' ID 16, size 8, attributes (length 4, bytes): create
//	'S' epoch 8, flags 4, pairs 4; for each pair source 8, number 8, ID 16,
//	    own attributes 1, attributes: snapshots or clones, of one instant
//	'R' epoch 8, source 8: revert      'L' epoch 8, size 8: resize
//	'D' delete                         'A' attributes
//	'X' give up the contents of a snapshot
package cow
