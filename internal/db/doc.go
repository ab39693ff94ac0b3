// Package db is the object database: every object of the API, in memory, typed, indexed and revisioned, over a
// small store that makes commits durable.
//
// # Records
//
// An object is a reference and a record, which is a pointer to a struct of package xapi. Records are
// immutable. A reader gets the stored record itself and must not change it; Modify hands a clone to its
// function and puts the clone in the place of the original. Built with the tag invariants, the package takes
// a fingerprint of every record it stores and panics when one has changed.
//
// # Transactions
//
// View gives a snapshot: it never waits and never makes anybody wait. Update runs one at a time, all or
// nothing: when its function fails nothing has happened.
//
// An Update that touches what must survive a restart is durable when it returns. Its function runs in memory,
// on top of all earlier updates; the results queue, a committer writes whatever has queued in one batch to
// the store, and only then does the batch become visible, in order. So 500 clients share a few fsyncs instead
// of paying one each. An Update of what lives in memory only (tasks, sessions, current_operations …) never
// touches the store; it just takes its turn in the queue.
//
// When the store fails, the updates of that batch and all queued after it return a *StoreError, nothing of
// them becomes visible, and the database is read-only until it is opened again.
//
// # Relations
//
// Of a relation such as VBD.VDI → VDI.VBDs only the reference is assigned. The set is kept in the record of
// the target by the transaction that changes the reference, and both objects count as modified. References
// may dangle: what refers to an object that does not exist is remembered, and appears in its sets when the
// object is inserted.
//
// # Revisions
//
// Every commit takes the next revision. Each object carries the revision that created it and the one that
// modified it last; a deleted object leaves a tombstone, of which each class keeps the latest few thousand. An object
// under a reference that was used before carries when that was for the first time, so that whoever has seen any of those
// that had it learns when the last one is gone.
// Changes answers from these stamps what happened after a revision, and Wait waits for the next one, of any
// class or of some, so a revision is all that an event token needs to hold. Revisions never go back, not even over a crash: the
// store holds a revision that is ahead of all that were handed out.
//
// # Restarts
//
// With every batch goes an entry of the history: which objects have changed since the entry before, at which revisions
// they were created, modified or deleted, and a digest of what clients were told of them that does not survive a
// restart. It is a row of its own in the same transaction, and a ring: the last 4,096 batches and 32,768 changes are
// kept, about a megabyte. Open gives the objects their revisions back from it; what it does not tell of has not changed
// since the oldest entry. So a Position of an earlier run is good for Since as long as the history goes back that far.
// Otherwise, and when the store was used by a program without history, or the position was never in the history because
// the process was killed before a commit or Sync, everything counts as new to its owner.
//
// Who opens the database calls Settle before others use it, to put back what does not survive a restart. An object
// that is as clients saw it keeps its revision; what had been going on with one at the end, and is not any more, makes
// it a modified one.
package db
