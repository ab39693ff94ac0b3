//go:build !linux

package thincli

import (
	"errors"
	"os"
)

// unnamedFile is a new file that has no name yet. Only Linux has that.
type unnamedFile struct{ *os.File }

func createUnnamed(string) (*unnamedFile, error) { return nil, errors.ErrUnsupported }

func (*unnamedFile) link(string) error { return errors.ErrUnsupported }

func (*unnamedFile) syncDir() error { return errors.ErrUnsupported }

func (*unnamedFile) closeDir() {}
