# Completion of xe for bash. For this shell: source <(xe completion); for all that
# are to come, keep it as ~/.local/share/bash-completion/completions/xe.
#
# What there is, commands, parameters and objects, it asks the server that the
# command line being completed is for.

# _xe_may_ask reports whether it may be asked. Without a password each question
# would be a refused login, except over a Unix socket; and the words that go along
# must be what the shell will make of them.
_xe_may_ask() {
	local plain=${line//\\?/}
	[[ $plain != *[\'\"\`]* && $plain != *'$('* && "${options[*]} $command ${cur%%=*}" != *'$'* ]] || return
	{
		cat ~/.xe
		printenv XE_EXTRA_ARGS | tr , '\n'
		printf '%s\n' "${options[@]}"
	} 2>/dev/null | awk -F = '
		/^password(file)?=./ { may = 1 }
		$1 == "server" { local = $2 ~ "^/" }
		END { exit !(may || local) }'
}

# _xe_run runs a command, up to the deadline and for so many bytes: a server can
# stay silent, or never end.
_xe_run() {
	((SECONDS < deadline)) || return
	timeout --foreground -s KILL $((deadline - SECONDS)) xe "$@" "${options[@]}" 2>/dev/null </dev/null |
		head -c 4M
}

# _xe_ask prints the values of a command's answer, one a line; DEL stands for the
# ends of lines in a value.
_xe_ask() {
	_xe_run "$@" --minimal |
		LC_ALL=C sed -z -e 's/\n$/,/' -e 's/[\n\x01\x02]/\x7f/g' \
			-e 's/\\\\/\x01/g' -e 's/\\,/\x02/g' -e 's/,/\n/g' -e 's/\x02/,/g' -e 's/\x01/\\/g' |
		grep -avFx '<not in database>'
}

# _xe_params prints the parameters of a command, one a line.
_xe_params() {
	_xe_run help "$1" |
		sed -n -e 's/^ *\(reqd\|optional\) params *: //p' | tr -s ', ' '\n' | grep .
}

# _xe_noun prints what a command or a parameter is about: vdi for vdi-export and
# for base-vdi.
_xe_noun() {
	local name=${1,,} front commands
	commands=$'\n'$(_xe_ask help --all)$'\n'
	while true; do
		front=$name
		while true; do
			if [[ $commands == *$'\n'"$front-param-list"$'\n'* ]]; then
				echo "$front"
				return
			fi
			[[ $front == *-* ]] || break
			front=${front%-*}
		done
		[[ $name == *-* ]] || return
		name=${name#*-}
	done
}

# _xe_fields prints the names of the fields of what a command is about.
_xe_fields() {
	_xe_params "$(_xe_noun "$1")-list" | sed -e '/^database:/d' -e '/^params$/d' -e 's/:.*//'
}

# _xe_values prints the values that a parameter of a command may have.
_xe_values() {
	local command=$1 param=$2
	case $param in
	uuid) _xe_ask "$(_xe_noun "$command")-list" params=uuid ;;
	base) _xe_ask vdi-list params=uuid ;;
	*-uuid) _xe_ask "$(_xe_noun "${param%-uuid}")-list" params=uuid ;;
	param-name) _xe_fields "$command" ;;
	format) printf '%s\n' raw vhd qcow2 vmdk tar ;;
	mode) printf '%s\n' RO RW ;;
	type)
		case $command in
		vbd-*) printf '%s\n' Disk CD Floppy ;;
		vdi-*) printf '%s\n' system user suspend crashdump ;;
		sr-*) _xe_ask sm-list params=type ;;
		esac
		;;
	*)
		case "$(_xe_noun "$param") $command" in
		"$param "*) _xe_ask "$param-list" params=name-label ;;
		*-list) _xe_ask "$command" params="$param" ;; # a filter
		esac | sort -u
		;;
	esac
}

_xe() {
	COMPREPLY=()
	local words=() options=() given=' ' command='' line=${COMP_LINE:0:COMP_POINT} cur deadline=0 i IFS=$' \t\n'
	# Not COMP_WORDS, which are broken at = and : as well. Backslashes are undone.
	read -a words <<<"$line"
	[[ $line == *[!\\][[:blank:]] ]] && words+=('')
	((${#words[@]} > 1)) || return 0
	cur=${words[-1]}
	local -A long=([-s]=server [-h]=server [-p]=port [-u]=username [-pw]=password [-pwf]=passwordfile [--traceparent]=traceparent)
	for ((i = 1; i < ${#words[@]} - 1; i++)); do
		case ${words[i]} in
		-s | -h | -p | -u | -pw | -pwf | --traceparent)
			((i + 1 < ${#words[@]} - 1)) || return 0 # its value is being typed
			options+=("${long[${words[i]}]}=${words[++i]}")
			;;
		--nossl | server=* | port=* | username=* | password=* | passwordfile=* | nossl=*) options+=("${words[i]}") ;;
		*)
			if [[ -z $command ]]; then
				command=${words[i]}
			else
				given+="${words[i]%%=*} "
			fi
			;;
		esac
	done
	options=("${options[@]/#passwordfile=\~\//"passwordfile=$HOME/"}")
	! _xe_may_ask || deadline=$((SECONDS + 3))

	local candidates=() param=${cur%%=*} value=${cur#*=} before='' candidate
	if [[ -z $command || $command == help ]]; then
		mapfile -t candidates < <(_xe_ask help --all | sed -e 's/$/ /')
	elif [[ $cur != *=* ]]; then
		while read -r param; do
			case $param in
			\<*-selectors\>)
				param=${param#<}
				candidates+=("${param%-selectors>}=")
				;;
			*: | *-) candidates+=("$param") ;;
			*) [[ $given == *" $param "* ]] || candidates+=("$param=") ;;
			esac
		done < <(_xe_params "$command")
	else
		before=$param=
		case $param in
		*filename | file-name)
			local file path
			while IFS= read -r file; do
				path=$file
				if [[ $file == \~/* ]]; then
					[[ $param != *-* ]] || continue # bash expands ~ after what may be a variable
					path=$HOME${file#\~}
				fi
				if [[ -d $path ]]; then
					candidates+=("$file/")
				elif [[ -e $path ]]; then # and not the first line of a name
					candidates+=("$file ")
				fi
			done < <(compgen -f -- "$value" | sort)
			;;
		params) # a list
			[[ $value != *,* ]] || before+=${value%,*},
			mapfile -t candidates < <(_xe_fields "$command" && echo all)
			;;
		*) mapfile -t candidates < <(_xe_values "$command" "$param" | sed -e 's/$/ /') ;;
		esac
	fi

	# Only what follows the last of bash's own breaks is replaced. Names that a
	# terminal would not show are not offered.
	local breaks=${COMP_WORDBREAKS//[^=:@]/} replaced=''
	[[ -z $breaks ]] || replaced=${cur%"${cur##*[$breaks]}"}
	local special='][ "`$&|;<>(){}*?!\\#^'\'
	[[ $cur == filename=\~/* ]] || special+='~'
	mapfile -t COMPREPLY < <(
		for candidate in "${candidates[@]/#/"$before"}"; do
			[[ $candidate != "$cur"* || $candidate == *[[:cntrl:]]* ]] || printf '%s\n' "${candidate#"$replaced"}"
		done | LC_ALL=C sed -e "s/[$special]/\\\\&/g" -e 's/\\ $/ /'
	)
}

complete -o nospace -F _xe xe
