# Completion of indexcache in bash. It asks the program itself for its commands, flags and choices, so
# it fits whichever version is completed.

# Prints what can follow: the commands of a help text, or the flags of one, or the choices of one flag.
_indexcache_words() { # commands|flags|choices [FLAG], a help text on the standard input
  awk -v what="$1" -v flag="$2" '
    /^[A-Za-z]+:$/ { section = $1; next }
    what == "commands" && section == "Subcommands:" && /^  [a-z]/ { print $1 }
    section == "Options:" && /^  -/ {
      count = split($1, names, ",")
      for (i = 1; i <= count; ++i) {
        if (what == "flags") print names[i]
        if (what == "choices" && names[i] == flag && match($2, /[{][^}]*[}]/)) {
          choices = substr($2, RSTART + 1, RLENGTH - 2)
          gsub(",", "\n", choices)
          print choices
        }
      }
    }'
}

_indexcache() {
  local program=${1/#\~\//$HOME/} current=$2 previous=$3 what=flags help word
  local -a commands=()
  # The shell splits --flag=value at the equals sign.
  [ "$current" = = ] && current=
  [ "$previous" = = ] && previous=${COMP_WORDS[COMP_CWORD - 2]}
  # Only the trainer has commands of its own.
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    [[ $word == -* || ${#commands[@]} -eq 2 ]] && break
    [[ ${#commands[@]} -eq 1 && ${commands[0]} != train ]] && break
    commands+=("$word")
  done
  help=$("$program" "${commands[@]}" --help 2> /dev/null) || return
  if [[ $previous == -* ]]; then
    COMPREPLY=($(compgen -W "$(_indexcache_words choices "$previous" <<< "$help")" -- "$current"))
    [ ${#COMPREPLY[@]} -eq 0 ] || return
  fi
  [[ $current == -* ]] || what=commands
  COMPREPLY=($(compgen -W "$(_indexcache_words "$what" "" <<< "$help")" -- "$current"))
}

# default: values of other flags, and files, are names of files.
complete -o default -F _indexcache indexcache
