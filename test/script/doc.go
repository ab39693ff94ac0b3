// Package script holds the end-to-end tests: stories in testdata/*.txtar that
// start a real server and drive it with xe and with raw HTTP, the way a user
// does. Besides the standard commands of testscript they have
//
//	small DIR SIZE           before serve: DIR is a file system of that size (as of tmpfs) of the server
//	                         alone; needs the condition [mount]
//	serve [FLAG…]            start a server on free ports, data in $WORK/data, and wait until it is ready
//	shutdown                 stop it with SIGTERM; it must exit with 0
//	crash                    end it with SIGKILL
//	coppice ARG…             run coppice; ! for exit code 1 or 2
//	xe ARG…                  run xe against the server
//	login NAME               set $NAME to a new session of root
//	set NAME                 set $NAME to the standard output of the command before, trimmed
//	http METHOD PATH [HEADER: VALUE]… [@FILE]
//	                         send an HTTP/1.0 request with the contents of FILE as its body; the
//	                         whole reply, headers first, is the standard output; -tls and -unix
//	                         before METHOD choose another door than plain HTTP
//	raw [-tls|-unix] FILE    send FILE as it is, its line ends turned into CRLF up to the first
//	                         empty line, variables replaced
//	npm NAME                 copy npm/NAME to $WORK/NAME, with the packages that its lock file names
//
// After serve these variables are set: HTTP, HTTPS (host:port), SOCKET,
// PASSWORD of root, and XE_EXTRA_ARGS, so that xe needs no further words.
// bin/ with coppice and xe comes first in PATH, so that shell scripts see
// them too.
//
// Run with -update to rewrite the expected outputs that cmp compares.
package script
