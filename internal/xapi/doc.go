// Package xapi is the vocabulary of the product: the classes, fields, methods, enums and error codes of the
// XenAPI, as Go types and as data.
//
// # Nouns
//
// The nouns are generated from datamodel.json by package gen: a struct per class (VDI, VM, Host …), a string
// type per enum with a constant per value (VDIType, VDITypeUser), and a constant per error code
// (ErrHandleInvalid). Ref[VDI] is a typed reference. Sets are slices, maps are maps, dates are time.Time in
// UTC, an optional value is a pointer, a record inside another value is a pointer to its struct. Every field
// carries its name on the wire in the tag `xapi:"name_label"`.
//
// # Descriptors
//
// Datamodel returns the Model, built once from the embedded datamodel.json: for each Class its fields and
// methods, with types, defaults, roles and life cycle, and with accessors that reach the Go struct without
// knowing its type. Whatever the model already says is interpreted through these descriptors and written
// nowhere else: generic getters and setters, argument checks, defaults, permissions, encoding.
//
// # Wire values
//
// Package xapi does not know XML or JSON. What comes in is a wire value, made of nil, bool, int64, float64,
// string, []any and map[string]any; Type.Parse turns it into a typed Go value, lenient where existing clients
// need it. What goes out is written to an Encoder by Type.Encode. Records are encoded with all their fields
// that are not internal, in the order of the model; sets and maps are never null.
//
//	model type            Go type             in                                    out
//	string, enum          string, VDIType     string                                String
//	int                   int64               int, integral float, decimal string   Int
//	float                 float64             float, int, decimal string            Float
//	bool                  bool                bool, 0, 1                            Bool
//	datetime              time.Time           string, five spellings                Time
//	VDI ref               Ref[VDI]            string                                String
//	VDI record            *VDI                map                                   struct
//	T set                 []T                 []any                                 array
//	(K -> V) map          map[K]V             map                                   struct, keys sorted
//	T option              *T                  nil or T                              T, Null; left out of records
//	void                  nil                 anything                              empty String
//
// # Errors
//
// Error is the one error type that crosses the API: a code and its parameters. It matches by code:
// errors.Is(err, NewError(ErrHandleInvalid)).
package xapi

//go:generate go run ./gen
