package cow

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"

	engine "coppice/internal/cow"
	"coppice/internal/storage"
	"coppice/internal/vfs"
)

// The attributes of the repository as a whole are a file beside those of the
// engine, which is replaced as a whole: the blob and, in 4 bytes little endian,
// its CRC32C.
const (
	labelName = "attributes"
	labelTemp = "attributes.new"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// removeLabel removes the attributes of a store that is gone.
func removeLabel(dir vfs.FS) error {
	for _, name := range []string{labelName, labelTemp} {
		if err := dir.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return dir.SyncDir()
}

func (r *repo) RepoAttrs(ctx context.Context) ([]byte, error) {
	r.label.Lock()
	defer r.label.Unlock()
	err := r.usable(ctx)
	if err == nil {
		var attrs []byte
		if attrs, err = readLabel(r.dir); err == nil {
			return attrs, nil
		}
	}
	return nil, translate("attributes of the repository", "", err)
}

func readLabel(dir vfs.FS) (_ []byte, err error) {
	f, err := dir.Open(labelName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	n, err := f.Size()
	if err != nil {
		return nil, err
	}
	if n < crc32.Size || n > storage.MaxAttrs+crc32.Size {
		return nil, &engine.CorruptError{Detail: fmt.Sprintf("file %s of %d bytes", labelName, n)}
	}
	b := make([]byte, n)
	if k, err := f.ReadAt(b, 0); int64(k) < n {
		return nil, err
	}
	blob, sum := b[:n-crc32.Size], binary.LittleEndian.Uint32(b[n-crc32.Size:])
	if crc32.Checksum(blob, castagnoli) != sum {
		return nil, &engine.CorruptError{Detail: "checksum of file " + labelName}
	}
	return blob, nil
}

func (r *repo) SetRepoAttrs(ctx context.Context, attrs []byte) error {
	r.label.Lock()
	defer r.label.Unlock()
	err := r.usable(ctx)
	if err == nil {
		err = storage.ValidateAttrs(attrs)
	}
	if err == nil {
		err = writeLabel(r.dir, attrs)
	}
	return translate("set the attributes of the repository", "", err)
}

// writeLabel replaces the file. What a crash leaves of the new one is removed
// by the next call.
func writeLabel(dir vfs.FS, attrs []byte) error {
	if err := dir.Remove(labelTemp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := dir.Create(labelTemp)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(binary.LittleEndian.AppendUint32(attrs[:len(attrs):len(attrs)], crc32.Checksum(attrs, castagnoli)), 0)
	if err == nil {
		err = f.Datasync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := dir.Rename(labelTemp, labelName); err != nil {
		return err
	}
	return dir.SyncDir()
}
