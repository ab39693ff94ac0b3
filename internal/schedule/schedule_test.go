package schedule

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func zone(t *testing.T, name string) *time.Location {
	t.Helper()
	z, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return z
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		f    Frequency
		text map[string]string
		bad  string // "" when it is good
	}{
		{Hourly, nil, ""},
		{Hourly, map[string]string{"min": "45"}, ""},
		{Hourly, map[string]string{"min": "45", "hour": "3", "days": "Monday"}, ""},
		{Hourly, map[string]string{"min": "7"}, "min=7"},
		{Hourly, map[string]string{"min": "60"}, "min=60"},
		{Hourly, map[string]string{"min": "-15"}, "min=-15"},
		{Hourly, map[string]string{"min": ""}, "min="},
		{Hourly, map[string]string{"min": "+15"}, "min=+15"},
		{Daily, map[string]string{"hour": "23"}, ""},
		{Daily, map[string]string{"hour": "24"}, "hour=24"},
		{Daily, map[string]string{"hour": "99999999999999999999"}, "hour=99999999999999999999"},
		{Daily, map[string]string{"second": "1"}, "second=1"},
		{Weekly, map[string]string{"days": "Monday,friday, SUNDAY"}, ""},
		{Weekly, nil, "days="},
		{Weekly, map[string]string{"days": "Monday,"}, "days=Monday,"},
		{Weekly, map[string]string{"days": "Montag"}, "days=Montag"},
		{Daily, map[string]string{KeyZone: "Europe/Berlin"}, ""},
		{Daily, map[string]string{KeyZone: "Middle/Earth"}, KeyZone + "=Middle/Earth"},
		{Daily, map[string]string{KeyZone: ""}, KeyZone + "="},
		{Daily, map[string]string{KeyZone: "../../etc/passwd"}, KeyZone + "=../../etc/passwd"},
		{Daily, map[string]string{"coppice:keep-weekly": "4"}, ""},
		{Daily, map[string]string{"coppice:keep-weekly": "10001"}, "coppice:keep-weekly=10001"},
		{Daily, map[string]string{"coppice:keep-minutely": "4"}, "coppice:keep-minutely=4"},
	} {
		_, err := Parse(tt.f, tt.text, time.UTC)
		got := ""
		if e, ok := errors.AsType[*ValueError](err); ok {
			got = e.Key + "=" + e.Value
		} else if err != nil {
			got = err.Error()
		}
		if got != tt.bad {
			t.Errorf("%s %v: refused %q, want %q", tt.f, tt.text, got, tt.bad)
		}
	}
}

