package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/google/uuid"

	"coppice/internal/cow"
	"coppice/internal/vfs"
)

// dump prints the inside of one store that nobody has open: superblock, volumes
// and log, or with --volume the record and the map of one volume.
func dump(ctx context.Context, e env, args []string) (err error) {
	ctx, unhook := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer unhook()
	flags := flag.NewFlagSet("dump", flag.ContinueOnError)
	place := dataFlag(flags)
	volumeFlag := flags.String("volume", "", "`UUID` of the volume whose record and map to print instead")
	if err := parse(e, flags, args, 1); err != nil {
		return err
	}
	var volume cow.ID
	if *volumeFlag != "" {
		id, err := uuid.Parse(*volumeFlag)
		if err != nil {
			return fmt.Errorf("--volume %s: %w", *volumeFlag, err)
		}
		volume = cow.ID(id)
	}
	path := flags.Arg(0)
	if path == "" {
		data, err := e.dataDir(*place)
		if err != nil {
			return err
		}
		path = data.defaultStore()
	}
	dir, err := vfs.OpenDir(path)
	if err != nil {
		return explainStore(path, err)
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if err := cow.Dump(ctx, dir, e.stdout, volume); err != nil {
		return explainStore(path, err)
	}
	return nil
}

// explainStore adds to an error of a store what can be done.
func explainStore(path string, err error) error {
	if errors.Is(err, vfs.ErrLocked) {
		return &hinted{lockedError{"store " + filepath.Clean(path)}, "A coppice server is using it. Stop it first."}
	}
	err = fmt.Errorf("store %s: %w", filepath.Clean(path), err)
	if errors.Is(err, cow.ErrNoStore) || errors.Is(err, syscall.ENOTDIR) {
		return &hinted{err, "A store is a directory with a file \"" + superblock + "\"; --data DIR stands for all stores of a data directory."}
	}
	if errors.Is(err, cow.ErrCorrupt) && errors.Is(err, fs.ErrNotExist) {
		return &hinted{err, "Put the file back from a copy, or run \"coppice check --repair\", with --accept-loss if what was in it may be given up."}
	}
	return err
}
