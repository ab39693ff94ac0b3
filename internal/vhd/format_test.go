package vhd

import (
	"testing"
	"time"
)

func TestGeometry(t *testing.T) {
	for _, tt := range []struct {
		size int64
		want string
		chs  int64
	}{
		{4 << 20, "120/4/17", 4177920},
		{1 << 30, "2080/16/63", 1073479680},
		{8 << 30, "16644/16/63", 8589901824},
		{24 << 30, "49932/16/63", 25769705472},
		{100 << 30, "51400/16/255", 107372544000},
		{127 << 30, "65278/16/255", 136363130880},
		{136899993600, "65535/16/255", 136899993600},
		{136899993600 - 1<<20, "65534/16/255", 136897904640},
		{2040 << 30, "65535/16/255", 136899993600},
		{65535 * 16 * 63 * 512, "16191/16/255", 33822351360},
		{65535*16*63*512 - 512, "65534/16/63", 33821835264},
		{512, "0/4/17", 0},
		{1, "0/4/17", 0},
	} {
		g := GeometryOf(tt.size)
		if g.String() != tt.want || g.Size() != tt.chs {
			t.Errorf("GeometryOf(%d) = %v, %d bytes; want %s, %d bytes", tt.size, g, g.Size(), tt.want, tt.chs)
		}
	}
	// A geometry never describes more than the disk: tools call that an error.
	for size := int64(512); size <= MaxSize; size += size/7 + 512 {
		if g := GeometryOf(size); g.Size() > size {
			t.Errorf("GeometryOf(%d) = %v describes %d bytes", size, g, g.Size())
		}
	}
}

func TestWellFormed(t *testing.T) {
	for _, tt := range []struct{ in, want [16]byte }{
		{[16]byte{6: 0x40, 8: 0x80}, [16]byte{6: 0x40, 8: 0x80}},
		{[16]byte{6: 0x1F, 8: 0xBF, 15: 9}, [16]byte{6: 0x1F, 8: 0xBF, 15: 9}},
		{[16]byte{6: 0x5F, 8: 0xBF}, [16]byte{6: 0x5F, 8: 0xBF}},
		{[16]byte{}, [16]byte{6: 0x40, 8: 0x80}},
		{[16]byte{6: 0x7A, 8: 0x90}, [16]byte{6: 0x4A, 8: 0x90}},
		{[16]byte{6: 0x4A, 8: 0xFF}, [16]byte{6: 0x4A, 8: 0xBF}},
	} {
		if got := WellFormed(tt.in); got != tt.want {
			t.Errorf("WellFormed(%x) = %x, want %x", tt.in, got, tt.want)
		}
	}
}

func TestTimestamps(t *testing.T) {
	for _, tt := range []struct {
		in   time.Time
		want uint32
	}{
		{time.Time{}, 0},
		{time.Unix(0, 0), 0},
		{time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), 0},
		{time.Date(2000, 1, 1, 0, 0, 1, 0, time.UTC), 1},
		{time.Date(2026, 11, 25, 12, 0, 0, 0, time.FixedZone("", 3600)), 848919600},
		{time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC), 0},
	} {
		if got := toStamp(tt.in); got != tt.want {
			t.Errorf("timestamp of %v is %d, want %d", tt.in, got, tt.want)
		} else if got != 0 && !fromStamp(got).Equal(tt.in) {
			t.Errorf("timestamp %d is %v, want %v", got, fromStamp(got), tt.in)
		}
	}
}
