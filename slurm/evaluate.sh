#!/usr/bin/env bash
#SBATCH --job-name=cifar_dist-evaluate
#SBATCH --nodes=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# Score a checkpoint on one node; the arguments go to cifar_dist.evaluate:
#
#   sbatch slurm/evaluate.sh runs/job-17 --json score.json
#   sbatch --gpus-per-node=1 --cpus-per-task=8 slurm/evaluate.sh runs/job-17
set -euo pipefail
for word in "$@"; do
    [[ $word != --help && $word != -h ]] || { sed -n '2,/^[^#]/{s/^#$//;s/^# //;/^set /!p}' "$0"; exit; }
done
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
exec "$python" -m cifar_dist.cluster.slurm evaluate "$@"
