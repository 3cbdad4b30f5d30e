#!/usr/bin/env bash
#SBATCH --job-name=cifar_dist-sweep
#SBATCH --nodes=1
#SBATCH --cpus-per-task=2
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
#
# Train with several seeds, or over a small grid of settings, as a job array; the last job to end prints one table of
# means and standard deviations, and writes seeds.json. The arguments go to cifar_dist.train:
#
#   sbatch --array=0-2 slurm/sweep.sh --config configs/quickstart.yaml                 seeds 0, 1 and 2
#   sbatch --array=0-5 slurm/sweep.sh --grid grid.txt --config configs/googlenet.yaml  two lines with 3 seeds each
#   sbatch --array=0-2 --gpus-per-node=1 --cpus-per-task=8 slurm/sweep.sh ...          each run on a GPU
#
# A line of the grid's file holds settings, e.g. --optim.lr 0.1. In place of a file, --grid optim.lr=0.1,0.2
# train.epochs=2,3 takes every combination, here 4 lines. With G lines job I trains line I modulo G with seed I div G.
# The runs are in runs/sweep-JOBID/seed-S, or in setting-L/seed-S there, unless --run.name or --run.dir names the
# folder. Each run stops, is requeued and resumes as with slurm/train.sh, whose variables count here, too.
set -euo pipefail
for word in "$@"; do
    [[ $word != --help && $word != -h ]] || { sed -n '2,/^[^#]/{s/^#$//;s/^# //;/^set /!p}' "$0"; exit; }
done
trap '' USR1  # until the program below handles it
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
exec "$python" -m cifar_dist.cluster.slurm sweep "$@"
