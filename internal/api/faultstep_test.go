//go:build !invariants

package api

// faultStep is how far apart the calls are that the sweeps over operations on
// VMs let fail: each of them, here.
const faultStep = 1
