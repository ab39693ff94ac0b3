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
// has open, and prints every problem it finds; with --repair it puts right
// what can be.
func check(ctx context.Context, e env, args []string) error {
	ctx, unhook := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer unhook()
	flags := flag.NewFlagSet("check", flag.ContinueOnError)
	place := dataFlag(flags)
	repair := flags.Bool("repair", false, "put right what can be without losing anything")
	lossy := flags.Bool("accept-loss", false, "with --repair: also give up what cannot be read, so that the rest can be used")
	if err := parse(e, flags, args, -1); err != nil {
		return err
	}
	if *lossy && !*repair {
		return errors.New("--accept-loss goes with --repair")
	}
	return e.eachStore(ctx, *place, flags.Args(), func(ctx context.Context, path string) (int, error) {
		if *repair {
			return repairStore(ctx, e, path, cow.RepairOptions{AcceptLoss: *lossy})
		}
		return checkStore(ctx, e, path)
	})
}

// eachStore calls do for the stores that are named, one after the other, or
// for every store of a data directory, whose lock it holds meanwhile. do
// returns how many problems are left.
func (e env) eachStore(ctx context.Context, place string, stores []string, do func(context.Context, string) (int, error)) (failed error) {
	if len(stores) == 0 {
		data, err := e.dataDir(place)
		if err != nil {
			return err
		}
		dir, lock, err := data.open(false)
		if err != nil {
			return err
		}
		defer func() { failed = errors.Join(failed, lock.Close(), dir.Close()) }()
		if stores, err = data.stores(ctx); err != nil {
			return err
		}
		if len(stores) == 0 {
			fmt.Fprintln(e.stdout, "there is no store yet")
		}
	}
	total := 0
	for _, store := range stores {
		n, err := do(ctx, store)
		if err != nil {
			return explainStore(store, err)
		}
		total += n
	}
	if total > 0 {
		return badNews{fmt.Errorf("%s found", problems(total))}
	}
	return nil
}

// checkStore checks the store in one directory and returns the number of
// problems, all of them printed.
func checkStore(ctx context.Context, e env, path string) (found int, err error) {
	dir, err := vfs.OpenDir(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	for p, err := range ranges(cow.Check(ctx, dir)) {
		if err != nil {
			return found, err
		}
		found++
		fmt.Fprintf(e.stdout, "%s: %s\n", path, p)
	}
	if found == 0 {
		fmt.Fprintf(e.stdout, "%s: no problems\n", path)
	}
	return found, nil
}

// repairStore repairs the store in one directory and returns the number of
// problems about which nothing has been done.
func repairStore(ctx context.Context, e env, path string, o cow.RepairOptions) (left int, err error) {
	dir, err := vfs.OpenDir(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	found := 0
	for p, err := range ranges(cow.Repair(ctx, dir, o)) {
		if err != nil {
			return left, err
		}
		found++
		if p.Done == "" {
			left++
		}
		fmt.Fprintf(e.stdout, "%s: %s\n", path, p)
	}
	fmt.Fprintf(e.stdout, "%s: %s, %d put right or given up\n", path, problems(found), found-left)
	return left, nil
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
