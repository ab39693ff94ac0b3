package xapi

import (
	"reflect"

	"github.com/google/uuid"
)

// refPrefix begins every reference that we make.
const refPrefix = "OpaqueRef:"

// NullRef is the reference to nothing. The empty string means the same and is never sent.
const NullRef = refPrefix + "NULL"

// Ref is a reference to an object of class T as it appears on the wire. It says nothing about whether the
// object exists. References and uuids are different namespaces.
type Ref[T any] string

// NewRef returns a reference that was never used before.
func NewRef[T any]() Ref[T] { return Ref[T](refPrefix + uuid.NewString()) }

// IsNull says that r refers to nothing: it is NullRef or empty.
func (r Ref[T]) IsNull() bool { return r == "" || r == NullRef }

// recordType holds the Go types of a class.
type recordType struct {
	record reflect.Type // the struct
	ref    reflect.Type
}

func recordTypeOf[T any]() recordType {
	return recordType{record: reflect.TypeFor[T](), ref: reflect.TypeFor[Ref[T]]()}
}
