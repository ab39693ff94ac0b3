package thincli

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"
)

const (
	consoleEscape   = 0x1d // Ctrl-]
	consoleFirstTry = 100 * time.Millisecond
	consoleLastTry  = 5 * time.Second
)

// console connects the terminal with a URL until Ctrl-], the end of input or
// of the connection. A console that cannot be reached is tried again, at
// growing intervals, until the run ends.
func (c *client) console(ctx context.Context, m HTTPConnect) (Response, error) {
	x, err := c.connectConsole(ctx, m.URL)
	if err != nil {
		if errors.Is(err, errRefused) && strings.Contains(err.Error(), "404") {
			return Failed, failf("Server replied with HTTP 404: the console is not available\n")
		}
		return Failed, nil
	}
	defer x.Close()
	if c.env.RawTerminal != nil {
		defer c.env.RawTerminal()()
	}
	// Reading a terminal cannot be interrupted. When the connection ends
	// first this goroutine stays behind in Read until the program exits,
	// which is what the stock client makes it do next.
	go func() {
		defer x.Close()
		buf := make([]byte, 4096)
		for {
			n, err := c.env.stdin.Read(buf)
			i := strings.IndexByte(string(buf[:n]), consoleEscape)
			if i >= 0 {
				n = i
			}
			if _, e := x.Write(buf[:n]); e != nil || err != nil || i >= 0 {
				return
			}
		}
	}()
	_, _ = io.Copy(c.env.Stdout, x.r) // its end, however it comes, is the session's
	return OK, nil
}

func (c *client) connectConsole(ctx context.Context, url string) (*exchange, error) {
	for delay := consoleFirstTry; ; delay = min(2*delay, consoleLastTry) {
		x, err := c.httpRequest(ctx, "CONNECT", url, "content-length: 0\r\n")
		if err == nil || errors.Is(err, errRefused) {
			return x, err
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
