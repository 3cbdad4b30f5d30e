# Sourced first by the scripts in launch/, which then read their arguments from "$@": answers --help, and splits
# --NAME=VALUE into two words. What follows a word -- is left alone.
unset CDPATH  # with it, cd prints
here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
python=${CIFAR_DIST_PYTHON:-$here/../.venv/bin/python}  # as in python.sh
# A script does not end because nobody reads what it prints: on a closed pipe, bash would be killed or echo would fail.
trap '' PIPE
echo() { builtin echo "$@" 2>/dev/null || true; }
{ true <&0; } 2>/dev/null || exec </dev/null  # a closed descriptor
{ true >&1; } 2>/dev/null || exec >/dev/null
true >&2 || exec 2>/dev/null

# The comment at the head of the script.
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }
# mistake MESSAGE [LINE...]
mistake() { echo "error: $1" >&2; shift; [[ $# == 0 ]] || printf '%s\n' "$@" >&2; exit 2; }
# expanded PATH: prints it with ~, ~user, $NAME and ${NAME} replaced, as cifar_dist does with its paths.
expanded() {
    local rest=$1 done='' name
    if [[ $rest =~ ^~([A-Za-z0-9_.-]*)(/.*)?$ ]]; then
        eval "done=~${BASH_REMATCH[1]}"
        [[ $done != '~'* ]] || mistake "there is no user ${BASH_REMATCH[1]} with a home directory: $1 (a file: ./$1)"
        rest=${BASH_REMATCH[2]}
    fi
    while [[ $rest =~ ^([^$]*)(\$([A-Za-z_][A-Za-z0-9_]*)|\$\{([A-Za-z0-9_]+)\}|\$\$|\$)(.*)$ ]]; do
        name=${BASH_REMATCH[3]}${BASH_REMATCH[4]} done+=${BASH_REMATCH[1]} rest=${BASH_REMATCH[5]}
        [[ -n $name ]] || { done+=$; continue; }
        [[ -n ${!name-} ]] || mistake "there is no environment variable $name, or it is empty: $1 (a literal $ is \$\$)"
        done+=${!name}
    done
    printf '%s' "$done$rest"
}

words=()
while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
        --help | -h) usage; exit ;;
        --*=*) words+=("${1%%=*}" "${1#*=}") ;;
        *) words+=("$1") ;;
    esac
    shift
done
set -- ${words[@]+"${words[@]}"} "$@"
