package server

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"coppice/internal/api"
	"coppice/internal/xapi"
)

// Audit writes who did what, one JSON object a line: every call that changes something or moves the contents of a
// disk, every login and logout, and everything that was refused for want of a role. Looking at records is not
// written. Secrets are left out by the same rules as in the log, and a session is named without being told.
type Audit struct {
	log  *slog.Logger
	file *auditFile
}

// maxAuditText is how much of a text an entry shows, in bytes, and maxAuditItems how much of a list or map.
const (
	maxAuditText  = 256
	maxAuditItems = 32
)

// OpenAudit appends to the file of that path, which only its owner can read. trouble hears, once, when the file
// cannot be written.
func OpenAudit(path string, trouble *slog.Logger) (*Audit, error) {
	f := &auditFile{path: path, trouble: trouble}
	if err := f.Reopen(); err != nil {
		return nil, err
	}
	return &Audit{newAuditLog(f), f}, nil
}

func newAuditLog(w io.Writer) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{ReplaceAttr: auditAttr}))
}

// auditAttr hides secrets and leaves out what is the same in every line.
func auditAttr(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 {
		switch a.Key {
		case slog.LevelKey:
			return slog.Attr{}
		case "session": // a name, not the reference
			return a
		}
	}
	return RedactAttr(groups, a)
}

// Reopen opens the file anew, for those who rename it.
func (a *Audit) Reopen() error { return a.file.Reopen() }

// Close closes the file.
func (a *Audit) Close() error { return a.file.Close() }

// Record writes an entry if the call is one to write about; it is an api.Config.OnCall.
func (a *Audit) Record(r api.CallReport) {
	if !audited(r) {
		return
	}
	attrs := []slog.Attr{
		slog.String("user", r.User), slog.String("role", r.Role), slog.String("session", r.Session),
		slog.String("peer", r.Origin.Peer), slog.String("agent", cut(r.Origin.UserAgent)), slog.String("originator", cut(r.Origin.Originator)),
	}
	attrs = slices.DeleteFunc(attrs, func(a slog.Attr) bool { return a.Value.String() == "" })
	if r.Async {
		attrs = append(attrs, slog.Bool("async", true))
	}
	if r.Task != "" {
		attrs = append(attrs, slog.String("task", r.Task))
	}
	if args := auditArgs(r); len(args) > 0 {
		attrs = append(attrs, slog.GroupAttrs("params", args...))
	}
	if r.Detail != "" {
		attrs = append(attrs, slog.String("detail", cut(r.Detail)))
	}
	outcome := "ok"
	if r.Told != nil {
		outcome = r.Told.Code
		attrs = append(attrs, slog.String("error", cut(strings.Join(r.Told.Params, " "))))
	}
	attrs = append(attrs, slog.String("outcome", outcome), slog.Float64("seconds", r.Took.Round(time.Microsecond).Seconds()))
	a.log.LogAttrs(context.Background(), slog.LevelInfo, r.Name, attrs...)
}

// reading are kinds of messages that only look.
var reading = []xapi.MethodKind{
	xapi.FieldGetter, xapi.GetAll, xapi.GetAllWhere, xapi.GetAllRecords, xapi.GetAllRecordsWhere, xapi.GetByUUID,
	xapi.GetByNameLabel, xapi.GetRecord,
}

// readingNames are the beginnings of the names of other messages that only look.
var readingNames = []string{"get", "assert_", "compute_", "has_", "is_", "list_", "retrieve_"}

// audited says whether a call is one to write about.
func audited(r api.CallReport) bool {
	if r.Told != nil && r.Told.Code == xapi.ErrRBACPermissionDenied || r.Message == nil {
		return true
	}
	class, name, _ := strings.Cut(r.Name, ".")
	return class != "event" && !slices.Contains(reading, r.Message.Kind) &&
		!slices.ContainsFunc(readingNames, func(p string) bool { return strings.HasPrefix(name, p) })
}

// auditArgs are the parameters of a call. Whoever looks for one finds it under its name in the datamodel.
func auditArgs(r api.CallReport) []slog.Attr {
	if r.Message == nil {
		return nil
	}
	if strings.HasPrefix(r.Name, "secret.") {
		return []slog.Attr{slog.String("value", hidden)}
	}
	var attrs []slog.Attr
	for i, p := range r.Message.Params[:min(len(r.Args), len(r.Message.Params))] {
		attrs = append(attrs, auditValue(p.Name, reflect.ValueOf(r.Args[i])))
	}
	return attrs
}

// auditValue makes an attribute of a parameter, in which every text has its own key for the redaction to go by.
func auditValue(key string, v reflect.Value) slog.Attr {
	switch x := v.Interface().(type) {
	case xapi.Ref[xapi.Session]:
		return slog.String(key, api.SessionName(string(x)))
	case time.Time:
		return slog.String(key, x.UTC().Format(time.RFC3339))
	}
	switch v.Kind() {
	case reflect.String:
		return slog.String(key, cut(v.String()))
	case reflect.Map:
		items := map[string]reflect.Value{}
		for k, x := range v.Seq2() {
			items[cut(fmt.Sprint(k))] = x
		}
		return auditGroup(key, items)
	case reflect.Slice:
		var texts []string
		for i := range min(v.Len(), maxAuditItems) {
			texts = append(texts, cut(fmt.Sprint(v.Index(i))))
		}
		if n := v.Len() - len(texts); n > 0 {
			texts = append(texts, fmt.Sprintf("and %d more", n))
		}
		return slog.String(key, strings.Join(texts, " "))
	case reflect.Pointer: // the record of a constructor: the fields that are set
		items := map[string]reflect.Value{}
		if class := xapi.Datamodel().ClassOfRecord(v.Interface()); class != nil && !v.IsNil() {
			for _, f := range class.Fields {
				x := reflect.ValueOf(f.Get(v.Interface()))
				if (x.Kind() == reflect.Map || x.Kind() == reflect.Slice) && x.Len() == 0 || x.IsZero() {
					continue
				}
				items[f.Name] = x
			}
		}
		return auditGroup(key, items)
	default:
		return slog.Any(key, v.Interface())
	}
}

func auditGroup(key string, items map[string]reflect.Value) slog.Attr {
	keys := slices.Sorted(maps.Keys(items))
	var attrs []slog.Attr
	for _, k := range keys[:min(len(keys), maxAuditItems)] {
		attrs = append(attrs, auditValue(k, items[k]))
	}
	if n := len(keys) - len(attrs); n > 0 {
		attrs = append(attrs, slog.Int("and more", n))
	}
	return slog.GroupAttrs(key, attrs...)
}

// cut shortens a text.
func cut(s string) string { return xapi.Shorten(s, maxAuditText) }

// auditFile is a file that is appended to and may be opened anew.
type auditFile struct {
	path    string
	trouble *slog.Logger

	mu     sync.Mutex
	file   *os.File
	failed bool // the last write did
}

// Reopen opens the file of the path; what was open before is closed.
func (f *auditFile) Reopen() error {
	file, err := os.OpenFile(f.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	f.mu.Lock()
	old := f.file
	f.file = file
	f.mu.Unlock()
	if old != nil {
		return old.Close()
	}
	return nil
}

// Write appends one entry. A server that cannot keep its audit log goes on, and says so when that begins.
func (f *auditFile) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.file.Write(p)
	if err != nil && !f.failed {
		f.trouble.Error("the audit log cannot be written", "err", err)
	}
	f.failed = err != nil
	return n, err
}

// Close closes the file.
func (f *auditFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.file.Close()
}
