# Sourced first by the scripts in launch/, which then read their arguments from "$@": answers --help, and splits
# --NAME=VALUE into two words. What follows a word -- is left alone.
here=$(cd "$(dirname "$0")" >/dev/null && pwd)  # with CDPATH, cd prints
python=${CIFAR_DIST_PYTHON:-$here/../.venv/bin/python}  # as in python.sh

# The comment at the head of the script.
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }
# mistake MESSAGE [LINE...]
mistake() { echo "error: $1" >&2; shift; [[ $# == 0 ]] || printf '%s\n' "$@" >&2; exit 2; }

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
