// Command coppice is the Coppice server and the tools that look after its
// data.
//
//	coppice serve     run the server
//	coppice check     verify the stores of a stopped server, exactly, and repair them
//	coppice scrub     read all of the stores of a stopped server
//	coppice dump      show what is inside a store
//	coppice doctor    look for trouble around the server, with ways out
//	coppice user      look after the users beside root
//	coppice version   tell what this binary is
//
// # Data directory
//
// Everything lives in one directory, --data, by default
// $XDG_STATE_HOME/coppice or ~/.local/state/coppice, mode 0700:
//
//	LOCK            held while a server, or a tool that writes, uses the directory
//	coppice.db      the object database (bbolt)
//	store/          the disks of the default storage repository
//	sr/             one directory for each other repository that was given no place of its own
//	tls/            cert.pem and key.pem, made at the first start unless --tls-cert names others
//	root.password   argon2id verifier of root's password, mode 0600
//	root.password.source
//	                which state of which --admin-password-file that verifier is of
//	users.json      the users beside root with their verifiers, mode 0600
//	coppice.sock    Unix socket; processes of the same user need no password there
//
// # Exit codes
//
//	0   done; a server: stopped because it was asked to
//	1   done, and the news is bad: a check found problems, a server failed while running
//	2   could not do it: bad command line, directory in use, port taken, …
package main

import (
	"context"
	"os"
	_ "time/tzdata" // schedules name zones; a host may have no database of them
)

func main() {
	os.Exit(run(context.Background(), env{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv,
	}, os.Args[1:]))
}
