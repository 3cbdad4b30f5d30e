# Sourced by measure after jobs.sh: what it measures, and the rows of its table. Each thing is left out if `out` has its
# result already, and not begun when `limit_s` seconds are over, if that is set.
rows=() first=0 left=0
# row WHAT RESULT SECONDS
row() { rows+=("$(printf '%-28s %-52s %8s' "$@")"); }
row what result seconds

# same_as_before NAME ARGUMENTS...: ends with a message if NAME was measured into `out` with others; else notes them there.
same_as_before() {
    local note=$out/.arguments/$1 arguments
    arguments=$(printf '%q ' "${@:2}")
    [[ ! -e $note || $(<"$note") == "$arguments" ]] ||
        mistake "$out has results of $1 with other arguments: $(<"$note"). Choose another --out, or remove $out."
    mkdir -p "$out/.arguments"
    builtin echo "$arguments" >"$note"
}

# logged LOG COMMAND...: replaces this shell by the command and copies its output to LOG. Not by a pipe: signals for the
# job would reach the pipe, not the command.
logged() {
    local log=$1
    shift
    exec "$@" > >(trap '' INT TERM HUP USR1; exec tee -a "$log") 2>&1
}

# run_part WHAT LOG COMMAND...: runs the command as a job; sets code, seconds and the result after a failure.
run_part() {
    local what=$1 log=$2 started=$SECONDS limit=()
    shift
    echo "measure: $what"
    # A run that is stopped by TERM saves a checkpoint, from which the same command resumes.
    [[ -z $limit_s ]] || limit=(timeout --kill-after=60 "$((limit_s > SECONDS ? limit_s - SECONDS : 1))")
    run_job logged "$1" ${limit[@]+"${limit[@]}"} "${@:2}"
    seconds=$((SECONDS - started))
    result="FAILED with exit code $code, see $log"
    if [[ -n $limit_s && ($code == 124 || $code == 137) ]]; then  # from timeout
        result="not finished in $limit_s s: repeat the command"
        left=1
    elif [[ $code != 0 && $first == 0 ]]; then
        first=$code
    fi
}

# begins WHAT RESULT_FILE RESULT: whether WHAT has to be measured; else it adds the row.
begins() {
    if [[ -e $2 ]]; then
        row "$1" "$3" before
        return 1
    elif [[ -n $limit_s && $SECONDS -ge $((limit_s - 10)) ]]; then
        row "$1" "not begun in $limit_s s: repeat the command" ''
        left=1
        return 1
    fi
}

# measure_bench NAME 'ARGUMENTS OF cifar_dist.bench'
measure_bench() {
    local name=$1 label=$1 words
    [[ -n $part ]] || label+=" $2"  # the user's
    begins "$label" "$out/$name.json" "in $out/$name.json" || return 0
    read -ra words <<<"$2"
    group=-  # signal the whole process group: a benchmark has nothing to save, unlike a run
    run_part "$label" "$out/$name.log" "$python" -m cifar_dist.bench "${words[@]}" \
        ${data[@]+"${data[@]}"} --json "$out/$name-incomplete.json"
    group=''
    if [[ $code == 0 ]]; then
        mv "$out/$name-incomplete.json" "$out/$name.json"
        result="in $out/$name.json"
    fi
    row "$label" "$result" "$seconds"
}

# measure_check NAME ARGUMENTS OF real_gpu...
measure_check() {
    local name=$1
    begins "$name" "$out/$name.txt" "passed, see $out/$name.txt" || return 0
    group=-
    rm -f "$out/$name.log"
    run_part "$name" "$out/$name.log" env PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" \
        "$python" -m tests.support.real_gpu "${@:2}"
    group=''
    if [[ $code == 0 ]]; then
        sleep 0.2  # until tee has written the end
        mv "$out/$name.log" "$out/$name.txt"
        result="passed, see $out/$name.txt"
    fi
    row "$name" "$result" "$seconds"
}

# measure_run NAME CONFIG SETTINGS...
measure_run() {
    local name=$1 config=$2 kept=$out/$1 run=runs/$key-$1
    [[ ! -e $kept/summary.json ]] || result=$(result_of "$kept")
    begins "$name" "$kept/summary.json" "${result-}" || return 0
    mkdir -p "$kept"
    run_part "$name" "$kept/output.log" "$here/node" --config "$config" --track.wandb disabled \
        ${data[@]+"${data[@]}"} "${@:3}" --run.name "$key-$name" --run.dir "$run" --run.resume auto
    if [[ $code == 0 ]]; then
        keep "$run" "$kept"
        result=$(result_of "$kept")
    fi
    row "$name" "$result" "$seconds"
}

