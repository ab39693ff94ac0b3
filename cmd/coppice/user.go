package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/google/uuid"
	"golang.org/x/term"

	"coppice/internal/login"
	"coppice/internal/users"
	"coppice/internal/xapi"
)

// userOptions are the flags of user.
type userOptions struct {
	data         *string
	roles        []string
	passwordFile string
}

func (o *userOptions) flags() *flag.FlagSet {
	fs := flag.NewFlagSet("user", flag.ContinueOnError)
	o.data = dataFlag(fs)
	fs.Func("role", "`role` of the user: "+strings.Join(xapi.Datamodel().Roles, ", ")+"; may be repeated, the strongest counts", func(s string) error {
		if !slices.Contains(xapi.Datamodel().Roles, s) {
			return errors.New("there is no such role")
		}
		o.roles = append(o.roles, s)
		return nil
	})
	fs.StringVar(&o.passwordFile, "password-file", "", "`file` with the password (default: it is asked for, or the first line of the standard input)")
	return fs
}

// userForms are what can be done to users: a verb, and whether it takes a name.
var userForms = []string{"list", "add NAME", "passwd NAME", "role NAME", "remove NAME"}

// user looks after the users beside root. A server that runs follows the file of the users, so it need not be
// stopped.
func user(_ context.Context, e env, args []string) error {
	var o userOptions
	fs := o.flags()
	words, err := parseMixed(e, fs, args)
	if err != nil {
		return err
	}
	forms := "coppice user " + strings.Join(userForms, " | ")
	if len(words) == 0 {
		return &hinted{errors.New("what should be done?"), forms}
	}
	verb, names := words[0], words[1:]
	form := slices.IndexFunc(userForms, func(form string) bool { return strings.Fields(form)[0] == verb })
	if form < 0 {
		return &hinted{fmt.Errorf("%q is nothing that can be done", verb), forms}
	}
	if want := len(strings.Fields(userForms[form])) - 1; len(names) != want {
		return &hinted{
			fmt.Errorf("%s takes %s, not %d", verb, map[int]string{0: "no name", 1: "one name"}[want], len(names)),
			forms,
		}
	}
	data, err := e.dataDir(*o.data)
	if err != nil {
		return err
	}
	if _, err := os.Stat(string(data)); err != nil {
		return data.explain(err)
	}
	file := users.At(data.users())
	switch verb {
	case "list":
		return listUsers(e.stdout, file)
	case "add":
		return addUser(e, file, names[0], o)
	case "passwd":
		err = changeUser(file, names[0], func() (func(*users.User), error) {
			password, err := askPassword(e, o.passwordFile)
			if err != nil {
				return nil, err
			}
			verifier := login.Hash(password)
			return func(u *users.User) { u.Verifier = verifier }, nil
		})
	case "role":
		if len(o.roles) == 0 {
			return &hinted{errors.New("role needs a role"), "coppice user role NAME --role ROLE"}
		}
		err = changeUser(file, names[0], func() (func(*users.User), error) {
			return func(u *users.User) { u.Roles = o.roles }, nil
		})
	case "remove":
		if err = file.Remove(names[0]); errors.Is(err, users.ErrNotFound) {
			err = unknownUser(names[0])
		}
	}
	return err
}

// parseMixed parses flags that may stand before, between and after words, and returns the words.
func parseMixed(e env, fs *flag.FlagSet, args []string) (words []string, err error) {
	for {
		if err := parse(e, fs, args, -1); err != nil {
			return nil, err
		}
		if fs.NArg() == 0 {
			return words, nil
		}
		words, args = append(words, fs.Arg(0)), fs.Args()[1:]
	}
}

func listUsers(w io.Writer, file *users.File) error {
	list, _, err := file.Load()
	if err != nil {
		return err
	}
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "NAME\tROLES\tPASSWORD")
	fmt.Fprintln(tab, "root\t(local superuser)\tset")
	for _, u := range list {
		fmt.Fprintf(tab, "%s\t%s\t%s\n", u.Name, cmp.Or(strings.Join(u.Roles, ","), "none"), map[bool]string{true: "set", false: "none"}[u.Verifier != ""])
	}
	return tab.Flush()
}

// addUser adds a user, who can log in at once.
func addUser(e env, file *users.File, name string, o userOptions) error {
	if len(o.roles) == 0 {
		return &hinted{errors.New("a user needs a role"), "coppice user add NAME --role ROLE"}
	}
	if err := users.ValidName(name); err != nil { // before anything is asked
		return err
	}
	password, err := askPassword(e, o.passwordFile)
	if err != nil {
		return err
	}
	return file.Add(users.User{Name: name, UUID: uuid.NewString(), Roles: o.roles, Verifier: login.Hash(password)})
}

// changeUser changes a user. ask, which may take its time, is called before the file is locked, and what it returns
// changes the user as it is by then.
func changeUser(file *users.File, name string, ask func() (func(*users.User), error)) error {
	list, _, err := file.Load()
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(list, func(u users.User) bool { return u.Name == name }) {
		return unknownUser(name)
	}
	change, err := ask()
	if err != nil {
		return err
	}
	return file.Change(name, func(u *users.User) error {
		change(u)
		return nil
	})
}

// unknownUser is users.ErrNotFound with a way out.
func unknownUser(name string) error {
	if name == "root" {
		return &hinted{
			fmt.Errorf("%w: %q is not one of them", users.ErrNotFound, name),
			"root is always there and may do everything; \"coppice serve --admin-password-file FILE\" sets its password, and so does session.change_password.",
		}
	}
	return &hinted{fmt.Errorf("%w: %q", users.ErrNotFound, name), "coppice user list shows them."}
}

// askPassword gets a new password: from a file, from whoever sits at the terminal, twice, or from the standard input.
func askPassword(e env, path string) (password string, err error) {
	switch stdin, ok := e.stdin.(*os.File); {
	case path != "":
		b, err := os.ReadFile(path)
		if err != nil {
			return "", fmt.Errorf("--password-file: %w", err)
		}
		password = strings.TrimRight(string(b), "\r\n")
	case ok && term.IsTerminal(int(stdin.Fd())):
		var entries [2]string
		for i, prompt := range []string{"New password: ", "Again: "} {
			fmt.Fprint(e.stderr, prompt)
			b, err := term.ReadPassword(int(stdin.Fd()))
			fmt.Fprintln(e.stderr)
			if err != nil {
				return "", err
			}
			entries[i] = string(b)
		}
		if entries[0] != entries[1] {
			return "", errors.New("the two passwords differ")
		}
		password = entries[0]
	default:
		line, err := bufio.NewReader(e.stdin).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		password = strings.TrimRight(line, "\r\n")
	}
	if password == "" {
		return "", errors.New("the password is empty")
	}
	return password, nil
}
