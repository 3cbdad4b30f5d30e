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
# Options on sbatch's command line override those above. The run directory is runs/job-JOBID unless --run.name or
# --run.dir names it. Two minutes before the time limit the run saves, and the job is requeued and resumes it, at most
# MAX_REQUEUES times (20). scancel saves, too, and does not requeue.
#
#   NPROC_PER_NODE     processes per node (default: its GPUs; without GPUs --ntasks-per-node, or 2)
#   MAX_RESTARTS       restarts after a lost process (see launch/multinode)
#   CIFAR_DIST_HOME    the repository, if the job is submitted from elsewhere
#   CIFAR_DIST_PYTHON  another Python than .venv's, such as conda's; see docs/slurm.md
#
# Prepare the data first where there is internet (python -m cifar_dist.prepare). Each node copies it to SLURM_TMPDIR or
# /tmp, once, if there is room.
set -euo pipefail
for word in "$@"; do
    [[ $word != --help && $word != -h ]] || { sed -n '2,/^[^#]/{s/^#$//;s/^# //;/^set /!p}' "$0"; exit; }
done
trap '' USR1  # or it would end the job before the program below handles it
# Slurm runs a copy of this file from another folder, so the repository is looked for from the working directory up.
from=${CIFAR_DIST_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
root=$(cd "$from" >/dev/null 2>&1 && until [[ -x launch/multinode || $PWD == / ]]; do cd ..; done && pwd) || root=''
[[ -x $root/launch/multinode ]] || {
    echo "error: there is no repository of cifar_dist at $from or above it." >&2
    echo "Submit from inside the repository, or set CIFAR_DIST_HOME to it." >&2
    exit 2
}
export CIFAR_DIST_HOME=$root
. "$root/launch/lib/python.sh"
check_imports
exec "$python" -m cifar_dist.cluster.slurm train "$@"
