package server

import (
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// ownPeer reports whether c is a Unix socket connection from a process with
// the server's own effective user id. The kernel vouches for that.
func ownPeer(c net.Conn) bool {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return err == nil && credErr == nil && int(cred.Uid) == os.Geteuid()
}
