package event

import (
	"slices"
	"strings"

	"coppice/internal/xapi"
)

// subscription is what a watcher wants to know about.
type subscription struct {
	class *xapi.Class // nil for every class
	ref   string      // "" for every object of the class
}

// maxSubscription is how long the text of a subscription may be, in bytes: a watcher
// keeps it for as long as it waits.
const maxSubscription = 256

// subscription reads "*", "class" or "class/ref", the class in any case.
// A class that does not exist, or has no events, is watched in vain:
// wanted is false.
func (f *Feed) subscription(text string) (sub subscription, wanted bool, err error) {
	if text == "*" {
		return subscription{}, true, nil
	}
	if len(text) > maxSubscription {
		return subscription{}, false, xapi.NewError(xapi.ErrEventSubscriptionParseFailure, xapi.Shorten(text, maxSubscription))
	}
	name, ref, object := strings.Cut(text, "/")
	if name == "" || object && ref == "" || strings.Contains(ref, "/") {
		return subscription{}, false, xapi.NewError(xapi.ErrEventSubscriptionParseFailure, text)
	}
	for _, class := range f.model.Ordered {
		if class.Events && strings.EqualFold(class.Name, name) {
			return subscription{class: class, ref: ref}, true, nil
		}
	}
	return subscription{}, false, nil
}

func (f *Feed) subscriptions(classes []string) ([]subscription, error) {
	var subs []subscription
	for _, text := range classes {
		sub, wanted, err := f.subscription(text)
		if err != nil {
			return nil, err
		}
		if wanted {
			subs = append(subs, sub)
		}
	}
	return subs, nil
}

// wants reports whether subs cover an object; the ref "" asks about any object
// of the class.
func wants(subs []subscription, class *xapi.Class, ref string) bool {
	return slices.ContainsFunc(subs, func(s subscription) bool {
		return s.class == nil || s.class == class && (ref == "" || s.ref == "" || s.ref == ref)
	})
}

// classesOf lists the classes that subs are about; none means all.
func classesOf(subs []subscription) (classes []*xapi.Class) {
	for _, s := range subs {
		if s.class == nil {
			return nil
		}
		if !slices.Contains(classes, s.class) {
			classes = append(classes, s.class)
		}
	}
	return classes
}

// subscriptionKey is the same for subscriptions to the same.
func subscriptionKey(subs []subscription) string {
	texts := make([]string, 0, len(subs))
	for _, s := range subs {
		if s.class == nil {
			return "*"
		}
		texts = append(texts, s.class.Name+"/"+s.ref)
	}
	slices.Sort(texts)
	return strings.Join(slices.Compact(texts), ",")
}
