package server

import (
	"net/http"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"coppice/internal/api"
)

// Metrics are the figures of GET /metrics. What happens is counted as it does; what is, is looked up when somebody
// asks. All names begin with coppice_, except those of the process and of Go itself.
type Metrics struct {
	registry *prometheus.Registry

	calls    *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	requests *prometheus.CounterVec
	bytes    *prometheus.CounterVec
}

// callBuckets are the upper bounds of the duration histogram, in seconds: from getters to copies of disks.
var callBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1, 5, 30, 300, 3600}

// NewMetrics returns figures that nobody has added to yet.
func NewMetrics(version string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coppice_calls_total", Help: "Calls that have ended, by class and outcome: ok, or the code of the error.",
		}, []string{"class", "outcome"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "coppice_call_seconds", Help: "How long calls took.", Buckets: callBuckets,
		}, []string{"class"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coppice_http_requests_total", Help: "HTTP requests that have ended, by method and status; 0 is a connection that was taken over.",
		}, []string{"method", "status"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coppice_http_bytes_total", Help: "Bytes of HTTP bodies, without transfers that take their connection over.",
		}, []string{"direction"}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "coppice_build_info", Help: "Always 1; the label says which build.", ConstLabels: prometheus.Labels{"version": version},
	})
	build.Set(1)
	m.registry.MustRegister(m.calls, m.seconds, m.requests, m.bytes, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Observe counts a call; it is an api.Config.OnCall.
func (m *Metrics) Observe(r api.CallReport) {
	class := "http"
	if r.Message != nil {
		class, _, _ = strings.Cut(r.Name, ".")
	}
	outcome := "ok"
	if r.Told != nil {
		outcome = r.Told.Code
	}
	m.calls.WithLabelValues(class, outcome).Inc()
	m.seconds.WithLabelValues(class).Observe(r.Took.Seconds())
}

// request counts an HTTP request.
func (m *Metrics) request(method, status string, bytes int64) {
	if !slices.Contains(methods, method) {
		method = "other" // or clients could make up any number of them
	}
	m.requests.WithLabelValues(method, status).Inc()
	m.bytes.WithLabelValues("out").Add(float64(bytes))
}

// figures looks up what the API counts of itself.
type figures struct{ api *api.API }

var (
	srLabels    = []string{"uuid", "name", "type"}
	descSRUp    = prometheus.NewDesc("coppice_sr_attached", "Whether the SR is attached.", srLabels, nil)
	descSRTotal = prometheus.NewDesc("coppice_sr_size_bytes", "What the SR can hold.", srLabels, nil)
	descSRUsed  = prometheus.NewDesc("coppice_sr_used_bytes", "What the SR takes.", srLabels, nil)
	descSRAlloc = prometheus.NewDesc("coppice_sr_virtual_bytes", "The sizes of the disks of the SR, added up.", srLabels, nil)
	descSRDisks = prometheus.NewDesc("coppice_sr_disks", "How many disks the SR has.", srLabels, nil)
	descObjects = prometheus.NewDesc("coppice_objects", "How many objects a class has.", []string{"class"}, nil)
	descTasks   = prometheus.NewDesc("coppice_tasks", "How many tasks have a record.", []string{"status"}, nil)
	descSession = prometheus.NewDesc("coppice_sessions", "Who is logged in.", nil, nil)
	descRunning = prometheus.NewDesc("coppice_calls_running", "Calls and transfers in progress, those that wait for events included.", nil, nil)
	descWaiting = prometheus.NewDesc("coppice_calls_waiting", "Calls that wait for an object that another one uses.", nil, nil)
	descCommits = prometheus.NewDesc("coppice_database_revision", "Revision of the object database.", nil, nil)
)

// Describe implements prometheus.Collector.
func (f figures) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descSRUp, descSRTotal, descSRUsed, descSRAlloc, descSRDisks, descObjects, descTasks, descSession, descRunning, descWaiting, descCommits,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (f figures) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	now := f.api.Figures()
	for _, sr := range now.SRs {
		labels := []string{sr.UUID, strings.ToValidUTF8(sr.Name, "?"), sr.Type}
		attached := 0.0
		if sr.Attached {
			attached = 1
		}
		gauge(descSRUp, attached, labels...)
		gauge(descSRTotal, float64(sr.Total), labels...)
		gauge(descSRUsed, float64(sr.Used), labels...)
		gauge(descSRAlloc, float64(sr.VirtualAlloc), labels...)
		gauge(descSRDisks, float64(sr.Disks), labels...)
	}
	for class, n := range now.Objects {
		gauge(descObjects, float64(n), class)
	}
	for status, n := range now.Tasks {
		gauge(descTasks, float64(n), string(status))
	}
	gauge(descSession, float64(now.Sessions))
	gauge(descRunning, float64(now.Running))
	gauge(descWaiting, float64(now.Waiting))
	ch <- prometheus.MustNewConstMetric(descCommits, prometheus.CounterValue, float64(now.Revision))
}

// serveMetrics answers GET /metrics for this machine, and for whoever may look at metrics.
func (s *Server) serveMetrics(w http.ResponseWriter, r *request) {
	if !r.local() {
		session, release, err := s.session(r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		defer release()
		if err := s.api.Authorized(xapiSession(session), metricsAction); err != nil {
			s.fail(w, r, err)
			return
		}
	}
	promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{ErrorLog: slogErrors{s.log}}).ServeHTTP(w, r.Request)
}
