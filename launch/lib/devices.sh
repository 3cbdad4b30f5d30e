# Sourced by other scripts: how many GPUs are visible, and how many processes train without any.
num_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr -d ' ' <<<"$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -cE '^([0-9]|GPU-|MIG-)' || true  # -1 hides all
    else
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    fi
}

# Sets NPROC_PER_NODE where neither the user nor GPUs decide it: two, since presets for CPUs have two micro-batches.
two_without_gpus() {
    if [[ -z ${NPROC_PER_NODE:-} && $(num_gpus) == 0 ]]; then
        NPROC_PER_NODE=$("${python:-.venv/bin/python}" -c \
            'from cifar_dist.environment import num_processors; print(min(2, num_processors()))')
        export NPROC_PER_NODE
    fi
}
