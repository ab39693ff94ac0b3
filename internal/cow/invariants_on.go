//go:build invariants || race

package cow

// invariants turns on checks that cost too much for ordinary use, and makes
// released units unreadable so that a use after release shows.
const invariants = true
