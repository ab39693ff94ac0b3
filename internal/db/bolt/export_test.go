package bolt

// SetFree replaces what Commit asks for the room on the file system.
func (s *Store) SetFree(free func() (int64, error)) { s.free = free }
