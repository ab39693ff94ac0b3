package thincli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// options is what the client takes out of its arguments for itself.
type options struct {
	server      string
	port        int // 0: by the kind of connection
	username    string
	password    string
	noTLS       bool
	debug       bool
	debugOnFail bool
	traceparent string

	help    bool
	version bool
	args    []string // for the server, without credentials
}

// errVersion asks for the protocol version instead of a run.
var errVersion = errors.New("version")

// parseOptions merges, weakest first, ~/.xe, XE_EXTRA_ARGS and the command
// line. The arguments for the server come out in the opposite order.
func parseOptions(env *Env, args []string) (*options, error) {
	o := &options{server: "127.0.0.1", username: "root", password: "null"}
	var passwordFile string

	rc, err := o.consume(readRC(env), &passwordFile)
	if err != nil {
		return nil, err
	}
	extra, err := o.consume(splitExtra(env.getenv("XE_EXTRA_ARGS")), &passwordFile)
	if err != nil {
		return nil, err
	}
	if t := env.getenv("TRACEPARENT"); t != "" {
		o.traceparent = t
	}
	line, err := o.consume(args, &passwordFile)
	if err != nil {
		return nil, err
	}

	switch {
	case o.version:
		return nil, errVersion
	case o.help || len(line)+len(extra) == 0:
		return nil, &failure{text: usage}
	}
	if passwordFile != "" {
		if err := o.readPasswordFile(env, passwordFile); err != nil {
			return nil, err
		}
	}
	o.args = append(append(line, extra...), rc...)
	return o, nil
}

// consume applies the options among args and returns the other arguments.
func (o *options) consume(args []string, passwordFile *string) (rest []string, err error) {
	for i := 0; i < len(args); i++ {
		key, value := "", ""
		switch arg := args[i]; arg {
		case "-help", "--help":
			o.help = true
			continue
		case "-version":
			o.version = true
			continue
		case "--nossl":
			key, value = "nossl", "true"
		case "--debug":
			key, value = "debug", "true"
		case "--debug-on-fail":
			key, value = "debugonfail", "true"
		case "-s", "-h", "-p", "-u", "-pw", "-pwf", "--traceparent":
			if i+1 == len(args) {
				rest = append(rest, arg)
				continue
			}
			i++
			value = args[i]
			key = map[string]string{
				"-s": "server", "-h": "server", "-p": "port", "-u": "username", "-pw": "password",
				"-pwf": "passwordfile", "--traceparent": "traceparent",
			}[arg]
		default:
			key, value, _ = strings.Cut(arg, "=")
			if key == arg {
				rest = append(rest, arg)
				continue
			}
		}
		flag := (*bool)(nil)
		switch key {
		case "server":
			o.server = value
		case "port":
			n, err := strconv.ParseUint(value, 10, 16)
			if err != nil {
				return nil, &failure{text: "Port number must be an integer (0-65535)\n" + usage}
			}
			o.port = int(n)
		case "username":
			o.username = value
		case "password":
			o.password = value
		case "passwordfile":
			*passwordFile = value
		case "traceparent":
			o.traceparent = value
		case "nossl":
			flag = &o.noTLS
		case "debug":
			flag = &o.debug
		case "debugonfail":
			flag = &o.debugOnFail
		default:
			rest = append(rest, args[i])
		}
		if flag != nil {
			if value != "true" && value != "false" {
				return nil, failf("Error: %s must be true or false, not %q\n", key, value)
			}
			*flag = value == "true"
		}
	}
	return rest, nil
}

func (o *options) readPasswordFile(env *Env, name string) error {
	b, err := os.ReadFile(env.path(name))
	if err != nil {
		return failf("Error opening password file '%s'\n", name)
	}
	lines := strings.Split(string(b), "\n")
	if len(lines) < 2 {
		return failf("Error: password file format: expecting username on the first line, password on the second line\n")
	}
	o.username = strings.TrimSuffix(lines[0], "\r")
	o.password = strings.TrimSuffix(lines[1], "\r")
	return nil
}

// readRC returns the lines of ~/.xe. A file with a line that is not
// key=value counts as a whole for nothing.
func readRC(env *Env) []string {
	home := env.getenv("HOME")
	if home == "" {
		return nil
	}
	b, err := os.ReadFile(env.path(filepath.Join(home, ".xe")))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			fmt.Fprintf(env.Stderr, "Error reading rc file. No defaults loaded\n")
		}
		return nil
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		line = strings.TrimRight(line, "\r\n")
		if strings.TrimSpace(line) == "" {
			continue
		}
		if !strings.Contains(line, "=") {
			fmt.Fprintf(env.Stderr, "Error parsing rc file. No defaults loaded\n")
			return nil
		}
		out = append(out, line)
	}
	return out
}

// splitExtra splits XE_EXTRA_ARGS at its commas; a backslash keeps one, and vanishes.
func splitExtra(s string) []string {
	var out []string
	var cur strings.Builder
	end := func() {
		if cur.Len() > 0 {
			out = append(out, cur.String())
		}
		cur.Reset()
	}
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\':
			if i+1 < len(s) && s[i+1] == ',' {
				i++
				cur.WriteByte(',')
			}
		case s[i] == ',':
			end()
		default:
			cur.WriteByte(s[i])
		}
	}
	end()
	return out
}

// permitted returns the absolute names of all files that args mention: the
// server may ask for these and no others.
func permitted(env *Env, args []string) map[string]bool {
	files := make(map[string]bool)
	for _, a := range args {
		if _, v, ok := strings.Cut(a, "="); ok && strings.TrimSpace(v) != "" {
			files[env.path(v)] = true
		}
	}
	return files
}

// Env is what the client needs of the world.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer

	// Getenv reads the environment; nil means it is empty.
	Getenv func(string) string
	// Dir is the directory that relative file names refer to, as an absolute path.
	Dir string
	// Dial opens connections, to "tcp" and "unix" addresses; nil means the system's.
	Dial DialFunc
	// RawTerminal puts the terminal at Stdin, if there is one, into raw mode
	// for a console session and returns what undoes it. It may be nil.
	RawTerminal func() (restore func())

	stdin *bufio.Reader
}

func (e *Env) getenv(name string) string {
	if e.Getenv == nil {
		return ""
	}
	return e.Getenv(name)
}

func (e *Env) path(name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(e.Dir, name)
}
