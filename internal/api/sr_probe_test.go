package api

import (
	"testing"

	"coppice/internal/xapi"
)

// probe_ext describes the SR at a configuration while it is attached, while it
// is not, and when only its store is left.
func TestSRProbeExt(t *testing.T) {
	onDrivers(t, func(t *testing.T, r *rig) {
		sr := xapi.Ref[xapi.SR](r.secondSR())
		pbd, uuid := xapi.Ref[xapi.PBD](r.pbd(sr)), record(r.core, sr).UUID
		config := record(r.core, pbd).DeviceConfig
		probe := func(want xapi.SRHealth, name string) {
			t.Helper()
			all := r.call("SR.probe_ext", r.host, config, r.driver.Type, map[string]string{}).([]*xapi.ProbeResult)
			if len(all) != 1 || all[0].SR == nil || all[0].SR.UUID == nil {
				t.Fatalf("%+v", all)
			}
			got := all[0].SR
			if *got.UUID != uuid || got.NameLabel != name || got.Health != want || !all[0].Complete || all[0].Configuration["location"] != config["location"] {
				t.Errorf("%+v, %+v", all[0], got)
			}
			if got.TotalSpace <= 0 || got.FreeSpace < 0 || got.FreeSpace > got.TotalSpace {
				t.Errorf("space %d of %d", got.FreeSpace, got.TotalSpace)
			}
		}
		probe(xapi.SRHealthHealthy, "second")
		r.call("PBD.unplug", string(pbd))
		probe(xapi.SRHealthUnavailable, "second")
		r.call("SR.forget", string(sr))
		probe(xapi.SRHealthHealthy, "")

		drv, err := r.API.driver(r.driver.Type)
		if err := cmpErr(err, drv.Destroy(t.Context(), config)); err != nil {
			t.Fatal(err)
		}
		all := r.call("SR.probe_ext", r.host, config, r.driver.Type, map[string]string{}).([]*xapi.ProbeResult)
		if len(all) != 1 || all[0].SR != nil || !all[0].Complete {
			t.Errorf("where there is no store: %+v", all)
		}
		if list := r.call("SR.probe", r.host, config, r.driver.Type, map[string]string{}); list != "<SRlist></SRlist>" {
			t.Errorf("where there is no store: %s", list)
		}
		sr = r.call("SR.introduce", uuid, "again", "", r.driver.Type, "user", false).(xapi.Ref[xapi.SR])
		again := r.call("PBD.create", map[string]any{"host": string(r.host), "SR": string(sr), "device_config": wireOf(config)}).(xapi.Ref[xapi.PBD])
		if _, err := r.try(r.root, "PBD.plug", string(again)); code(err) != "SR_BACKEND_FAILURE_47" {
			t.Errorf("plugging what is gone: %v", err)
		}
	})
}

func TestSRProbeExtErrors(t *testing.T) {
	r := newRig(t)
	r.fails("SR_UNKNOWN_DRIVER|nfs", "SR.probe_ext", r.host, map[string]string{}, "nfs", map[string]string{})
	r.fails("HANDLE_INVALID|host|OpaqueRef:x", "SR.probe_ext", "OpaqueRef:x", map[string]string{}, r.driver.Type, map[string]string{})
}

// An SR has nothing to record, and keeps no pool's database.
func TestSRWithoutServices(t *testing.T) {
	r := newRig(t)
	sr := string(r.sr)
	if got := r.call("SR.get_data_sources", sr).([]*xapi.DataSource); len(got) != 0 {
		t.Errorf("data sources %v", got)
	}
	for _, message := range []string{"SR.query_data_source", "SR.record_data_source", "SR.forget_data_source_archives"} {
		r.fails("INVALID_VALUE|data_source|io", message, sr, "io")
	}
	for _, message := range []string{"SR.assert_can_host_ha_statefile", "SR.assert_supports_database_replication", "SR.enable_database_replication"} {
		r.fails("SR_OPERATION_NOT_SUPPORTED|"+sr, message, sr)
	}
	r.call("SR.disable_database_replication", sr)
	disk := r.disk(2 << 20)
	r.fails("VDI_INCOMPATIBLE_TYPE|"+string(disk)+"|user", "VDI.open_database", disk)
	if got := r.call("VDI.read_database_pool_uuid", disk); got != "" {
		t.Errorf("pool %q", got)
	}
}
