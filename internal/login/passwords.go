// Package login decides who is let in. [Passwords] verifies the passwords of a server's users: it hides how a verifier
// is made, what is remembered of it so that a login is cheap, and how guessing is slowed down. [Refusals] counts those
// that are not let in for the alert about them. It knows nothing of sessions, of what a role allows, or of the file of
// the users.
package login

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/argon2"

	"coppice/internal/users"
)

// Cost of a password verifier. One takes some tens of milliseconds and 64 MiB;
// argonAtOnce bounds how much of both logins may use together.
const (
	argonTime    = 1
	argonMemory  = 64 << 10 // KiB
	argonThreads = 4
	argonKey     = 32 // bytes
	argonSalt    = 16 // bytes
	argonAtOnce  = 2
)

// A failed login is answered after a pause, at first FirstPause, that doubles
// with every failure of the same user in a row, so that guessing is slow and a
// typing error is not.
const (
	FirstPause = 250 * time.Millisecond
	maxPause   = 5 * time.Second
)

// Hash makes a verifier for password: argon2id with a fresh salt, in
// the usual $argon2id$v=19$m=…,t=…,p=…$salt$key form.
func Hash(password string) string {
	salt := make([]byte, argonSalt)
	rand.Read(salt)
	v := verifier{time: argonTime, memory: argonMemory, threads: argonThreads, salt: salt}
	v.key = v.derive(password, argonKey)
	return v.String()
}

// Matches reports whether verifier was made from password. What is no
// verifier matches nothing.
func Matches(verifier, password string) bool {
	v, err := parseVerifier(verifier)
	return err == nil && v.matches(password)
}

// verifier is a parsed argon2id verifier.
type verifier struct {
	time, memory uint32
	threads      uint8
	salt, key    []byte
}

func (v *verifier) derive(password string, n int) []byte {
	return argon2.IDKey([]byte(password), v.salt, v.time, v.memory, v.threads, uint32(n))
}

func (v *verifier) matches(password string) bool {
	return subtle.ConstantTimeCompare(v.derive(password, len(v.key)), v.key) == 1
}

func (v *verifier) String() string {
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version,
		v.memory, v.time, v.threads, b64.EncodeToString(v.salt), b64.EncodeToString(v.key))
}

// equal reports whether two verifiers, of which any may be nil, are the same.
func (v *verifier) equal(other *verifier) bool {
	if v == nil || other == nil {
		return v == other
	}
	return v.String() == other.String()
}

// parseVerifier parses what Hash and other implementations write. It
// refuses costs that would make a login a way to stop the server.
func parseVerifier(s string) (*verifier, error) {
	parts := strings.Split(s, "$")
	if len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" {
		return nil, fmt.Errorf("password verifier is not of the form $argon2id$v=…$m=…,t=…,p=…$salt$key")
	}
	v := &verifier{}
	var version int
	if _, err := fmt.Sscanf(parts[2], "v=%d", &version); err != nil || version != argon2.Version {
		return nil, fmt.Errorf("password verifier has argon2 version %q, want %d", parts[2], argon2.Version)
	}
	if _, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &v.memory, &v.time, &v.threads); err != nil {
		return nil, fmt.Errorf("password verifier has costs %q: %w", parts[3], err)
	}
	if v.time < 1 || v.time > 16 || v.threads < 1 || v.memory > 1<<20 {
		return nil, fmt.Errorf("password verifier has costs %q out of range", parts[3])
	}
	var err error
	if v.salt, err = base64.RawStdEncoding.DecodeString(parts[4]); err != nil {
		return nil, fmt.Errorf("password verifier: salt: %w", err)
	}
	if v.key, err = base64.RawStdEncoding.DecodeString(parts[5]); err != nil {
		return nil, fmt.Errorf("password verifier: key: %w", err)
	}
	if len(v.key) == 0 {
		return nil, fmt.Errorf("password verifier: key: empty")
	}
	return v, nil
}

