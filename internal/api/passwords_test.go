package api

import (
	"strings"
	"testing"
)

// cheapVerifier is HashPassword with the least cost.
func cheapVerifier(password string) string {
	v := verifier{time: 1, memory: 8, threads: 1, salt: []byte("0123456789abcdef")}
	v.key = v.derive(password, argonKey)
	return v.String()
}

func TestHashPassword(t *testing.T) {
	text := HashPassword("p")
	if !strings.HasPrefix(text, "$argon2id$v=19$m=65536,t=1,p=4$") {
		t.Errorf("verifier %s", text)
	}
	if text == HashPassword("p") {
		t.Error("two verifiers have the same salt")
	}
	p, err := newPasswords("root", text)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := p.verify(t.Context(), "root", "p"); !ok || err != nil {
		t.Errorf("verify: %v, %v", ok, err)
	}
}

func TestVerifiedPasswordIsRemembered(t *testing.T) {
	p, err := newPasswords("root", cheapVerifier("right"))
	if err != nil {
		t.Fatal(err)
	}
	if ok, _ := p.verify(t.Context(), "root", "right"); !ok {
		t.Fatal("the right password is refused")
	}
	// From here on nothing may need argon2.
	for range argonAtOnce {
		p.slow <- struct{}{}
	}
	if ok, _ := p.verify(t.Context(), "root", "right"); !ok {
		t.Error("the right password is refused the second time")
	}
	if ok, _ := p.verify(t.Context(), "root", "wrong"); ok {
		t.Error("a wrong password is accepted")
	}
	if ok, _ := p.verify(t.Context(), "right", "root"); ok {
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
	if _, err := newPasswords("root", "x"); err == nil {
		t.Error("a bad verifier starts")
	}
	p, err := newPasswords("root", "")
	if err != nil {
		t.Fatal(err)
	}
	if ok, _ := p.verify(t.Context(), "root", ""); ok {
		t.Error("no verifier lets the empty password in")
	}
}