# keep RUN DIR: copies the small files of a run; summary.json last, because it marks the part as complete.
keep() {
    local name
    for name in config.yaml metrics.jsonl curves.png summary.json; do
        [[ ! -f $1/$name ]] || { cp "$1/$name" "$2/.$name.partial" && mv "$2/.$name.partial" "$2/$name"; }
    done
}

# result_of DIR: the result of the run whose files are in DIR.
result_of() {
    "$python" - "$1/summary.json" <<'PYTHON'
import json, sys

figures = json.load(open(sys.argv[1], encoding="utf-8"))
views = figures["test_accuracy_tta"]
print(f"test {figures['test_accuracy']:.2%}" + (f" (views: {views:.2%})" if views is not None else ""),
      f"after {figures['train_seconds']:.1f} s of training")
PYTHON
}

# Measures part $part. With --short each thing takes seconds.
measure_part() {
    local speed94=${presets[0]} speed96=${presets[1]} tiny=() all=() some=(--train.max_steps 200)
    local killed=(--train.max_steps 120 --train.checkpoint_every_steps 40)
    local timing='' micro_batch micro_batches=(128 512)
    if [[ -n $short ]]; then
        tiny=(--model.width 0.0625 --data.subset 512 --train.batch_size 32 --train.micro_batch_size 16
            --eval.bn_samples 250 --eval.test_subset 500 --eval.tta none)
        all=("${tiny[@]}" --train.max_steps 4) some=("${all[@]}")
        killed=("${tiny[@]}" --train.max_steps 60 --train.checkpoint_every_steps 5)
        timing=' --width 0.0625 --repeats 1 --seconds 0.01' micro_batches=(8)
    fi
    case $part in
        1)
            measure_check augment augment "$device"
            micro_batch=${micro_batches[*]: -1}
            measure_bench bench-pooled "step --stem pooled --micro_batch_size $micro_batch$timing"
            ;;
        2)
            measure_run debug debug ${all[@]+"${all[@]}"}
            measure_run speed-94 "$speed94" ${all[@]+"${all[@]}"}
            measure_run unchanged "$speed94" "${some[@]}"
            measure_run not-merged "$speed94" "${some[@]}" --model.merge_1x1 off
            measure_run sgd "$speed94" "${some[@]}" --optim.name sgd
            measure_run not-compiled "$speed94" "${some[@]}" --train.compile off
            if [[ $gpus == 0 ]]; then
                row waits 'skipped: no GPU' ''
                row cuda-graphs 'skipped: no GPU' ''
            else
                measure_check waits waits "$(expanded "${data[1]-data}")/train.beton"
                measure_run cuda-graphs "$speed94" "${some[@]}" --train.cuda_graphs on
            fi
            ;;
        3)
            measure_run speed-96 "$speed96" ${all[@]+"${all[@]}"}
            measure_check equal equal "$device"
            measure_check killed killed "runs/$key-killed" --config "$speed94" \
                ${data[@]+"${data[@]}"} "${killed[@]}" --run.deterministic True --track.wandb disabled
            ;;
        4)
            for micro_batch in "${micro_batches[@]}"; do
                measure_bench "bench-cifar-$micro_batch" "step --stem cifar --micro_batch_size $micro_batch$timing"
            done
            measure_check profile-94 profile "$device" --config "$speed94" ${tiny[@]+"${tiny[@]}"}
            measure_check profile-96 profile "$device" --config "$speed96" ${tiny[@]+"${tiny[@]}"}
            ;;
    esac
}

# Prints the table, writes results.json, and ends: with 75 where something is left to do.
finish_table() {
    echo
    local table=$out/table${part:+-$part}.txt
    printf '%s\n' "${rows[@]}" | tee "$table.partial"
    mv "$table.partial" "$table"
    "$python" - "$out" <<'PYTHON'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
files = sorted([*out.glob("bench*.json"), *out.glob("*/summary.json"), *out.glob("*.txt")])
texts = {str(path.relative_to(out)): path.read_text(encoding="utf-8", errors="replace") for path in files}
figures = {name: json.loads(text) if name.endswith(".json") else text.splitlines() for name, text in texts.items()}
(out / ".results.partial").write_text(json.dumps(figures, indent=1), encoding="utf-8")
(out / ".results.partial").replace(out / "results.json")
PYTHON
    echo "measure: the results are in $out, $(du -sh "$out" | cut -f1)"
    [[ $first != 0 || $left == 0 ]] || exit 75
    exit "$first"
}
