#!/usr/bin/env bash
#SBATCH --job-name=cifar_dist
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# Train on whole nodes, with all their GPUs; the arguments go to cifar_dist.train. Submit it from inside the repository:
#
#   sbatch slurm/train.sh --config configs/googlenet.yaml
#   sbatch --nodes=2 --gpus-per-node=4 slurm/train.sh --config configs/googlenet.yaml
#   sbatch --oversubscribe --gpus-per-node=1 --cpus-per-task=8 --mem=32G slurm/train.sh ...    a part of a node
#
# What stands above is overridden on sbatch's command line. The run is runs/job-JOBID unless --run.name or --run.dir
# says otherwise, and goes on by itself where it was: two minutes before the time limit it saves and the job is requeued,
# MAX_REQUEUES times (20) at most. scancel saves, too, and does not requeue.
#
#   NPROC_PER_NODE    processes per node (default: its GPUs; without GPUs --ntasks-per-node, or 2)
#   MAX_RESTARTS      times that processes are started anew after one was lost (see launch/multinode)
#   CIFAR_DIST_HOME   the repository, should the job be submitted from elsewhere
#
# Prepare the data first where there is internet (python -m cifar_dist.prepare): compute nodes need none. Each node
# copies it to SLURM_TMPDIR or /tmp, once, when there is room.
set -euo pipefail
trap '' USR1  # until the program below listens
# Slurm runs a copy of this file, so that its own folder says nothing.
root=${CIFAR_DIST_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ $root == /* ]] || root=$PWD/$root  # or the search upward would never end
until [[ $root == / || -x $root/launch/multinode ]]; do root=$(dirname "$root"); done
[[ -x $root/.venv/bin/python ]] || {
    echo "error: there is no prepared repository at ${CIFAR_DIST_HOME:-${SLURM_SUBMIT_DIR:-$PWD}} or above it. Run ./launch/setup" >&2
    echo "in the repository and submit from inside it, or set CIFAR_DIST_HOME to it." >&2
    exit 2
}
CIFAR_DIST_SCRIPT=slurm/train.sh exec "$root/.venv/bin/python" -m cifar_dist.batch train "$@"
