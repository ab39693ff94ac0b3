package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"

	"coppice/internal/cow"
	"coppice/internal/db"
	"coppice/internal/db/bolt"
	"coppice/internal/vfs"
	"coppice/internal/xapi"
)

// superblock is the file by which a store is recognised.
const superblock = "super"

// check reads every page and counts every reference of stores that nobody
// has open, and prints every problem it finds.
func check(ctx context.Context, e env, args []string) error {
	ctx, unhook := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer unhook()
	flags := flag.NewFlagSet("check", flag.ContinueOnError)
	dataFlag := flags.String("data", "", dataUsage)
	if err := parse(e, flags, args, -1); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return checkStores(ctx, e, flags.Args())
	}
	data, err := e.dataDir(*dataFlag)
	if err != nil {
		return err
	}
	return data.check(ctx, e)
}

// check checks every store of the data directory, whose lock it holds
// meanwhile.
func (d dataDir) check(ctx context.Context, e env) (err error) {
	dir, lock, err := d.open(false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close(), dir.Close()) }()
	stores, err := d.stores(ctx)
	if err != nil {
		return err
	}
	if len(stores) == 0 {
		fmt.Fprintln(e.stdout, "there is no store yet")
	}
	return checkStores(ctx, e, stores)
}

// checkStores checks one store after the other.
func checkStores(ctx context.Context, e env, stores []string) error {
	total := 0
	for _, store := range stores {
		n, err := checkStore(ctx, e, store)
		if err != nil {
			return explainStore(store, err)
		}
		total += n
	}
	if total > 0 {
		return badNews{fmt.Errorf("%d problems found", total)}
	}
	return nil
}

// checkStore checks the store in one directory and returns the number of
// problems, all of them printed.
func checkStore(ctx context.Context, e env, path string) (problems int, err error) {
	dir, err := vfs.OpenDir(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	for p, err := range cow.Check(ctx, dir) {
		if err != nil {
			return problems, err
		}
		problems++
		fmt.Fprintf(e.stdout, "%s: %s\n", path, p)
	}
	if problems == 0 {
		fmt.Fprintf(e.stdout, "%s: no problems\n", path)
	}
	return problems, nil
}

// stores lists the directories of all stores: those below the data directory
// and those that storage repositories were given elsewhere. The caller holds
// the lock of the data directory.
func (d dataDir) stores(ctx context.Context) ([]string, error) {
	found := make(map[string]struct{})
	err := filepath.WalkDir(string(d), func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Name() == superblock && entry.Type().IsRegular() {
			found[filepath.Dir(path)] = struct{}{}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	locations, err := d.locations(ctx)
	if err != nil {
		return nil, fmt.Errorf("object database %s: %w", d.database(), err)
	}
	for _, path := range locations {
		if _, err := os.Stat(filepath.Join(path, superblock)); err == nil {
			found[filepath.Clean(path)] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(found)), nil
}

// locations lists the directories that the database knows of.
func (d dataDir) locations(ctx context.Context) (paths []string, err error) {
	if _, err := os.Stat(d.database()); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	store, err := bolt.Open(d.database())
	if err != nil {
		return nil, err
	}
	objects, err := db.Open(ctx, xapi.Datamodel(), store)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, objects.Close()) }()
	err = objects.View(func(tx *db.Tx) error {
		for _, pbd := range db.All[xapi.PBD](tx) {
			if path := pbd.DeviceConfig["location"]; path != "" {
				if !filepath.IsAbs(path) {
					path = filepath.Join(string(d), path)
				}
				paths = append(paths, path)
			}
		}
		return nil
	})
	return paths, err
}
