//go:build invariants

package api

// faultStep is how far apart the calls are that the sweeps over operations on
// VMs let fail. Where every record is compared with its fingerprint a step
// takes many times as long, and a part of them must do: another one in each run.
const faultStep = 5
