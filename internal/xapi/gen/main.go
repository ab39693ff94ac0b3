// Command gen writes the nouns of package xapi from datamodel.json: one struct per class, one string type
// per enum with a constant per value, and one constant per error code. It writes structs, constants and the
// tables that join their names to their Go types, and no logic.
//
// It is run by go generate in the directory of package xapi, whose files it replaces. A test generates into
// memory and compares, so the files in the repository are never out of date.
package main

import (
	"encoding/json"
	"fmt"
	"os"
)

// datamodel is the part of datamodel.json that decides what is written.
type datamodel struct {
	Enums            map[string][]string `json:"enums"`
	Errors           map[string][]string `json:"errors"`
	ErrorsUndeclared []string            `json:"errors_undeclared"`
	Relations        [][4]string         `json:"relations"`
	Classes          map[string]class    `json:"classes"`
}

type class struct {
	State  string  `json:"state"`
	Fields []field `json:"fields"`
}

type field struct {
	Name  string `json:"name"`
	Type  string `json:"type"`
	State string `json:"state"`
}

func main() {
	if err := run("datamodel.json", "."); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

// run generates from the model in file and writes the results to dir.
func run(file, dir string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	files, err := generate(data)
	if err != nil {
		return err
	}
	for name, src := range files {
		if err := os.WriteFile(dir+"/"+name, src, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// generate returns the formatted source files by name.
func generate(data []byte) (map[string][]byte, error) {
	var m datamodel
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("datamodel.json: %w", err)
	}
	files := make(map[string][]byte)
	for name, emit := range map[string]func(*printer, *datamodel) error{
		"records_gen.go": records,
		"enums_gen.go":   enums,
		"errors_gen.go":  errorCodes,
	} {
		p := newPrinter()
		if err := emit(p, &m); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		src, err := p.format()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		files[name] = src
	}
	return files, nil
}
