package server

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
)

// count produces 0, 1, … up to n into the buffers it is given.
func count(n int) func(context.Context, func() (*int, error), func(*int)) error {
	return func(_ context.Context, next func() (*int, error), send func(*int)) error {
		for i := range n {
			b, err := next()
			if err != nil {
				return err
			}
			*b = i
			send(b)
		}
		return nil
	}
}

func ints(n int) []*int {
	bs := make([]*int, n)
	for i := range bs {
		bs[i] = new(int)
	}
	return bs
}

func TestRelay(t *testing.T) {
	for _, buffers := range []int{1, 2, 7} {
		var got []int
		err := relay(t.Context(), ints(buffers), count(20), func(b *int) error {
			got = append(got, *b)
			*b = -1 // what is consumed may be overwritten
			return nil
		})
		want := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%d buffers: %v, error %v", buffers, got, err)
		}
	}
}

// Nothing is read ahead beyond the buffers.
func TestRelayBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		produced, consume := 0, make(chan struct{})
		done := make(chan error)
		go func() {
			done <- relay(t.Context(), ints(3), func(_ context.Context, next func() (*int, error), send func(*int)) error {
				for range 10 {
					b, err := next()
					if err != nil {
						return err
					}
					produced++
					send(b)
				}
				return nil
			}, func(*int) error { <-consume; return nil })
		}()
		synctest.Wait()
		if produced != 3 {
			t.Errorf("%d buffers filled while the first is being consumed, want 3", produced)
		}
		close(consume)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A buffer that the consumer keeps is not filled again before it is given back.
func TestRelayLent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var kept []func()
		var got []int
		var sent []*int
		done := make(chan error)
		consumed := make(chan struct{})
		go func() {
			done <- relayLent(t.Context(), ints(3), count(7), func(b *int, release func()) error {
				got, sent, kept = append(got, *b), append(sent, b), append(kept, release)
				if len(got) == 3 {
					close(consumed)
				}
				return nil
			})
		}()
		<-consumed
		synctest.Wait()
		if len(got) != 3 || *sent[0] != 0 || *sent[1] != 1 || *sent[2] != 2 {
			t.Fatalf("%v consumed while 3 buffers are kept", got)
		}
		for i := range 4 {
			kept[i]()
			synctest.Wait()
			if len(got) != 4+i {
				t.Fatalf("%v consumed after %d buffers were given back", got, 1+i)
			}
		}
		if err := <-done; err != nil { // with three still kept
			t.Error(err)
		}
		for _, release := range kept[4:] {
			release()
		}
		if want := []int{0, 1, 2, 3, 4, 5, 6}; !slices.Equal(got, want) {
			t.Errorf("consumed %v, want %v", got, want)
		}
	})
}

// A consumer that fails leaves nobody waiting for the buffers that it keeps.
func TestRelayLentFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var release func()
		err := relayLent(t.Context(), ints(1), count(5), func(_ *int, r func()) error {
			release = r
			return errTest
		})
		if err != errTest {
			t.Errorf("relay: %v, want %v", err, errTest)
		}
		release()
	})
}

var errTest = errors.New("broken")

func TestRelayConsumerFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		var seen error
		err := relay(t.Context(), ints(2), func(ctx context.Context, next func() (*int, error), send func(*int)) error {
			for range 3 {
				b, err := next()
				if err != nil {
					return err
				}
				send(b)
			}
			<-ctx.Done() // as a read from a client that sends nothing
			seen = context.Cause(ctx)
			return seen
		}, func(*int) error {
			if n++; n == 2 {
				return errTest
			}
			return nil
		})
		if err != errTest || seen != errTest && seen != nil {
			t.Errorf("relay: %v, the producer saw %v, want %v", err, seen, errTest)
		}
		if n != 2 {
			t.Errorf("%d buffers consumed, want none after the failure of the second", n)
		}
	})
}

func TestRelayProducerFails(t *testing.T) {
	n := 0
	err := relay(t.Context(), ints(2), func(ctx context.Context, next func() (*int, error), send func(*int)) error {
		if err := count(3)(ctx, next, send); err != nil {
			return err
		}
		return errTest
	}, func(*int) error { n++; return nil })
	if err != errTest || n != 3 {
		t.Errorf("relay: %v after %d buffers, want %v after 3", err, n, errTest)
	}
}

func TestRelayCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		n := 0
		err := relay(ctx, ints(2), count(1000), func(*int) error {
			if n++; n == 5 {
				cancel(errTest)
			}
			return nil
		})
		if err != errTest || n != 5 {
			t.Errorf("relay: %v after %d buffers, want %v after 5", err, n, errTest)
		}
	})
}
