package server

import (
	"log/slog"
	"regexp"
)

// secret matches the value of anything that must not be seen in a log:
// session references, passwords and the like, in queries, cookies and
// command line arguments.
var secret = regexp.MustCompile(`(?i)((?:session_id|pool_secret|password|passwd|new_pwd|old_pwd|authorization)(?:=|%3d|:\s*))[^&;\s"]+`)

// userinfo matches the password in a URL.
var userinfo = regexp.MustCompile(`(://[^\s"/@:]*:)[^\s"]*@`)

// secretKey matches the names of attributes, parameters and keys of maps whose
// whole value must not be seen.
var secretKey = regexp.MustCompile(`(?i)(^|-)(session|session_id|authorization|cookie|pwd|psecret|private_key)$|passw|secret|_pwd$`)

// hidden replaces what was cut out.
const hidden = "…"

// Redact returns s without the secrets in it.
func Redact(s string) string {
	return userinfo.ReplaceAllString(secret.ReplaceAllString(s, "${1}"+hidden), "${1}"+hidden+"@")
}

// RedactAttr is a [slog.HandlerOptions] ReplaceAttr: the last line of defence
// for every log line of the process, whoever wrote it.
func RedactAttr(_ []string, a slog.Attr) slog.Attr {
	if secretKey.MatchString(a.Key) {
		return slog.String(a.Key, hidden)
	}
	switch a.Value.Kind() {
	case slog.KindString:
		return slog.String(a.Key, Redact(a.Value.String()))
	case slog.KindAny:
		if err, ok := a.Value.Any().(error); ok {
			return slog.String(a.Key, Redact(err.Error()))
		}
	}
	return a
}
