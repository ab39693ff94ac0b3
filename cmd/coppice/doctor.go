package main

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"coppice/internal/server"
	"coppice/internal/vfs"
)

// Bounds beyond which doctor speaks up.
const (
	lowSpace    = 1 << 30               // bytes free below which a server is about to stop writing
	slowSync    = 50 * time.Millisecond // median fdatasync that makes every write slow
	expirySoon  = 30 * 24 * time.Hour   // before the certificate ends
	syncSamples = 9
)

// severity of a finding.
type severity string

const (
	fine    severity = "ok"
	warning severity = "warning"
	trouble severity = "problem"
)

// finding is one thing doctor has to say.
type finding struct {
	severity severity
	text     string
	wayOut   string // what the operator can do, for warnings and problems
}

// findings collects them.
type findings []finding

func (f *findings) add(s severity, wayOut, format string, args ...any) {
	*f = append(*f, finding{s, fmt.Sprintf(format, args...), wayOut})
}

func (f findings) print(w io.Writer) {
	for _, x := range f {
		fmt.Fprintf(w, "%-8s %s\n", x.severity, x.text)
		if x.wayOut != "" {
			fmt.Fprintf(w, "         → %s\n", x.wayOut)
		}
	}
}

func (f findings) count(s severity) int {
	n := 0
	for _, x := range f {
		if x.severity == s {
			n++
		}
	}
	return n
}

// doctor examines what a server needs and prints what it finds. It changes
// nothing but a scratch file in the data directory. With a server running it
// leaves out what only a stopped one permits, and says so.
func doctor(ctx context.Context, e env, args []string) error {
	flags := flag.NewFlagSet("doctor", flag.ContinueOnError)
	place := dataFlag(flags)
	httpFlag := flags.String("http", "127.0.0.1:8080", "`address` the server will use for HTTP, or off")
	httpsFlag := flags.String("https", "127.0.0.1:8443", "`address` the server will use for HTTPS, or off")
	if err := parse(e, flags, args, 0); err != nil {
		return err
	}
	data, err := e.dataDir(*place)
	if err != nil {
		return err
	}
	var f findings
	f.examine(ctx, e, data, []string{*httpFlag, *httpsFlag})
	f.print(e.stdout)
	if n := f.count(trouble); n > 0 {
		return badNews{fmt.Errorf("problems: %d", n)}
	}
	return nil
}

func (f *findings) examine(ctx context.Context, e env, data dataDir, ports []string) {
	info, err := os.Stat(string(data))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f.add(fine, "", "data directory %s: not there yet, the first start makes it", data)
		f.ports(ctx, ports)
		return
	case err != nil:
		f.add(trouble, "Check the path and the permissions of its parents.", "data directory: %v", err)
		return
	case !info.IsDir():
		f.add(trouble, "Name a directory with --data DIR.", "data directory %s: not a directory", data)
		return
	}
	f.permissions(data, info)
	f.space(data)
	f.fileSystem(data)
	f.certificate(data)

	dir, lock, err := data.open(false)
	if errors.Is(err, vfs.ErrLocked) {
		f.add(fine, "", "a server is running: ports, database and stores are in its hands and were not examined")
		return
	}
	if err != nil {
		f.add(trouble, "Check the permissions of the directory and of LOCK in it.", "%v", err)
		return
	}
	defer func() {
		if err := errors.Join(lock.Close(), dir.Close()); err != nil {
			f.add(warning, "", "closing the data directory: %v", err)
		}
	}()
	f.ports(ctx, ports)
	f.password(dir)
	f.contents(ctx, e, data)
}

func (f *findings) permissions(data dataDir, info fs.FileInfo) {
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		f.add(warning, "chmod 700 "+string(data), "data directory %s: mode %04o lets other users in", data, mode)
	}
	if err := unix.Access(string(data), unix.R_OK|unix.W_OK|unix.X_OK); err != nil {
		f.add(trouble, fmt.Sprintf("Run as its owner, or: chown %d %s", os.Geteuid(), data),
			"data directory %s: user id %d may not use it: %v", data, os.Geteuid(), err)
		return
	}
	f.add(fine, "", "data directory %s: usable", data)
	for _, secret := range []string{passwordFile, filepath.Join("tls", "key.pem")} {
		path := filepath.Join(string(data), secret)
		if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o077 != 0 {
			f.add(trouble, "chmod 600 "+path, "%s: mode %04o lets other users read a secret", path, info.Mode().Perm())
		}
	}
}

func (f *findings) space(data dataDir) {
	free, err := freeSpace(data)
	if err != nil {
		f.add(warning, "", "free space: %v", err)
		return
	}
	if free < lowSpace {
		f.add(trouble, "Delete disks or snapshots, or enlarge the file system.", "free space: only %d MiB", free>>20)
		return
	}
	f.add(fine, "", "free space: %.1f GiB", float64(free)/(1<<30))
}

func freeSpace(data dataDir) (int64, error) {
	dir, err := vfs.OpenDir(string(data))
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	return dir.Free()
}