// Passwords checks the passwords of the server's own users. It is safe for
// concurrent use. Every xe command
// logs in, so a password that was verified once is remembered as a digest
// under a key that exists only in this process; later logins cost
// microseconds, and a wrong password of a user whose right one is known is
// found out without argon2.
type Passwords struct {
	root string        // the user that is not in the file of the users
	key  [32]byte      // of the remembered digests
	slow chan struct{} // one token per running argon2

	mu       sync.Mutex
	users    map[string]*user
	stranger user // counts the failures of all names that are no users
}

// user is one account. Passwords.mu guards it.
type user struct {
	verifier *verifier // nil refuses every password
	known    []byte    // digest of the verified password, nil before the first
	failures int       // in a row
}

// NewPasswords makes the table of one user, root, whom no list of Follow takes
// away; text is its verifier, or "", with which no password is right.
func NewPasswords(name, text string) (*Passwords, error) {
	p := &Passwords{root: name, slow: make(chan struct{}, argonAtOnce), users: map[string]*user{}}
	rand.Read(p.key[:])
	u := &user{}
	if text != "" {
		v, err := parseVerifier(text)
		if err != nil {
			return nil, err
		}
		u.verifier = v
	}
	p.users[name] = u
	return p, nil
}

func (p *Passwords) digest(name, password string) []byte {
	h := hmac.New(sha256.New, p.key[:])
	fmt.Fprintf(h, "%d:%s", len(name), name)
	h.Write([]byte(password))
	return h.Sum(nil)
}

// Verify reports whether password is the one of the user. A refusal takes
// until the user's back-off pause is over. The error is that of ctx.
func (p *Passwords) Verify(ctx context.Context, name, password string) (bool, error) {
	digest := p.digest(name, password)
	p.mu.Lock()
	u := p.users[name]
	if u == nil {
		u = &p.stranger
	}
	v, known := u.verifier, u.known
	p.mu.Unlock()

	var ok bool
	switch {
	case known != nil:
		ok = hmac.Equal(known, digest)
	case v != nil:
		select {
		case p.slow <- struct{}{}:
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
		ok = v.matches(password)
		<-p.slow
	}

	p.mu.Lock()
	pause := min(FirstPause<<min(u.failures, 8), maxPause)
	if !ok {
		u.failures++
	} else if u.verifier == v {
		u.known, u.failures = digest, 0
	}
	p.mu.Unlock()
	if ok {
		return true, nil
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return false, nil
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}

// Follow makes the users beside root those of list, and returns those that had another password here. A verifier
// that cannot be read matches nothing, and is reported.
func (p *Passwords) Follow(log *slog.Logger, list []users.User) (reset []string) {
	parsed := map[string]*verifier{}
	for _, u := range list {
		parsed[u.Name] = nil
		if u.Verifier == "" {
			continue
		}
		v, err := parseVerifier(u.Verifier)
		if err != nil {
			log.Error("a user cannot log in", "user", u.Name, "err", err)
			continue
		}
		parsed[u.Name] = v
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for name := range p.users {
		if _, ok := parsed[name]; !ok && name != p.root {
			delete(p.users, name)
		}
	}
	for name, v := range parsed {
		u := p.users[name]
		if u == nil {
			u = &user{}
			p.users[name] = u
		}
		if !v.equal(u.verifier) {
			u.verifier, u.known, u.failures = v, nil, 0
			reset = append(reset, name)
		}
	}
	return reset
}

// Set gives the user a new password, after save has stored its verifier. An
// error of save leaves the old one.
func (p *Passwords) Set(name, password string, save func(user, verifier string) error) error {
	p.slow <- struct{}{}
	text := Hash(password)
	<-p.slow
	v, err := parseVerifier(text)
	if err != nil {
		return err
	}
	if err := save(name, text); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.users[name] == nil {
		p.users[name] = &user{}
	}
	u := p.users[name]
	u.verifier, u.known, u.failures = v, p.digest(name, password), 0
	return nil
}
