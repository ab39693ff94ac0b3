package cow

import (
	"encoding/binary"
	"testing"
)

func FuzzSuper(f *testing.F) {
	good := (&super{geo: tiny, gen: 3, epoch: 9, nextID: 4, regions: 2, logSize: 64 << 10, table: entry{addr: 20, kind: kindPage, level: 2}}).encode()
	f.Add(good)
	f.Add([]byte(superMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= superSize { // let the fuzzer past the checksum
			binary.LittleEndian.PutUint32(b[superSize-4:], checksum(b[:superSize-4]))
		}
		s, err := decodeSuper(b)
		if err != nil {
			return
		}
		if again, err := decodeSuper(s.encode()); err != nil || *again != *s {
			t.Errorf("%+v decodes to %+v, %v", s, again, err)
		}
	})
}

func FuzzRecord(f *testing.F) {
	b := make([]byte, recordSize)
	(&record{num: 3, id: ID{1}, flags: flagReadOnly, size: 4096, mapped: 2, root: entry{addr: 20, birth: 3, kind: kindPage, level: 1}}).put(b)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < recordSize {
			return
		}
		r, err := getRecord(b, tiny)
		if err != nil || r.num == 0 {
			return
		}
		again := make([]byte, recordSize)
		r.put(again)
		if got, err := getRecord(again, tiny); err != nil || got != r {
			t.Errorf("%+v decodes to %+v, %v", r, got, err)
		}
	})
}

func FuzzRegionRecord(f *testing.F) {
	b := make([]byte, regionRecordSize)
	(&regionRecord{crc: [8]uint32{1, 2, 3}, second: 5, zero: 0xf0, free: 7}).put(b)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < regionRecordSize {
			return
		}
		r, err := getRegionRecord(b, tiny)
		if err != nil {
			return
		}
		again := make([]byte, regionRecordSize)
		r.put(again)
		if got, err := getRegionRecord(again, tiny); err != nil || got != r {
			t.Errorf("%+v decodes to %+v, %v", r, got, err)
		}
	})
}

func FuzzQueueBlock(f *testing.F) {
	f.Add(encodeBlock(tiny, entry{addr: 30, kind: kindData}, []entry{{addr: 20, kind: kindPage, level: 1}}), 1)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		if len(b) < tiny.UnitSize || n < 0 || n > tiny.linksPerUnit() {
			return
		}
		_, ents, err := decodeBlock(tiny, b, n)
		if err == nil && len(ents) != n {
			t.Errorf("%d entries, want %d", len(ents), n)
		}
	})
}

func FuzzEntry(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < entrySize {
			return
		}
		e := getEntry(b)
		again := make([]byte, entrySize)
		e.put(again)
		if string(again) != string(b[:entrySize]) {
			t.Errorf("%x decodes to %+v and encodes to %x", b[:entrySize], e, again)
		}
	})
}

// FuzzOpen edits a store and uses it. An edit is a file, an offset and a
// byte; superblocks get right checksums again, so that the code behind them
// is reached.
func FuzzOpen(f *testing.F) {
	m, data := sample(f)
	names, err := m.List()
	if err != nil {
		f.Fatal(err)
	}
	for i := range names {
		f.Add([]byte{byte(i), 0, 100, 0xff, byte(i), 40, 20, 1})
	}
	f.Fuzz(func(t *testing.T, edits []byte) {
		c := m.Kill()
		super := false
		for ; len(edits) >= 4; edits = edits[4:] {
			name := names[int(edits[0])%len(names)]
			super = super || name == superName
			_ = flip(c, name, int64(edits[1])<<8|int64(edits[2]), edits[3]) // past the end: no edit
		}
		want := data
		if super {
			file, err := c.Open(superName)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, superSize)
			for slot := range int64(superSlots) {
				if _, err := file.ReadAt(b, slot*slotSize); err != nil {
					t.Fatal(err)
				}
				binary.LittleEndian.PutUint32(b[superSize-4:], checksum(b[:superSize-4]))
				if _, err := file.WriteAt(b, slot*slotSize); err != nil {
					t.Fatal(err)
				}
			}
			want = nil // a forged superblock may describe another store
		}
		if err := useDamaged(c, want); err != nil {
			t.Error(err)
		}
		_ = checkClean(c) // must return
	})
}
