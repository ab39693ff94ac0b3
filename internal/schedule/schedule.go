// Package schedule decides when something that recurs is due, and which of its results are kept. It knows
// calendars and nothing else: no clock, no database, no idea of what is being scheduled.
//
// # Slots
//
// A [Schedule] is a set of slots, instants at which a wall clock in its zone shows the wanted time. [Schedule.Last]
// and [Schedule.Next] find the neighbours of any instant, so that a caller who remembers when it last ran needs no
// other state: it is due when the last slot is younger than that.
//
// Days on which clocks are changed have each slot once, too:
//
//   - an hour that the clock shows twice has the slots of a daily or weekly schedule the first time, those of an
//     hourly one both times;
//   - a time of day that the clock skips has its slot at the moment of the change; an hourly schedule has none then.
package schedule

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Frequency says how often there is a slot.
type Frequency string

// The frequencies.
const (
	Hourly Frequency = "hourly"
	Daily  Frequency = "daily"
	Weekly Frequency = "weekly"
)

// Period is how far the slots are apart, about.
func (f Frequency) Period() time.Duration {
	switch f {
	case Hourly:
		return time.Hour
	case Daily:
		return 24 * time.Hour
	default:
		return 7 * 24 * time.Hour
	}
}

// Keys of the text form of a schedule.
const (
	keyMinute = "min"  // 0, 15, 30 or 45
	keyHour   = "hour" // 0 to 23; not for hourly schedules
	keyDays   = "days" // English names with commas between them; for weekly schedules
)

// Keys beyond those of XenAPI; see [Keep] for their other half.
const (
	// KeyZone names the time zone of a schedule, as Europe/Berlin does.
	KeyZone = "coppice:timezone"

	keepPrefix = "coppice:keep-"
)

// Schedule is a set of slots.
type Schedule struct {
	Frequency Frequency
	Minute    int
	Hour      int
	Days      [7]bool // by time.Weekday
	Zone      *time.Location
	Keep      Keep // without Last, which is not part of the text form
}

// ValueError says which entry of a schedule's text form is wrong.
type ValueError struct{ Key, Value string }

func (e *ValueError) Error() string { return fmt.Sprintf("schedule: %s cannot be %q", e.Key, e.Value) }

// Parse reads the text form of a schedule. Its zone is local unless the text names one. Keys that another frequency
// would need may be there; unknown ones, and values out of range, are a *ValueError. A missing min or hour is 0; a
// weekly schedule without days is an error.
func Parse(f Frequency, text map[string]string, local *time.Location) (Schedule, error) {
	s := Schedule{Frequency: f, Zone: local}
	for key, value := range text {
		ok := false
		switch {
		case key == keyMinute:
			ok = number(value, 45, &s.Minute) && s.Minute%15 == 0
		case key == keyHour:
			ok = number(value, 23, &s.Hour)
		case key == keyDays:
			s.Days, ok = parseDays(value)
		case key == KeyZone:
			zone, err := time.LoadLocation(value)
			if ok = err == nil && value != ""; ok {
				s.Zone = zone
			}
		case strings.HasPrefix(key, keepPrefix):
			if n := s.Keep.tier(strings.TrimPrefix(key, keepPrefix)); n != nil {
				ok = number(value, maxKept, n)
			}
		}
		if !ok {
			return Schedule{}, &ValueError{key, value}
		}
	}
	if f == Weekly && s.Days == ([7]bool{}) {
		return Schedule{}, &ValueError{keyDays, text[keyDays]}
	}
	return s, nil
}

// number reads a decimal number from 0 to limit, without sign or decoration.
func number(text string, limit int, n *int) bool {
	v, err := strconv.ParseUint(text, 10, 16)
	*n = int(v)
	return err == nil && *n <= limit
}

func parseDays(text string) (days [7]bool, ok bool) {
	for name := range strings.SplitSeq(text, ",") {
		found := false
		for d := time.Sunday; d <= time.Saturday; d++ {
			if strings.EqualFold(strings.TrimSpace(name), d.String()) {
				days[d], found = true, true
			}
		}
		if !found {
			return days, false
		}
	}
	return days, true
}

// Last returns the last slot that is not after t.
func (s Schedule) Last(t time.Time) time.Time {
	if s.Frequency == Hourly {
		return s.hourly(t.Truncate(time.Minute), -time.Minute)
	}
	var last time.Time
	for day := 1; day >= -8; day-- {
		if slot, ok := s.slotOfDay(t, day); ok && !slot.After(t) && slot.After(last) {
			last = slot
		}
	}
	return last
}

// Next returns the first slot after t.
func (s Schedule) Next(t time.Time) time.Time {
	if s.Frequency == Hourly {
		return s.hourly(t.Truncate(time.Minute).Add(time.Minute), time.Minute)
	}
	var next time.Time
	for day := 8; day >= -1; day-- {
		if slot, ok := s.slotOfDay(t, day); ok && slot.After(t) && (next.IsZero() || slot.Before(next)) {
			next = slot
		}
	}
	return next
}

// hourly looks from t on in steps of a minute for the time at which the clock shows the minute. Zones differ in
// their minutes too, and may change them by less than an hour; nowhere is it further away than two hours.
func (s Schedule) hourly(t time.Time, step time.Duration) time.Time {
	for t.In(s.Zone).Minute() != s.Minute {
		t = t.Add(step)
	}
	return t.UTC()
}

// slotOfDay returns the slot that belongs to a day of the calendar, counted from the one that it is at t.
func (s Schedule) slotOfDay(t time.Time, day int) (time.Time, bool) {
	y, m, d := t.In(s.Zone).Date()
	date := time.Date(y, m, d+day, s.Hour, s.Minute, 0, 0, time.UTC)
	if s.Frequency == Weekly && !s.Days[date.Weekday()] {
		return time.Time{}, false
	}
	return instant(date, s.Zone), true
}

// instant returns the first time at which a clock in the zone shows what one in UTC shows at wall, or when it never
// does, the change that makes it skip that.
func instant(wall time.Time, zone *time.Location) time.Time {
	y, m, d := wall.Date()
	t := time.Date(y, m, d, wall.Hour(), wall.Minute(), 0, 0, zone)
	begin, end := t.ZoneBounds()
	if !shows(t, wall) {
		if end.IsZero() || !begin.IsZero() && t.Sub(begin) < end.Sub(t) {
			return begin.UTC()
		}
		return end.UTC()
	}
	if !begin.IsZero() {
		_, offset := begin.Add(-time.Nanosecond).Zone()
		earlier := wall.Add(-time.Duration(offset) * time.Second)
		if earlier.Before(begin) && shows(earlier.In(zone), wall) {
			return earlier
		}
	}
	return t.UTC()
}

// shows reports whether the clock of t reads like that of wall.
func shows(t, wall time.Time) bool {
	return t.Format(time.DateTime) == wall.Format(time.DateTime)
}
