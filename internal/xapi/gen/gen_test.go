package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// TestUpToDate compares the files in the repository with what the generator writes now.
func TestUpToDate(t *testing.T) {
	data, err := os.ReadFile("../datamodel.json")
	if err != nil {
		t.Fatal(err)
	}
	files, err := generate(data)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 3 {
		t.Fatalf("generated %d files, want 3", len(files))
	}
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is out of date: run go generate ./internal/xapi", name)
		}
	}
}

func TestNames(t *testing.T) {
	for in, want := range map[string]string{
		"name_label":            "NameLabel",
		"SR":                    "SR",
		"is_a_snapshot":         "IsASnapshot",
		"uuid":                  "UUID",
		"VCPUs_max":             "VCPUsMax",
		"HVM_boot_params":       "HVMBootParams",
		"vdi_nbd_server_info":   "VDINBDServerInfo",
		"sm_config":             "SMConfig",
		"balance-slb":           "BalanceSlb",
		"snapshot_with_quiesce": "SnapshotWithQuiesce",
	} {
		if got := goName(in); got != want {
			t.Errorf("goName(%q) = %q, want %q", in, got, want)
		}
	}
	if got, want := errorName("VDI_IN_USE"), "ErrVDIInUse"; got != want {
		t.Errorf("errorName = %q, want %q", got, want)
	}
}

func TestGoType(t *testing.T) {
	for in, want := range map[string]string{
		"datetime":                               "time.Time",
		"enum vdi_type set":                      "[]VDIType",
		"VDI ref":                                "Ref[VDI]",
		"sr_stat record option":                  "*SRStat",
		"string option":                          "*string",
		"(VGPU_type ref -> int) map":             "map[Ref[VGPUType]]int64",
		"(VM ref -> (string -> string) map) map": "map[Ref[VM]]map[string]string",
		"(enum vm_operations -> string) map":     "map[VMOperations]string",
	} {
		got, err := goType(in)
		if err != nil || got != want {
			t.Errorf("goType(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"", "VDI", "(string) map", "enum a b"} {
		if got, err := goType(in); err == nil {
			t.Errorf("goType(%q) = %q, want an error", in, got)
		}
	}
}
