package schedule

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// maxKept bounds each number of a [Keep].
const maxKept = 10_000

// Keep says which results are kept: the newest ones, and of each of the last hours, days, weeks, months and years
// that have any, the last one. A result that several rules want is kept once and counts for each.
type Keep struct {
	Last                                   int
	Hourly, Daily, Weekly, Monthly, Yearly int
}

// tier returns the number that a key of the text form sets, nil for an unknown one.
func (k *Keep) tier(name string) *int {
	switch name {
	case "hourly":
		return &k.Hourly
	case "daily":
		return &k.Daily
	case "weekly":
		return &k.Weekly
	case "monthly":
		return &k.Monthly
	case "yearly":
		return &k.Yearly
	}
	return nil
}

// rule keeps the last result of each of the n newest periods.
type rule struct {
	name   string
	n      int
	period func(t time.Time) string // the same for all times of a period
}

// Why returns for each of the results, given by when they were taken, the rules that keep it: none for one that
// goes. Periods begin and end as the calendar of zone says. The order of times matters to equal ones only: the first
// counts as the newest.
func (k Keep) Why(times []time.Time, zone *time.Location) [][]string {
	order := make([]int, len(times)) // newest first
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return times[b].Compare(times[a]) })
	why := make([][]string, len(times))
	for rank, i := range order[:min(k.Last, len(order))] {
		why[i] = append(why[i], fmt.Sprintf("last %d", rank+1))
	}
	for _, r := range []rule{
		{"hourly", k.Hourly, func(t time.Time) string { return t.Format("2006-01-02 15 -07:00") }},
		{"daily", k.Daily, func(t time.Time) string { return t.Format(time.DateOnly) }},
		{"weekly", k.Weekly, func(t time.Time) string {
			year, week := t.ISOWeek()
			return fmt.Sprint(year, " ", week)
		}},
		{"monthly", k.Monthly, func(t time.Time) string { return t.Format("2006-01") }},
		{"yearly", k.Yearly, func(t time.Time) string { return t.Format("2006") }},
	} {
		left, before := r.n, ""
		for _, i := range order {
			period := r.period(times[i].In(zone))
			if left == 0 {
				break
			}
			if period != before {
				before, left = period, left-1
				why[i] = append(why[i], r.name+" "+period)
			}
		}
	}
	return why
}

// Gone returns the indexes of the results that no rule keeps, the oldest first.
func (k Keep) Gone(times []time.Time, zone *time.Location) []int {
	var gone []int
	for i, why := range k.Why(times, zone) {
		if len(why) == 0 {
			gone = append(gone, i)
		}
	}
	slices.SortFunc(gone, func(a, b int) int { return cmp.Or(times[a].Compare(times[b]), cmp.Compare(a, b)) })
	return gone
}
