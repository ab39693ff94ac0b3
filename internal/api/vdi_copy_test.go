package api

import (
	"bytes"
	"testing"
)

// A delta of its own, merged into a copy of its base, makes the original,
// ranges that have become zero included, also after a restart, a copy and a
// clone of the delta; what the delta has nothing about stays.
func TestVDICopyDeltaZeros(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		base := r.disk(6 << 20)
		r.write(base, bytes.Repeat([]byte("a"), 5<<20), 0)
		disk := r.call("VDI.clone", base).(vdiRef)
		r.write(disk, []byte("b"), 4096)
		zero := func(off, n int64) {
			v := r.volume(disk)
			if err := v.Zero(t.Context(), off, n); err != nil {
				t.Fatal(err)
			}
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
		}
		zero(64<<10, 4096)
		zero(1<<20, 2<<20)
		zero(5<<20-4096, 4096+512)
		delta := r.call("VDI.copy", disk, string(r.sr), base).(vdiRef)
		if got := record(r.core, delta).SMConfig[zeroedKey]; got != "16+1,239+512,511+1" {
			t.Errorf("the delta remembers %q", got)
		}
		p := r.contents(delta)
		if p[4096] != 'b' || p[0] != 0 {
			t.Error("the delta is not what changed")
		}
		uuids := []string{}
		for _, v := range []vdiRef{
			delta, r.call("VDI.clone", delta).(vdiRef), r.call("VDI.snapshot", delta).(vdiRef), r.call("VDI.copy", delta, string(r.sr)).(vdiRef),
		} {
			uuids = append(uuids, record(r.core, v).UUID)
		}
		r.restart()
		r.call("VDI.forget", r.ref(uuids[0]))
		r.call("SR.scan", string(r.sr))
		for _, uuid := range uuids {
			into := r.call("VDI.copy", base, string(r.sr)).(vdiRef)
			r.write(into, []byte("its own"), 5<<20+8192)
			r.call("VDI.copy", r.ref(uuid), "OpaqueRef:NULL", "OpaqueRef:NULL", into)
			got, want := r.contents(into), r.contents(disk)
			copy(want[5<<20+8192:], "its own")
			if !bytes.Equal(got, want) {
				t.Error("base and delta do not make the original")
			}
			r.destroy(into)
		}
		// What is written over a zeroed range counts, not that it was zeroed.
		written := r.ref(uuids[1])
		r.write(written, []byte("c"), 64<<10)
		into := r.call("VDI.copy", base, string(r.sr)).(vdiRef)
		r.call("VDI.copy", written, "OpaqueRef:NULL", "OpaqueRef:NULL", into)
		if got := r.contents(into); got[64<<10] != 'c' || got[1<<20] != 0 {
			t.Errorf("merged %q and %d", got[64<<10], got[1<<20])
		}
		r.destroy(into, base, disk)
		for _, uuid := range uuids {
			r.destroy(r.ref(uuid))
		}
	})
}

// With a base and a destination, sectors that do not differ are left alone.
func TestVDICopySectors(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		base := r.disk(2 << 20)
		r.write(base, bytes.Repeat([]byte("a"), 1<<20), 0)
		disk := r.call("VDI.clone", base).(vdiRef)
		r.write(disk, []byte("b"), 4096+512)
		r.write(disk, make([]byte, 512), 8192+1024)
		r.write(disk, make([]byte, 64<<10), 512<<10) // a hole
		into := r.call("VDI.clone", base).(vdiRef)
		r.write(into, bytes.Repeat([]byte("i"), 512), 4096)
		r.write(into, bytes.Repeat([]byte("i"), 512), 8192)
		r.write(into, bytes.Repeat([]byte("i"), 512), 512<<10)
		want := r.contents(into)
		want[4096+512] = 'b'
		clear(want[8192+1024 : 8192+1536])
		clear(want[512<<10 : 576<<10])
		r.call("VDI.copy", disk, "OpaqueRef:NULL", base, into)
		if got := r.contents(into); !bytes.Equal(got, want) {
			t.Error("sectors that do not differ from the base were copied, or others were not")
		}
		r.destroy(base, disk, into)
	})
}
