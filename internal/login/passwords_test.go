package login

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// cheapVerifier is Hash with the least cost.
func cheapVerifier(password string) string {
	v := verifier{time: 1, memory: 8, threads: 1, salt: []byte("0123456789abcdef")}
	v.key = v.derive(password, argonKey)
	return v.String()
}

func TestHash(t *testing.T) {
	text := Hash("p")
	if !strings.HasPrefix(text, "$argon2id$v=19$m=65536,t=1,p=4$") {
		t.Errorf("verifier %s", text)
	}
	if text == Hash("p") {
		t.Error("two verifiers have the same salt")
	}
	p, err := NewPasswords("root", text)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := p.Verify(t.Context(), "root", "p"); !ok || err != nil {
		t.Errorf("verify: %v, %v", ok, err)
	}
}

func TestVerifiedPasswordIsRemembered(t *testing.T) {
	p, err := NewPasswords("root", cheapVerifier("right"))
	if err != nil {
		t.Fatal(err)
	}
	if ok, _ := p.Verify(t.Context(), "root", "right"); !ok {
		t.Fatal("the right password is refused")
	}
	// From here on nothing may need argon2.
	for range argonAtOnce {
		p.slow <- struct{}{}
	}
	if ok, _ := p.Verify(t.Context(), "root", "right"); !ok {
		t.Error("the right password is refused the second time")
	}
	if ok, _ := p.Verify(t.Context(), "root", "wrong"); ok {
		t.Error("a wrong password is accepted")
	}
	if ok, _ := p.Verify(t.Context(), "right", "root"); ok {
		t.Error("another user is accepted")
	}
}

func TestParseVerifier(t *testing.T) {
	good := cheapVerifier("x")
	v, err := parseVerifier(good)
	if err != nil || v.String() != good {
		t.Errorf("%s: %v, %v", good, v, err)
	}
	for _, bad := range []string{
		"", "x", "$argon2i$v=19$m=8,t=1,p=1$AAAA$AAAA", "$argon2id$v=16$m=8,t=1,p=1$AAAA$AAAA", "$argon2id$v=19$m=8,t=1$AAAA$AAAA",
		"$argon2id$v=19$m=8,t=0,p=1$AAAA$AAAA", "$argon2id$v=19$m=999999999,t=1,p=1$AAAA$AAAA", "$argon2id$v=19$m=8,t=1,p=1$!$AAAA",
		"$argon2id$v=19$m=8,t=1,p=1$AAAA$", "$argon2id$v=19$m=8,t=1,p=1$AAAA$!", "$argon2id$v=19$m=8,t=1,p=1$AAAA$AAAA$",
	} {
		if v, err := parseVerifier(bad); err == nil {
			t.Errorf("%q: %v, want an error", bad, v)
		}
	}
	if _, err := NewPasswords("root", "x"); err == nil {
		t.Error("a bad verifier starts")
	}
	p, err := NewPasswords("root", "")
	if err != nil {
		t.Fatal(err)
	}
	if ok, _ := p.Verify(t.Context(), "root", ""); ok {
		t.Error("no verifier lets the empty password in")
	}
}

func TestBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := NewPasswords("root", cheapVerifier("right"))
		if err != nil {
			t.Fatal(err)
		}
		verify := func(ctx context.Context, password string) (ok bool, took time.Duration, err error) {
			begin := time.Now()
			ok, err = p.Verify(ctx, "root", password)
			return ok, time.Since(begin), err
		}
		var pauses []time.Duration
		for range 7 {
			ok, took, err := verify(t.Context(), "wrong")
			if ok || err != nil {
				t.Fatalf("a wrong password: %v, %v", ok, err)
			}
			pauses = append(pauses, took)
		}
		want := []time.Duration{FirstPause, 2 * FirstPause, 4 * FirstPause, 8 * FirstPause, 16 * FirstPause, maxPause, maxPause}
		if !slices.Equal(pauses, want) {
			t.Errorf("pauses %v, want %v", pauses, want)
		}
		if ok, took, _ := verify(t.Context(), "right"); !ok || took != 0 {
			t.Errorf("the right password: %v after %v", ok, took)
		}
		if _, took, _ := verify(t.Context(), "wrong"); took != FirstPause {
			t.Errorf("a wrong one after the right one waits for %v", took)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("gone")
		cancel(gone)
		if _, took, err := verify(ctx, "wrong"); err != gone || took != 0 {
			t.Errorf("who does not wait: %v after %v", err, took)
		}
	})
}
