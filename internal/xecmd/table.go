package xecmd

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"

	"coppice/internal/typo"
	"coppice/internal/xapi"
)

// command is one command of xe.
type command struct {
	name     string
	required []string          // parameters
	optional []string          // parameters, as help shows them: "k:" and "k-" stand for k:x=y
	aliases  map[string]string // what others call some of the parameters: refused, like what is misspelt
	help     string
	selects  selection // objects it works on by filters
	standard bool      // in the short list of help
	hidden   bool      // in neither list of help
	run      func(ctx context.Context, r *run) error
}

// declares reports whether a parameter is one of the command's own.
func (c *command) declares(param string) bool {
	if slices.Contains(c.required, param) {
		return true
	}
	for _, o := range c.optional {
		if param == o || strings.HasSuffix(o, ":") && strings.HasPrefix(param, o) ||
			strings.HasSuffix(o, "-") && (strings.HasPrefix(param, o) || strings.HasPrefix(param, strings.TrimSuffix(o, "-")+":")) {
			return true
		}
	}
	return false
}

// table holds all commands.
type table struct {
	byName map[string]*command
	nouns  map[string]*noun
}

// names returns the names of the commands that pass, sorted.
func (t *table) names(pass func(*command) bool) []string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(t.byName)) {
		if pass(t.byName[name]) {
			out = append(out, name)
		}
	}
	return out
}

// unknown is the error for a command that does not exist, with those that may
// have been meant.
func (t *table) unknown(name string) error {
	e := &usageError{text: "Unknown command: " + name}
	const most = 3
	var near []string
	for limit := 1; limit <= 2 && len(near) == 0; limit++ {
		near = t.names(func(c *command) bool { return !c.hidden && typo.Distance(c.name, name) <= limit })
	}
	if len(near) > 0 {
		e.hint = "Did you mean " + strings.Join(near[:min(len(near), most)], ", ") + "?"
	}
	return e
}

// misspelt is the error for a parameter that is not the command's own but
// nearly is, or that is called otherwise elsewhere. Ignored, as others are, it
// would silently do something else: an export with bas= would be a whole one.
func (c *command) misspelt(a *arguments) error {
	if c.selects.noun != "" {
		return nil // any field is a filter
	}
	for _, p := range a.params {
		if c.declares(p.key) || reserved[p.key] {
			continue
		}
		if own, ok := c.aliases[p.key]; ok {
			return unknownParam(p.key, own)
		}
		for _, own := range slices.Concat(c.required, c.optional) {
			if own != p.key+":" && own != p.key+"-" && typo.Nearly(p.key, own) { // maps are told for what they are
				return unknownParam(p.key, own)
			}
		}
	}
	return nil
}

// unknownParam refuses a parameter in the place of the command's own one.
func unknownParam(param, own string) error {
	return &usageError{text: "Unknown parameter: " + param, hint: "Did you mean " + own + "?", params: true}
}

// commands returns the table. It is built at the first call: read only.
var commands = sync.OnceValue(commandTable)

func commandTable() *table {
	t := &table{byName: map[string]*command{}, nouns: map[string]*noun{}}
	add := func(cmds []command) {
		for i := range cmds {
			c := &cmds[i]
			if t.byName[c.name] != nil {
				panic("xecmd: two commands " + c.name)
			}
			c.standard = slices.Contains(standardCommands, c.name)
			t.byName[c.name] = c
		}
	}
	for _, n := range nouns(xapi.Datamodel()) {
		t.nouns[n.name] = n
		add(n.commands())
	}
	add(vdiCommands())
	add(nbdCommands())
	add(pullCommands())
	add(storageCommands())
	add(vmCommands())
	add(vmInstallCommands())
	add(vmDiskCommands())
	add(vmTransferCommands())
	add(snapshotCommands())
	add(otherCommands())
	add(operatorCommands())
	return t
}

// standardCommands are the ones that help shows first.
var standardCommands = strings.Fields(`
	cd-list network-list snapshot-clone snapshot-copy snapshot-disk-list snapshot-export-to-template
	snapshot-reset-powerstate snapshot-revert snapshot-uninstall sr-list template-export template-uninstall
	vm-cd-add vm-cd-eject vm-cd-insert vm-cd-list vm-cd-remove vm-checkpoint vm-clone vm-compute-maximum-memory
	vm-copy vm-disk-add vm-disk-list vm-disk-remove vm-export vm-import vm-install vm-list vm-migrate vm-pause
	vm-reboot vm-reset-powerstate vm-resume vm-shutdown vm-snapshot vm-snapshot-with-quiesce vm-start vm-suspend
	vm-uninstall vm-unpause vm-vif-list`)

// commands returns the generated commands of a noun.
func (n *noun) commands() []command {
	var filters, settable []string
	var addable, clearable bool
	for _, f := range n.fields {
		switch {
		case f.shape == scalar:
			filters = append(filters, f.name)
			if f.rw {
				settable = append(settable, f.name)
			}
		case f.shape == set:
			filters = append(filters, f.name+":contains")
		default:
			filters = append(filters, f.name+":")
			if f.rw {
				settable = append(settable, f.name+":")
			}
		}
		addable = addable || f.rw && f.shape != scalar
		clearable = clearable || f.rw || f.clearable
	}
	out := []command{
		{
			name: n.name + "-list", optional: append([]string{"params", "database:vdi-uuid", "database:filename"}, filters...),
			help: "Lists all the " + n.name + "s, filtering on the optional arguments. To filter on map parameters, use the syntax 'map-param:key=value'.",
			run:  n.list,
		},
		{
			name: n.name + "-param-list", required: []string{"uuid"}, optional: []string{"database:vdi-uuid", "database:filename"},
			help: "Lists all the parameters of the object specified by the uuid.", run: n.paramList,
		},
		{
			name: n.name + "-param-get", required: []string{"uuid", "param-name"}, optional: []string{"param-key"},
			help: "Gets the parameter specified of the object. If the parameter is a map of key=value pairs, use 'param-key=<key>' to get the value associated with a particular key.",
			run:  n.paramGet,
		},
	}
	if len(settable) > 0 {
		out = append(out, command{
			name: n.name + "-param-set", required: []string{"uuid"}, optional: settable,
			help: "Sets the parameter specified. If param-value is not given, the parameter is set to a null value. To set a (key,value) pair in a map parameter, use the syntax 'map-param:key=value'.",
			run:  n.paramSet,
		})
	}
	if addable {
		out = append(out, command{
			name: n.name + "-param-add", required: []string{"uuid", "param-name"}, optional: []string{"param-key"},
			help: "Adds to a set or map parameter. If the parameter is a set, use param-key=<key to add>. If the parameter is a map, pass the values to add as 'key=value' pairs.",
			run:  n.paramAdd,
		}, command{
			name: n.name + "-param-remove", required: []string{"uuid", "param-name", "param-key"},
			help: "Removes a member or a key,value pair from a set/map respectively.", run: n.paramRemove,
		})
	}
	if clearable {
		out = append(out, command{
			name: n.name + "-param-clear", required: []string{"uuid", "param-name"},
			help: "Clears the specified parameter (param-name can be strings or sets/maps).", run: n.paramClear,
		})
	}
	return out
}

// send makes a command of a message that takes the object alone.
func send(class, method string) func(ctx context.Context, r *run) error {
	return func(ctx context.Context, r *run) error {
		ref, err := r.ref(ctx, class, "uuid")
		if err != nil {
			return err
		}
		return r.do(ctx, method, ref)
	}
}