// fileSystem tries the operations that stores depend on, in a scratch file.
func (f *findings) fileSystem(data dataDir) {
	file, err := os.CreateTemp(string(data), "doctor.*")
	if err != nil {
		f.add(trouble, "Check permissions and free inodes.", "cannot make a file: %v", err)
		return
	}
	defer func() {
		if err := errors.Join(file.Close(), os.Remove(file.Name())); err != nil {
			f.add(warning, "", "the scratch file: %v", err)
		}
	}()
	fd := int(file.Fd())
	const size = 4 << 20
	if err := unix.Fallocate(fd, 0, 0, size); err != nil {
		f.add(warning, "ext4, xfs and btrfs can; without it a full disk is noticed later.", "fallocate: %v", err)
	} else if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size); err != nil {
		f.add(warning, "ext4, xfs and btrfs can; without it deleted data stays allocated in the store, for its own use.", "punching holes: %v", err)
	} else {
		f.add(fine, "", "file system: reserves space and punches holes")
	}
	block := make([]byte, 4096)
	times := make([]time.Duration, syncSamples)
	for i := range times {
		if _, err := file.WriteAt(block, int64(i)*4096); err != nil {
			f.add(trouble, "", "writing: %v", err)
			return
		}
		begin := time.Now()
		if err := unix.Fdatasync(fd); err != nil {
			f.add(trouble, "Look at the kernel log: the device may be failing.", "fdatasync: %v", err)
			return
		}
		times[i] = time.Since(begin)
	}
	slices.Sort(times)
	median := times[len(times)/2].Round(10 * time.Microsecond)
	if median > slowSync {
		f.add(warning, "Every snapshot and flush waits for one. Put the data directory on a faster device.", "fdatasync: median %v", median)
		return
	}
	f.add(fine, "", "fdatasync: median %v", median)
}

func (f *findings) certificate(data dataDir) {
	cert, err := server.LoadCertificate(filepath.Join(data.tls(), "cert.pem"), filepath.Join(data.tls(), "key.pem"))
	if errors.Is(err, fs.ErrNotExist) {
		f.add(fine, "", "certificate: none kept, a start without --tls-cert makes one")
		return
	}
	if err != nil {
		f.add(trouble, "Remove both files to have a new pair made, or use --tls-cert and --tls-key.", "%v", err)
		return
	}
	leaf := cert.Leaf()
	if _, ok := leaf.PublicKey.(*rsa.PublicKey); !ok {
		f.add(warning, "The stock xe client accepts RSA only.", "certificate: its key is not RSA")
	}
	until := leaf.NotAfter.Format(time.DateOnly)
	switch left := time.Until(leaf.NotAfter); {
	case left < 0:
		f.add(trouble, "Remove "+data.tls()+" to have a new one made.", "certificate: expired on %s", until)
	case left < expirySoon:
		f.add(warning, "Remove "+data.tls()+" to have a new one made.", "certificate: expires on %s", until)
	default:
		f.add(fine, "", "certificate: valid until %s, SHA-256 %s", until, fingerprint(leaf))
	}
}

// fingerprint is the SHA-256 of a certificate as tools print it.
func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return strings.ReplaceAll(fmt.Sprintf("% X", sum[:]), " ", ":")
}

// ports tries to listen at each address for a moment.
func (f *findings) ports(ctx context.Context, addresses []string) {
	for _, a := range addresses {
		if a == off {
			continue
		}
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", a)
		if err != nil {
			f.add(trouble, "Another program has it, or it is not allowed; choose another with --http or --https.", "address %s: %v", a, err)
			continue
		}
		l.Close()
		f.add(fine, "", "address %s: free", a)
	}
}

func (f *findings) password(dir vfs.FS) {
	switch verifier, err := readSmall(dir, passwordFile); {
	case errors.Is(err, fs.ErrNotExist):
		f.add(fine, "", "password: not set yet, the first start makes one")
	case err != nil:
		f.add(trouble, "", "password: %v", err)
	case verifier == "":
		f.add(trouble, "Start once with --admin-password-file FILE.", "password: %s is empty", passwordFile)
	}
}

// contents opens the database and checks every store.
func (f *findings) contents(ctx context.Context, e env, data dataDir) {
	stores, err := data.stores(ctx)
	if err != nil {
		f.add(trouble, "Keep a copy of the file before anything else.", "%v", err)
		return
	}
	f.add(fine, "", "object database: opens")
	for _, path := range stores {
		quiet := env{stdin: e.stdin, stdout: io.Discard, stderr: io.Discard, getenv: e.getenv}
		switch n, err := checkStore(ctx, quiet, path); {
		case err != nil:
			f.add(trouble, "", "store %s: %v", path, err)
		case n > 0:
			f.add(trouble, "\"coppice check\" lists them.", "store %s: %s", path, problems(n))
		default:
			f.add(fine, "", "store %s: no problems", path)
		}
	}
}