// Slots around the changes of the clock, as a list of all of them between two
// instants.
func TestSlots(t *testing.T) {
	for _, tt := range []struct {
		name     string
		f        Frequency
		text     string
		zone     string
		from, to string   // UTC
		want     []string // local
	}{
		{
			"hourly", Hourly, "min=15", "UTC", "2026-01-01T00:00Z", "2026-01-01T03:00Z",
			[]string{"00:15+00:00", "01:15+00:00", "02:15+00:00"},
		},
		{
			"hourly over the hour that is there twice", Hourly, "min=30", "Europe/Berlin", "2026-10-24T23:00Z", "2026-10-25T03:00Z",
			[]string{"01:30+02:00", "02:30+02:00", "02:30+01:00", "03:30+01:00"},
		},
		{
			"hourly over the hour that is not there", Hourly, "min=30", "Europe/Berlin", "2026-03-28T23:00Z", "2026-03-29T03:00Z",
			[]string{"00:30+01:00", "01:30+01:00", "03:30+02:00", "04:30+02:00"},
		},
		{
			"hourly where clocks move by half an hour", Hourly, "min=15", "Australia/Lord_Howe", "2026-04-04T13:00Z", "2026-04-04T17:00Z",
			[]string{"00:15+11:00", "01:15+11:00", "02:15+10:30", "03:15+10:30"},
		},
		{
			"hourly where the zone is off by 45 minutes", Hourly, "min=0", "Asia/Kathmandu", "2026-01-01T00:00Z", "2026-01-01T02:00Z",
			[]string{"06:00+05:45", "07:00+05:45"},
		},
		{
			"daily", Daily, "hour=2", "Asia/Tokyo", "2026-01-01T00:00Z", "2026-01-03T00:00Z",
			[]string{"02:00+09:00", "02:00+09:00"},
		},
		{
			"daily at a time that is there twice", Daily, "hour=2,min=30", "Europe/Berlin", "2026-10-24T00:00Z", "2026-10-27T00:00Z",
			[]string{"02:30+02:00", "02:30+02:00", "02:30+01:00"},
		},
		{
			"daily at a time that is not there", Daily, "hour=2,min=30", "Europe/Berlin", "2026-03-28T00:00Z", "2026-03-31T00:00Z",
			[]string{"02:30+01:00", "03:00+02:00", "02:30+02:00"},
		},
		{
			"daily at a midnight that is not there", Daily, "hour=0", "America/Santiago", "2026-09-05T00:00Z", "2026-09-07T12:00Z",
			[]string{"00:00-04:00", "01:00-03:00", "00:00-03:00"},
		},
		{
			"daily over a day that is not there", Daily, "hour=12", "Pacific/Apia", "2011-12-29T00:00Z", "2012-01-01T00:00Z",
			[]string{"12:00-10:00", "00:00+14:00", "12:00+14:00", "12:00+14:00"},
		},
		{
			"weekly", Weekly, "hour=5,days=Monday;Thursday", "UTC", "2026-01-01T00:00Z", "2026-01-09T00:00Z",
			[]string{"05:00+00:00", "05:00+00:00", "05:00+00:00"},
		},
		{
			"weekly, the day of the zone", Weekly, "hour=1,days=Monday", "Asia/Tokyo", "2026-01-01T00:00Z", "2026-01-12T00:00Z",
			[]string{"01:00+09:00", "01:00+09:00"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := parsed(t, tt.f, tt.text, zone(t, tt.zone))
			at := func(s string) time.Time {
				v, err := time.Parse("2006-01-02T15:04Z07:00", s)
				if err != nil {
					t.Fatal(err)
				}
				return v
			}
			var got []string
			for slot := s.Next(at(tt.from).Add(-1)); slot.Before(at(tt.to)); slot = s.Next(slot) {
				if last := s.Last(slot); !last.Equal(slot) {
					t.Errorf("Last(%v) is %v", slot, last)
				}
				if last := s.Last(s.Next(slot).Add(-1)); !last.Equal(slot) {
					t.Errorf("the slot before the one after %v is %v", slot, last)
				}
				got = append(got, slot.In(s.Zone).Format("15:04-07:00"))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
		})
	}
}

func parsed(t testing.TB, f Frequency, text string, z *time.Location) Schedule {
	t.Helper()
	m := map[string]string{}
	for kv := range strings.SplitSeq(text, ",") {
		k, v, _ := strings.Cut(kv, "=")
		m[k] = strings.ReplaceAll(v, ";", ",")
	}
	s, err := Parse(f, m, z)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Whatever the zone and the time: Next is the first slot after, Last the last
// one not after, and there are never two slots closer than the clock allows.
func TestSlotsProperty(t *testing.T) {
	zones := []string{
		"UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia", "America/Santiago",
		"Asia/Kathmandu", "Africa/Casablanca", "Asia/Gaza", "Antarctica/Troll",
	}
	loaded := map[string]*time.Location{}
	for _, name := range zones {
		loaded[name] = zone(t, name)
	}
	rapid.Check(t, func(t *rapid.T) {
		s := Schedule{
			Frequency: rapid.SampledFrom([]Frequency{Hourly, Daily, Weekly}).Draw(t, "frequency"),
			Minute:    15 * rapid.IntRange(0, 3).Draw(t, "quarter"),
			Hour:      rapid.IntRange(0, 23).Draw(t, "hour"),
			Zone:      loaded[rapid.SampledFrom(zones).Draw(t, "zone")],
		}
		s.Days[rapid.IntRange(0, 6).Draw(t, "day")] = true
		s.Days[rapid.IntRange(0, 6).Draw(t, "other day")] = true
		at := time.Unix(rapid.Int64Range(1_200_000_000, 2_100_000_000).Draw(t, "at"), 0)
		next, last := s.Next(at), s.Last(at)
		if !next.After(at) || last.After(at) {
			t.Fatalf("next %v, last %v of %v", next, last, at)
		}
		if again := s.Next(last); !again.Equal(next) {
			t.Fatalf("after %v comes %v, but after %v %v", last, again, at, next)
		}
		if again := s.Last(next.Add(-1)); !again.Equal(last) {
			t.Fatalf("before %v is %v, but before %v %v", next, again, at, last)
		}
		if gap := next.Sub(last); gap > 9*24*time.Hour || s.Frequency == Daily && gap > 49*time.Hour || s.Frequency == Hourly && gap > 3*time.Hour {
			t.Fatalf("%v between %v and %v", gap, last, next)
		}
	})
}

func TestKeep(t *testing.T) {
	berlin := zone(t, "Europe/Berlin")
	day := func(month, day, hour int) time.Time {
		return time.Date(2026, time.Month(month), day, hour, 30, 0, 0, berlin)
	}
	times := []time.Time{
		day(5, 31, 23), day(5, 31, 22), day(5, 31, 1), day(5, 30, 12), day(5, 24, 12), day(5, 23, 12), day(4, 30, 12), day(4, 1, 12),
		time.Date(2025, 12, 31, 23, 0, 0, 0, berlin), time.Date(2025, 1, 1, 0, 0, 0, 0, berlin),
	}
	for _, tt := range []struct {
		keep Keep
		want []int // that go, oldest first
	}{
		{Keep{}, []int{9, 8, 7, 6, 5, 4, 3, 2, 1, 0}},
		{Keep{Last: 3}, []int{9, 8, 7, 6, 5, 4, 3}},
		{Keep{Last: 100}, nil},
		{Keep{Daily: 2}, []int{9, 8, 7, 6, 5, 4, 2, 1}},
		{Keep{Hourly: 2}, []int{9, 8, 7, 6, 5, 4, 3, 2}},
		{Keep{Weekly: 2}, []int{9, 8, 7, 6, 5, 3, 2, 1}},
		{Keep{Monthly: 2}, []int{9, 8, 7, 5, 4, 3, 2, 1}},
		{Keep{Yearly: 2}, []int{9, 7, 6, 5, 4, 3, 2, 1}},
		{Keep{Last: 1, Hourly: 2, Daily: 3, Weekly: 3, Monthly: 2, Yearly: 9}, []int{9, 7, 5, 2}},
	} {
		if got := tt.keep.Gone(times, berlin); !slices.Equal(got, tt.want) {
			t.Errorf("%+v: %d go, want %d", tt.keep, got, tt.want)
		}
	}
	// The hour that the clock shows twice is two hours.
	twice := time.Date(2026, 10, 25, 0, 30, 0, 0, time.UTC)
	if got := (Keep{Hourly: 2}).Gone([]time.Time{twice, twice.Add(time.Hour)}, berlin); got != nil {
		t.Errorf("of the same hour twice %d goes", got)
	}
}

// Pruning again takes nothing more, and a generous rule keeps what a strict
// one does.
func TestKeepProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var times []time.Time
		for range rapid.IntRange(0, 40).Draw(t, "n") {
			times = append(times, time.Unix(rapid.Int64Range(1_700_000_000, 1_710_000_000).Draw(t, "at"), 0))
		}
		small := rapid.IntRange(0, 5)
		k := Keep{small.Draw(t, "last"), small.Draw(t, "h"), small.Draw(t, "d"), small.Draw(t, "w"), small.Draw(t, "m"), small.Draw(t, "y")}
		gone := k.Gone(times, time.UTC)
		var kept []time.Time
		for i, at := range times {
			if !slices.Contains(gone, i) {
				kept = append(kept, at)
			}
		}
		if again := k.Gone(kept, time.UTC); len(again) > 0 {
			t.Fatalf("%+v of %v: the second time %d go", k, times, again)
		}
		more := k
		more.Daily++
		for _, i := range more.Gone(times, time.UTC) {
			if !slices.Contains(gone, i) {
				t.Fatalf("%+v keeps %v, %+v does not", k, times[i], more)
			}
		}
	})
}

func ExampleSchedule_Next() {
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		panic(err)
	}
	s, err := Parse(Daily, map[string]string{"hour": "2", "min": "30"}, berlin)
	if err != nil {
		panic(err)
	}
	slot := time.Date(2026, 3, 28, 0, 0, 0, 0, berlin)
	for range 3 {
		slot = s.Next(slot)
		fmt.Println(slot.In(berlin).Format("2006-01-02 15:04 MST"))
	}
	// Output:
	// 2026-03-28 02:30 CET
	// 2026-03-29 03:00 CEST
	// 2026-03-30 02:30 CEST
}
