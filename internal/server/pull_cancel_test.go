package server

import (
	"bytes"
	"io"
	"net/http"
	"testing"
)

// A pull from a source that says nothing any more can be cancelled.
func TestPullCancel(t *testing.T) {
	p := newPair(t, straight)
	contents := random(8*mib, 1, [2]int64{0, 8 * mib})
	disk, _ := p.from.filled(contents)
	_, first := p.snapshot(disk)
	old := p.pulls(p.args(first))
	before := p.volumes()
	proxy := newThrottle(t, p.front.Listener.Addr().String(), 4*mib, false)
	args := p.args(first, "vdi", old.VDI, "full", "true", "remote-url", "https://"+proxy.Addr().String())
	task := p.to.do("Async.host.call_plugin", p.to.session, p.host, "coppice", "vdi-pull", args).(string)
	<-proxy.full
	if _, err := p.to.call("VDI.resize", p.to.session, p.to.do("VDI.get_by_uuid", p.to.session, old.VDI), int64(16*mib)); err == nil {
		t.Error("the disk is free during the pull")
	}
	p.to.do("task.cancel", p.to.session, task)
	if o := p.to.settled(task); o[0] != "cancelled" {
		t.Errorf("task says %q", o)
	}
	if after := p.volumes(); after != before {
		t.Errorf("%d disks, before there were %d", after, before)
	}
	p.wantContents(old.VDI, contents)
}

// A pull that is cancelled while its source makes the task, or before that has
// got the request for the image, leaves no task there, which would never end.
func TestPullCancelledBeforeExport(t *testing.T) {
	for _, at := range []string{"task.create", "/export_raw_vdi"} {
		asked, cancelled := make(chan struct{}, 1), make(chan struct{})
		p := newPair(t, func(from *depot) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err != nil {
					return // the client is gone
				}
				if r.URL.Path == at || bytes.Contains(body, []byte(at)) {
					asked <- struct{}{}
					<-cancelled
				}
				if r.URL.Path != at {
					r.Body = io.NopCloser(bytes.NewReader(body))
					from.Server.ServeHTTP(w, r)
				}
			})
		})
		_, uuid := p.from.disk(mib)
		task := p.to.do("Async.host.call_plugin", p.to.session, p.host, "coppice", "vdi-pull", p.args(uuid)).(string)
		<-asked
		p.to.do("task.cancel", p.to.session, task)
		close(cancelled)
		if o := p.to.settled(task); o[0] != "cancelled" {
			t.Errorf("at %s: task says %q", at, o)
		}
		if left := p.from.do("task.get_all", p.from.session).([]any); len(left) > 0 {
			t.Errorf("at %s: tasks at the source: %v", at, left)
		}
	}
}
