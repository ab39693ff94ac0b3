package server

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"coppice/internal/xapi"
)

// The audit log can be had whole, or from a time on, under the client's task.
func TestAuditLogDownload(t *testing.T) {
	o := newOperated(t)
	web := httptest.NewServer(o)
	defer web.Close()
	var want []string
	for _, second := range []string{"01", "02", "02.5", "03"} {
		want = append(want, fmt.Sprintf(`{"time":"2020-01-01T00:00:%sZ","msg":"VDI.destroy","n":"%s"}`+"\n", second, strings.Repeat("x", 100_000)))
	}
	if err := os.WriteFile(o.path, []byte(strings.Join(want, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	session := string(o.call(t, "session.login_with_password", "root", "secret").(xapi.Ref[xapi.Session]))
	get := func(query string) (status int, length int64, body string) {
		t.Helper()
		resp, err := http.Get(web.URL + "/audit_log?session_id=" + session + query)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, resp.ContentLength, string(b)
	}
	for query, first := range map[string]int{
		"": 0, "&since=": 0, "&since=20191231T23:59:59Z": 0, "&since=20200101T00:00:02Z": 1, "&since=2020-01-01T00:00:03Z": 3,
	} {
		status, length, body := get(query)
		if status != http.StatusOK || length != int64(len(body)) || !strings.HasPrefix(body, strings.Join(want[first:], "")) {
			t.Errorf("%q: status %d, %d bytes of %d", query, status, len(body), length)
		}
	}
	if status, _, body := get("&since=20990101T00:00:00Z"); status != http.StatusOK || body != "" {
		t.Errorf("from the future: status %d, %d bytes", status, len(body))
	}
	task := string(o.call(t, "task.create", session, "audit", "").(xapi.Ref[xapi.Task]))
	if status, _, _ := get("&since=yesterday&task_id=" + task); status != http.StatusBadRequest {
		t.Errorf("a time that is none: status %d", status)
	}
	if got := o.call(t, "task.get_status", session, task).(xapi.TaskStatusType); got != xapi.TaskStatusTypeFailure {
		t.Errorf("its task: %s", got)
	}
	o.Server.audit = nil
	if status, _, body := get(""); status != http.StatusNotFound || !strings.Contains(body, "--audit-log") {
		t.Errorf("without a log: status %d, %s", status, body)
	}
}

func TestEntriesSince(t *testing.T) {
	long := strings.Repeat(`{"time":"2030-01-01T00:00:00Z"`, 10_000) // more than the buffer, without an end
	for _, tc := range []struct {
		log  string
		want int64
	}{
		{"", 0},
		{"no entry\n", 9},
		{"no entry", 8},
		{`{"time":"2020-01-01T00:00:00Z"}` + "\n", 0},
		{`{"time":"2019-01-01T00:00:00Z"}` + "\n", 32},
		{`{"time":"x"}` + "\n" + `{"time":"2020-06-01T00:00:00Z"}` + "\n", 13},
		{"x" + long + "\n" + `{"time":"2020-06-01T00:00:00Z"}`, int64(len(long)) + 2},
	} {
		got, err := entriesSince(t.Context(), strings.NewReader(tc.log), time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC))
		if err != nil || got != tc.want {
			t.Errorf("%.40q: %d, %v, want %d", tc.log, got, err, tc.want)
		}
	}
}
