package api

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"coppice/internal/db"
	"coppice/internal/where"
	"coppice/internal/xapi"
)

func messageMethods() map[string]any {
	return map[string]any{
		"message.create":                (*API).messageCreate,
		"message.destroy":               (*API).messageDestroy,
		"message.destroy_many":          (*API).messageDestroyMany,
		"message.destroy_all":           (*API).messageDestroyAll,
		"message.get":                   (*API).messageGet,
		"message.get_since":             (*API).messageGetSince,
		"message.get_all":               (*API).messageGetAll,
		"message.get_all_records":       (*API).messageGetAllRecords,
		"message.get_all_records_where": (*API).messageGetAllRecordsWhere,
		"message.get_by_uuid":           (*API).messageGetByUUID,
		"message.get_record":            (*API).messageGetRecord,
	}
}

// messages is what a set of messages is on the wire.
type messages = map[xapi.Ref[xapi.Message]]*xapi.Message

// maxMessages is how many messages are kept, on disk; the oldest make room for
// new ones.
const maxMessages = 10_000

// maxMessageSize bounds the name and the body of a message of a client, in
// bytes: together, because all messages are kept in memory too.
const maxMessageSize = 64 << 10

// messageClasses are the classes of objects that messages can be about.
var messageClasses = map[xapi.Cls]string{
	xapi.ClsVM: "VM", xapi.ClsHost: "host", xapi.ClsSR: "SR", xapi.ClsPool: "pool", xapi.ClsVMPP: "VMPP",
	xapi.ClsVMSS: "VMSS", xapi.ClsPVSProxy: "PVS_proxy", xapi.ClsVDI: "VDI", xapi.ClsCertificate: "Certificate",
}

// objectExists is UUID_INVALID unless there is an object that a message can
// be about.
func (a *API) objectExists(tx *db.Tx, cls xapi.Cls, uuid string) error {
	class := a.model.Classes[messageClasses[cls]]
	if class != nil {
		if _, ok := tx.UUID(class, uuid); ok {
			return nil
		}
	}
	return xapi.NewError(xapi.ErrUUIDInvalid, string(cls), uuid)
}

func (a *API) messageCreate(ctx context.Context, c *Call, name string, priority int64, cls xapi.Cls, uuid, body string) (ref xapi.Ref[xapi.Message], err error) {
	if size := len(name) + len(body); size > maxMessageSize {
		return "", xapi.NewError(xapi.ErrValueNotSupported, "body", fmt.Sprint(size)+" bytes", fmt.Sprintf("A message has at most %d bytes", maxMessageSize))
	}
	err = a.db.Update(ctx, func(tx *db.Tx) (err error) {
		if err := a.objectExists(tx, cls, uuid); err != nil {
			return err
		}
		ref, err = a.addMessage(tx, name, priority, cls, uuid, body)
		return err
	})
	return ref, err
}

// alert tells whoever watches messages what has happened to an object. It
// belongs into the commit that makes it so: an alert without its cause, or a
// cause without its alert, does not exist. The datamodel knows its priority.
func (a *API) alert(tx *db.Tx, name string, cls xapi.Cls, uuid, body string) error {
	priority, ok := a.model.Alerts[name]
	if !ok {
		return xapi.NewError(xapi.ErrInternalError, "alert "+name+" is not in the datamodel")
	}
	_, err := a.addMessage(tx, name, priority, cls, uuid, body)
	return err
}

// addMessage inserts a message, for which the oldest may have to go.
func (a *API) addMessage(tx *db.Tx, name string, priority int64, cls xapi.Cls, uuid, body string) (xapi.Ref[xapi.Message], error) {
	if tx.Count(xapi.ClassOf[xapi.Message]()) >= maxMessages {
		if err := dropOldestMessage(tx); err != nil {
			return "", err
		}
	}
	m := xapi.New[xapi.Message]()
	m.Name, m.Priority, m.Cls, m.ObjUUID, m.Body = name, priority, cls, uuid, body
	m.Timestamp = a.now().Truncate(time.Second)
	return db.Insert(tx, m)
}

func dropOldestMessage(tx *db.Tx) error {
	var oldest xapi.Ref[xapi.Message]
	var at time.Time
	for ref, m := range db.All[xapi.Message](tx) {
		if oldest == "" || m.Timestamp.Before(at) {
			oldest, at = ref, m.Timestamp
		}
	}
	return db.Delete(tx, oldest)
}

