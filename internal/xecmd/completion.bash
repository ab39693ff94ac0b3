# Completion of xe for bash. For this shell: source <(xe completion); for all that
# are to come, keep it as ~/.local/share/bash-completion/completions/xe.
#
# What there is, commands, parameters and objects, it asks the server that the
# command line being completed is for.

# _xe_ask runs a command and prints the values of its answer, one a line.
_xe_ask() {
	xe "$@" --minimal "${options[@]}" 2>/dev/null </dev/null |
		sed -e 's/\\\\/\x01/g' -e 's/\\,/\x02/g' -e 's/,/\n/g' -e 's/\x02/,/g' -e 's/\x01/\\/g' |
		grep -vFx '<not in database>'
}

# _xe_params prints the parameters of a command, one a line.
_xe_params() {
	xe help "$1" "${options[@]}" 2>/dev/null </dev/null |
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
	local words=() options=() given=' ' command='' line=${COMP_LINE:0:COMP_POINT} cur i IFS=$' \t\n'
	# Not COMP_WORDS, which are broken at = and : as well. Backslashes are undone.
	read -a words <<<"$line"
	[[ $line == *[!\\][[:blank:]] ]] && words+=('')
	cur=${words[-1]}
	for ((i = 1; i < ${#words[@]} - 1; i++)); do
		case ${words[i]} in
		-s | -h | -p | -u | -pw | -pwf | --traceparent)
			((i + 1 < ${#words[@]} - 1)) || return 0 # its value is being typed
			options+=("${words[i]}" "${words[++i]}")
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
			mapfile -t candidates < <(compgen -f -- "$value" | sort)
			for i in "${!candidates[@]}"; do
				if [[ -d ${candidates[i]} ]]; then
					candidates[i]+=/
				else
					candidates[i]+=' '
				fi
			done
			;;
		params) # a list
			[[ $value != *,* ]] || before+=${value%,*},
			mapfile -t candidates < <(_xe_fields "$command" && echo all)
			;;
		*) mapfile -t candidates < <(_xe_values "$command" "$param" | sed -e 's/$/ /') ;;
		esac
	fi

	# Only what follows the last of bash's own breaks is replaced.
	local breaks='' replaced=''
	[[ $COMP_WORDBREAKS != *=* ]] || breaks+='='
	[[ $COMP_WORDBREAKS != *:* ]] || breaks+=':'
	[[ -z $breaks ]] || replaced=${cur%"${cur##*[$breaks]}"}
	[[ -z $replaced ]] || printf -v replaced %q "$replaced"
	for candidate in "${candidates[@]}"; do
		candidate=$before$candidate
		[[ $candidate == "$cur"* ]] || continue
		local end=''
		[[ $candidate != *' ' ]] || end=' '
		printf -v candidate %q "${candidate% }"
		COMPREPLY+=("${candidate#"$replaced"}$end")
	done
}

complete -o nospace -F _xe xe
