package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// server is a running coppice and a login on it.
type server struct {
	cmd     *exec.Cmd
	base    string // http://127.0.0.1:port
	secure  string // https://127.0.0.1:port
	session string
	sr      string
	client  *http.Client
	touched uint64 // how often disks have been changed, see touch
}

const password = "bench"

// startServer starts the binary on a fresh directory and logs in. Disks may be
// pulled from this machine.
func startServer(ctx context.Context, cfg config) (*server, error) {
	pw := filepath.Join(cfg.scratch, "password")
	if err := os.WriteFile(pw, []byte(password+"\n"), 0o600); err != nil {
		return nil, err
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	secure, err := freeAddress()
	if err != nil {
		return nil, err
	}
	logFile, err := os.Create(filepath.Join(cfg.scratch, "server.log"))
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	cmd := exec.Command(cfg.binary, "serve", "--data", filepath.Join(cfg.scratch, "data"),
		"--admin-password-file", pw, "--http", address, "--https", secure, "--pull-from", "127.0.0.1")
	cmd.Stdout, cmd.Stderr = logFile, logFile
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{cmd: cmd, base: "http://" + address, secure: "https://" + secure, client: &http.Client{
		Transport: &http.Transport{ReadBufferSize: 256 << 10, WriteBufferSize: 256 << 10},
	}}
	if err := s.login(ctx); err != nil {
		text, _ := os.ReadFile(logFile.Name())
		return nil, errors.Join(fmt.Errorf("%w\n%s", err, text), s.stop())
	}
	return s, nil
}

// freeAddress is a TCP address on loopback that nobody listens on at the moment.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

func (s *server) login(ctx context.Context) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := s.call(ctx, &s.session, "session.login_with_password", "root", password)
		if err == nil {
			break
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("no login: %w", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	var pools map[string]struct {
		DefaultSR string `json:"default_SR"`
	}
	if err := s.call(ctx, &pools, "pool.get_all_records", s.session); err != nil {
		return err
	}
	for _, p := range pools {
		s.sr = p.DefaultSR
	}
	return nil
}

// stop ends the server gracefully.
func (s *server) stop() error {
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return s.cmd.Wait()
}

// call makes one JSON-RPC 2.0 call.
func (s *server) call(ctx context.Context, result any, method string, params ...any) error {
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.base+"/jsonrpc", bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var reply struct {
		Result json.RawMessage `json:"result"`
		Error  *struct {
			Message string   `json:"message"`
			Data    []string `json:"data"`
		} `json:"error"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&reply); err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	if reply.Error != nil {
		return fmt.Errorf("%s: %s %q", method, reply.Error.Message, reply.Error.Data)
	}
	return json.Unmarshal(reply.Result, result)
}

func (s *server) createVDI(ctx context.Context, size int64) (ref string, err error) {
	err = s.call(ctx, &ref, "VDI.create", s.session, map[string]any{
		"SR": s.sr, "virtual_size": size, "type": "user", "sharable": false, "read_only": false,
		"other_config": map[string]string{}, "name_label": "bench",
	})
	return ref, err
}

func (s *server) snapshotVDI(ctx context.Context, vdi string) (ref string, err error) {
	err = s.call(ctx, &ref, "VDI.snapshot", s.session, vdi)
	return ref, err
}

func (s *server) destroyVDI(ctx context.Context, vdi string) error {
	var void string
	return s.call(ctx, &void, "VDI.destroy", s.session, vdi)
}

// open GETs url and returns the body and its length, -1 when that is not known.
// The client asks for no coding unless header does.
func (s *server) open(ctx context.Context, url string, header map[string]string) (io.ReadCloser, int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, 0, err
	}
	req.Header.Set("Accept-Encoding", "identity")
	req.Header.Set("User-Agent", "coppice-bench") // Go's own name gets no gzip
	for name, value := range header {
		req.Header.Set(name, value)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, 0, err
	}
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(resp.Body)
		return nil, 0, errors.Join(fmt.Errorf("%s: %s", resp.Status, text), resp.Body.Close())
	}
	return resp.Body, resp.ContentLength, nil
}

// download GETs url into w.
func (s *server) download(ctx context.Context, url string, w io.Writer, header map[string]string) error {
	body, length, err := s.open(ctx, url, header)
	if err != nil {
		return err
	}
	defer body.Close()
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{body}, make([]byte, mib))
	if err == nil && length >= 0 && n != length {
		err = fmt.Errorf("%d of %d bytes came", n, length)
	}
	return err
}

// downloadFile GETs url into a new file.
func (s *server) downloadFile(ctx context.Context, url, path string, header map[string]string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(s.download(ctx, url, f, header), f.Close())
}

// openSized opens a file and says how many bytes it has.
func openSized(path string) (*os.File, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}

// uploadFile PUTs a file to url and waits for the end of the response.
func (s *server) uploadFile(ctx context.Context, url, path string) error {
	f, size, err := openSized(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return s.upload(ctx, url, f, size)
}

func (s *server) upload(ctx context.Context, url string, body io.Reader, length int64) error {
	// A reader that hides the file keeps the client to plain reads and
	// writes, for us and for the limit alike.
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, url, struct{ io.Reader }{body})
	if err != nil {
		return err
	}
	req.ContentLength = length
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

func (s *server) exportURL(vdi, format, base string) string {
	u := s.base + "/export_raw_vdi?session_id=" + s.session + "&vdi=" + vdi + "&format=" + format
	if base != "" {
		u += "&base=" + base
	}
	return u
}

// importFile uploads a file into a VDI and waits for the task's success.
func (s *server) importFile(ctx context.Context, vdi, format, path string) error {
	f, size, err := openSized(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return s.importFrom(ctx, vdi, format, f, size)
}

func (s *server) importFrom(ctx context.Context, vdi, format string, body io.Reader, length int64) error {
	var task, status string
	if err := s.call(ctx, &task, "task.create", s.session, "bench import", ""); err != nil {
		return err
	}
	url := s.base + "/import_raw_vdi?session_id=" + s.session + "&task_id=" + task + "&vdi=" + vdi + "&format=" + format
	upload := s.upload(ctx, url, body, length)
	for {
		if err := s.call(ctx, &status, "task.get_status", s.session, task); err != nil {
			return err
		}
		if status != "pending" || upload != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if status != "success" {
		var info []string
		return errors.Join(upload, s.call(ctx, &info, "task.get_error_info", s.session, task),
			fmt.Errorf("import ended as %s: %q", status, info))
	}
	var void string
	return s.call(ctx, &void, "task.destroy", s.session, task)
}

// resetPeak makes peakRSS count from now on.
func (s *server) resetPeak() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.cmd.Process.Pid), []byte("5"), 0)
}

// peakRSS is the largest resident memory of the server, in MiB.
func (s *server) peakRSS() (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(string(status), "VmHWM:")
	if !ok {
		return 0, errors.New("no VmHWM")
	}
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	return kib >> 10, err
}
