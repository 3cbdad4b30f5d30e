# Sourced by multinode and the scripts in slurm/ with `root` set to the repository: sets `python`. Ends with 2 if that
# cannot be run.
mistake() { echo "error: $1" >&2; shift; [[ $# == 0 ]] || printf '%s\n' "$@" >&2; exit 2; }

if [[ -z ${CIFAR_DIST_PYTHON:-} ]]; then
    python=$root/.venv/bin/python
    [[ -x $python ]] || mistake "$python is missing. Run ./launch/setup first, or set CIFAR_DIST_PYTHON to another Python."
else
    python=$(type -P "$CIFAR_DIST_PYTHON") && [[ -f $python ]] ||
        mistake "CIFAR_DIST_PYTHON is $CIFAR_DIST_PYTHON, which is no executable file on $(uname -n)." \
            "Set it to a Python that all nodes see, or unset it to use that of ./launch/setup."
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}  # it need not have cifar_dist
fi

# check_imports: ends with 2 if CIFAR_DIST_PYTHON lacks a package. Takes seconds; launch/setup has checked its own Python.
check_imports() {
    local answer
    [[ -n ${CIFAR_DIST_PYTHON:-} ]] || return 0
    answer=$("$python" -c 'import torch, ffcv.loader, cifar_dist.cluster.slurm, cifar_dist.training.run' 2>&1) ||
        mistake "CIFAR_DIST_PYTHON is $CIFAR_DIST_PYTHON, which cannot import what training needs, on $(uname -n):" \
            "$(tail -n 1 <<<"$answer")" "Install the packages of pyproject.toml into it, or unset it to use that of ./launch/setup." \
            "\`$python -m cifar_dist.doctor\` checks this machine."
}
