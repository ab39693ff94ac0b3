package main

import (
	"fmt"
	"iter"

	"coppice/internal/cow"
)

// ranges yields problems with those joined into one that continue each other
// in the contents of a volume: a damaged megabyte is one line, not 256.
func ranges(found iter.Seq2[cow.Problem, error]) iter.Seq2[cow.Problem, error] {
	return func(yield func(cow.Problem, error) bool) {
		var last *cow.Problem // what the next problem may continue
		for p, err := range found {
			switch {
			case err == nil && last != nil && continues(*last, p):
				last.Len += p.Len
				continue
			case last != nil && !yield(*last, nil):
				return
			case err != nil:
				yield(cow.Problem{}, err)
				return
			}
			last = &p
		}
		if last != nil {
			yield(*last, nil)
		}
	}
}

// continues reports whether b is more of the damage a, right behind it.
func continues(a, b cow.Problem) bool {
	return a.Len > 0 && b.Len > 0 && a.Volume == b.Volume && b.Off == a.Off+a.Len && a.Detail == b.Detail && a.Done == b.Done
}

// problems is a number of them in words.
func problems(n int) string {
	if n == 1 {
		return "1 problem"
	}
	return fmt.Sprintf("%d problems", n)
}
