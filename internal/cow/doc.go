// Package cow is the storage engine: volumes in one store, of which any may
// be snapshotted, cloned, reverted and deleted at any time in constant time.
package cow
