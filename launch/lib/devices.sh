# Sourced by other scripts: how many GPUs are visible, and how many processes train without any.
num_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^([0-9]|GPU-|MIG-)' || true  # -1 hides all
    else
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    fi
}

# Sets NPROC_PER_NODE where neither the user nor GPUs decide it: two, since presets for CPUs have two micro-batches.
two_without_gpus() {
    if [[ -z ${NPROC_PER_NODE:-} && $(num_gpus) == 0 ]]; then
        # OMP_NUM_THREADS lowers what nproc prints, but the processes do not follow it.
        NPROC_PER_NODE=$([[ $(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) -gt 1 ]] && echo 2 || echo 1)
        export NPROC_PER_NODE
    fi
}
