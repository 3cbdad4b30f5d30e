# Sourced by rehearse, measure and prove: a long command as a job in a process group of its own, so that it is
# stopped once, by the script, however that is stopped.
child='' group=''  # group=-: all of the job is told of a stop, not its first process alone
job_log=''  # the file to which the job prints; empty: as the script
next='the same command resumes from here'

stop() {
    trap '' INT TERM HUP USR1
    if [[ -n $child ]]; then
        kill -TERM -- "$group$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    echo "${0##*/}: stopped; $next" >&2
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP
trap 'stop 75' USR1

# run_job COMMAND...: runs it to its end and sets `code` to its exit code.
run_job() {
    set -m
    if [[ -n $job_log ]]; then "$@" </dev/null >>"$job_log" 2>&1 & else "$@" </dev/null & fi
    child=$!
    set +m
    code=0
    wait "$child" || code=$?
    child=''
}