func (a *API) messageDestroy(ctx context.Context, c *Call, ref xapi.Ref[xapi.Message]) error {
	return a.db.Update(ctx, func(tx *db.Tx) error { return db.Delete(tx, ref) })
}

// messageDestroyMany destroys all of them, or none when one does not exist.
func (a *API) messageDestroyMany(ctx context.Context, c *Call, refs []xapi.Ref[xapi.Message]) error {
	return a.db.Update(ctx, func(tx *db.Tx) error {
		for _, ref := range refs {
			if err := db.Delete(tx, ref); err != nil {
				return err
			}
		}
		return nil
	})
}

// messageDestroyAll destroys all messages. What filters there may be is nowhere
// said, and none is taken: more than was meant would go.
func (a *API) messageDestroyAll(ctx context.Context, c *Call, filters map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(filters)) {
		return xapi.NewError(xapi.ErrValueNotSupported, "filters", key, "There are no filters of messages")
	}
	return a.db.Update(ctx, func(tx *db.Tx) error {
		var all []xapi.Ref[xapi.Message]
		for ref := range db.All[xapi.Message](tx) {
			all = append(all, ref)
		}
		return deleteEach(tx, all)
	})
}

// messagesWhere returns the messages that want says.
func (a *API) messagesWhere(want func(xapi.Ref[xapi.Message], *xapi.Message) bool) (messages, error) {
	found := messages{}
	err := a.db.View(func(tx *db.Tx) error {
		for ref, m := range db.All[xapi.Message](tx) {
			if want(ref, m) {
				found[ref] = m
			}
		}
		return nil
	})
	return found, err
}

func (a *API) messageGet(ctx context.Context, c *Call, cls xapi.Cls, uuid string, since time.Time) (messages, error) {
	err := a.db.View(func(tx *db.Tx) error { return a.objectExists(tx, cls, uuid) })
	if err != nil {
		return nil, err
	}
	return a.messagesWhere(func(_ xapi.Ref[xapi.Message], m *xapi.Message) bool {
		return m.Cls == cls && m.ObjUUID == uuid && m.Timestamp.After(since)
	})
}

func (a *API) messageGetSince(ctx context.Context, c *Call, since time.Time) (messages, error) {
	return a.messagesWhere(func(_ xapi.Ref[xapi.Message], m *xapi.Message) bool { return m.Timestamp.After(since) })
}

func (a *API) messageGetAll(ctx context.Context, c *Call) ([]xapi.Ref[xapi.Message], error) {
	refs := []xapi.Ref[xapi.Message]{}
	err := a.db.View(func(tx *db.Tx) error {
		for ref := range db.All[xapi.Message](tx) {
			refs = append(refs, ref)
		}
		return nil
	})
	return refs, err
}

func (a *API) messageGetAllRecords(ctx context.Context, c *Call) (messages, error) {
	return a.messagesWhere(func(xapi.Ref[xapi.Message], *xapi.Message) bool { return true })
}

// messageGetAllRecordsWhere is lenient about fields that messages do not
// have: nothing matches them.
func (a *API) messageGetAllRecordsWhere(ctx context.Context, c *Call, expr string) (messages, error) {
	cond, err := where.Parse(xapi.ClassOf[xapi.Message](), expr, true)
	if err != nil {
		return nil, err
	}
	return a.messagesWhere(func(ref xapi.Ref[xapi.Message], m *xapi.Message) bool { return cond(string(ref), m) })
}

func (a *API) messageGetByUUID(ctx context.Context, c *Call, uuid string) (ref xapi.Ref[xapi.Message], err error) {
	err = a.db.View(func(tx *db.Tx) (err error) {
		ref, _, err = db.ByUUID[xapi.Message](tx, uuid)
		return err
	})
	return ref, err
}

func (a *API) messageGetRecord(ctx context.Context, c *Call, ref xapi.Ref[xapi.Message]) (rec *xapi.Message, err error) {
	err = a.db.View(func(tx *db.Tx) (err error) {
		rec, err = db.Get(tx, ref)
		return err
	})
	return rec, err
}
