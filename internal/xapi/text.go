package xapi

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// Shorten returns at most n bytes of a text that somebody else made up, to be shown: up to a rune, and "…" for the rest.
func Shorten(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// Text returns v, a value of type t.GoType(), as plain text: numbers in decimal, dates as FormatTime, sets as
// "a; b", maps as "k: v; l: w" with sorted keys, nothing for void, options without value and records.
func (t *Type) Text(v any) string {
	if v == nil {
		return ""
	}
	return t.textOf(reflect.ValueOf(v))
}

func (t *Type) textOf(v reflect.Value) string {
	switch t.Kind {
	case KindString, KindEnum, KindRef:
		return v.String()
	case KindInt:
		return strconv.FormatInt(v.Int(), 10)
	case KindFloat:
		return strconv.FormatFloat(v.Float(), 'g', -1, 64)
	case KindBool:
		return strconv.FormatBool(v.Bool())
	case KindDateTime:
		return FormatTime(timeOf(v))
	case KindSet:
		items := make([]string, v.Len())
		for i := range items {
			items[i] = t.Elem.textOf(v.Index(i))
		}
		return strings.Join(items, "; ")
	case KindMap:
		keys := v.MapKeys()
		slices.SortFunc(keys, compareKeys)
		items := make([]string, len(keys))
		for i, k := range keys {
			items[i] = fmt.Sprintf("%s: %s", keyText(k), t.Elem.textOf(v.MapIndex(k)))
		}
		return strings.Join(items, "; ")
	case KindOption:
		if v.IsNil() || t.Elem.Kind == KindRecord {
			return ""
		}
		return t.Elem.textOf(v.Elem())
	default:
		return ""
	}
}
