# Sourced by other scripts: the number of processes where no GPUs decide it, unless NPROC_PER_NODE is given.
# Without a GPU, two processes with half of the processors each are faster than one with all.
if [[ -z ${NPROC_PER_NODE:-} && -z ${CUDA_VISIBLE_DEVICES-$(nvidia-smi --list-gpus 2>/dev/null || true)} ]]; then
    # OMP_NUM_THREADS lowers what nproc prints, but the processes do not follow it.
    NPROC_PER_NODE=$([[ $(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) -gt 1 ]] && echo 2 || echo 1)
    export NPROC_PER_NODE
fi
