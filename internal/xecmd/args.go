package xecmd

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// reserved are the parameters that are neither filters nor fields.
var reserved = map[string]bool{
	"server": true, "password": true, "port": true, "username": true, "minimal": true, "force": true,
	"multiple": true, "all": true, "message-priority": true, "trace": true,
}

type parameter struct{ key, value string }

// arguments is a parsed command line.
type arguments struct {
	command string
	session string      // given instead of credentials
	params  []parameter // in order, with duplicates
}

// parseArgs parses what the client sent. Its error is a *usageError.
func parseArgs(args []string) (*arguments, error) {
	a := &arguments{}
	if len(args) > 0 {
		if s, ok := strings.CutPrefix(args[0], "session_id="); ok {
			a.session = s
			args = args[1:]
		}
	}
	if len(args) == 0 || args[0] == "" {
		return nil, syntaxError("there is no command")
	}
	if strings.Contains(args[0], "=") {
		return nil, syntaxError("the command comes before its parameters, such as " + args[0])
	}
	a.command = args[0]
	short := map[string]string{"-s": "server", "-h": "server", "-p": "port", "-u": "username", "-pw": "password"}
	for rest := args[1:]; len(rest) > 0; rest = rest[1:] {
		arg := rest[0]
		switch {
		case strings.HasPrefix(arg, "--"):
			a.params = append(a.params, parameter{arg[2:], "true"})
		case strings.HasPrefix(arg, "-") && arg != "-":
			key, ok := short[arg]
			if !ok {
				return nil, syntaxError("there is no option " + arg)
			}
			if len(rest) == 1 {
				return nil, syntaxError("the value of " + arg + " is missing")
			}
			rest = rest[1:]
			a.params = append(a.params, parameter{key, rest[0]})
		default:
			key, value, _ := strings.Cut(arg, "=")
			a.params = append(a.params, parameter{key, value})
		}
	}
	return a, nil
}

// lookup returns the first value of a parameter.
func (a *arguments) lookup(key string) (string, bool) {
	for _, p := range a.params {
		if p.key == key {
			return p.value, true
		}
	}
	return "", false
}

func (a *arguments) has(key string) bool {
	_, ok := a.lookup(key)
	return ok
}

// str returns the first value of a parameter, or the empty string.
func (a *arguments) str(key string) string {
	v, _ := a.lookup(key)
	return v
}

// flag reports whether a switch is on.
func (a *arguments) flag(key string) bool { return a.str(key) == "true" }

// boolean reads an optional switch in any of its spellings.
func (a *arguments) boolean(key string, otherwise bool) (bool, error) {
	v, ok := a.lookup(key)
	if !ok {
		return otherwise, nil
	}
	switch strings.ToLower(v) {
	case "true", "t", "yes", "y", "1":
		return true, nil
	case "false", "f", "no", "n", "0":
		return false, nil
	}
	return false, failf("Failed to parse parameter '%s': Expected 'true','t','yes','y','1','false','f','no','n','0' got %s", key, v)
}

// number reads an optional integer.
func (a *arguments) number(key string, otherwise int64) (int64, error) {
	v, ok := a.lookup(key)
	if !ok {
		return otherwise, nil
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil {
		return 0, failf("Failed to parse parameter '%s': expecting an integer", key)
	}
	return n, nil
}

// pairs returns the parameters name:k=v, and the older name-k=v, as a map.
func (a *arguments) pairs(name string) map[string]any {
	out := map[string]any{}
	for _, p := range a.params {
		if k, ok := subKey(p.key, name); ok {
			if _, dup := out[k]; !dup {
				out[k] = p.value
			}
		}
	}
	return out
}

// subKey takes name: or name- off a parameter.
func subKey(param, name string) (string, bool) {
	rest, ok := strings.CutPrefix(param, name)
	if !ok || rest == "" || rest[0] != ':' && rest[0] != '-' {
		return "", false
	}
	return rest[1:], true
}

// size reads a mandatory size in bytes: an integer, possibly with a suffix.
func (a *arguments) size(key string) (int64, error) {
	v := a.str(key)
	n, ok := parseSize(v)
	if !ok && tooLarge.MatchString(v) {
		return 0, failf("Failed to parse field '%s': %s does not fit into 63 bits", key, v)
	}
	if !ok {
		return 0, failf("Failed to parse field '%s': expecting an integer (possibly with suffix KiB, MiB, GiB, TiB), got '%s'", key, v)
	}
	return n, nil
}

// tooLarge matches sizes that parseSize refuses for what they amount to.
var tooLarge = regexp.MustCompile(`(?i)^[0-9]+ *(b|bytes|[kmgt](i?b)?)?$`)

// parseSize reads 24GiB and the like. All suffixes are binary.
func parseSize(s string) (int64, bool) {
	i := len(s)
	for i > 0 && (s[i-1] < '0' || s[i-1] > '9') {
		i--
	}
	n, err := strconv.ParseInt(s[:i], 10, 64)
	if err != nil {
		return 0, false
	}
	shift := 0
	switch strings.ToLower(strings.TrimSpace(s[i:])) {
	case "", "b", "bytes":
	case "k", "kb", "kib":
		shift = 10
	case "m", "mb", "mib":
		shift = 20
	case "g", "gb", "gib":
		shift = 30
	case "t", "tb", "tib":
		shift = 40
	default:
		return 0, false
	}
	if n<<shift>>shift != n {
		return 0, false
	}
	return n << shift, true
}

// A usageError is reported with what may help, "" for nothing, and a pointer to
// the help.
type usageError struct {
	text, hint string
	params     bool // it is about the parameters of the command: its own help helps
}

func (e *usageError) Error() string { return e.text }

func syntaxError(reason string) error { return &usageError{text: "Syntax error: " + reason} }

func missing(param string) error {
	return &usageError{text: "Required parameter not found: " + param, params: true}
}

// A failure is an error of a command itself; the user sees its text.
type failure struct{ text string }

func (e *failure) Error() string { return e.text }

func failf(format string, args ...any) error { return &failure{fmt.Sprintf(format, args...)} }
