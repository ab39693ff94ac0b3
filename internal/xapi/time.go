package xapi

import (
	"errors"
	"strconv"
	"strings"
	"time"
)

// Epoch is the date that means never.
var Epoch = time.Unix(0, 0).UTC()

// timeLayout is the spelling of dates that we send.
const timeLayout = "20060102T15:04:05Z"

// FormatTime returns t in UTC as 20260131T23:59:59Z. The zero time.Time counts as the epoch.
func FormatTime(t time.Time) string {
	if t.IsZero() {
		t = Epoch
	}
	return t.UTC().Format(timeLayout)
}

var errTime = errors.New("want a date like 20260131T23:59:59Z")

// ParseTime reads a date. The day may be written with or without dashes, the time may have a fraction of a
// second, and the zone may be Z, ±hh:mm, ±hhmm or missing, which means UTC. The result is in UTC.
func ParseTime(s string) (time.Time, error) {
	day, clock, ok := strings.Cut(s, "T")
	if !ok {
		return time.Time{}, errTime
	}
	switch {
	case len(day) == 10 && day[4] == '-' && day[7] == '-':
		day = day[:4] + day[5:7] + day[8:]
	case len(day) != 8:
		return time.Time{}, errTime
	}
	clock, offset, err := cutZone(clock)
	if err != nil {
		return time.Time{}, err
	}
	t, err := time.ParseInLocation("20060102T15:04:05", day+"T"+clock, time.UTC)
	if err != nil {
		return time.Time{}, errTime
	}
	return t.Add(-offset), nil
}

// cutZone splits the zone off the time of day and returns its offset east of UTC.
func cutZone(clock string) (string, time.Duration, error) {
	if rest, ok := strings.CutSuffix(clock, "Z"); ok {
		return rest, 0, nil
	}
	i := strings.LastIndexAny(clock, "+-")
	if i < 0 {
		return clock, 0, nil
	}
	zone := clock[i+1:]
	if len(zone) == 5 && zone[2] == ':' {
		zone = zone[:2] + zone[3:]
	}
	if len(zone) != 4 {
		return "", 0, errTime
	}
	n, err := strconv.ParseUint(zone, 10, 16)
	if err != nil || n/100 > 14 || n%100 > 59 {
		return "", 0, errTime
	}
	offset := time.Duration(n/100)*time.Hour + time.Duration(n%100)*time.Minute
	if clock[i] == '-' {
		offset = -offset
	}
	return clock[:i], offset, nil
}
