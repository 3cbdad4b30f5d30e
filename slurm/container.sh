#!/usr/bin/env bash
#SBATCH --job-name=cifar_dist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# Train in an Apptainer image (see slurm/cifar_dist.def) on whole nodes; the arguments go to cifar_dist.train. Nothing of
# Slurm has to be in the image. Submit it from the repository's root, which holds configs/ and data/ and gets runs/:
#
#   sbatch --nodes=2 --gpus-per-node=4 slurm/container.sh --config configs/googlenet.yaml
#
# The run directory is runs/job-JOBID unless --run.dir names it. Two minutes before the time limit the run saves, and the
# job is requeued and resumes it, at most MAX_REQUEUES times (20).
#
#   CIFAR_DIST_IMAGE  the image (default: cifar_dist.sif)
#   NPROC_PER_NODE    processes per node (default: its GPUs; without GPUs 1)
#
# NOT TRIED WITH APPTAINER YET: the test has a stand-in for it that runs the command outside of an image.
set -euo pipefail
for word in "$@"; do
    [[ $word != --help && $word != -h ]] || { sed -n '2,/^[^#]/{s/^#$//;s/^# //;/^set /!p}' "$0"; exit; }
done
mistake() { echo "error: $1" >&2; exit 2; }

[[ -n ${SLURM_JOB_ID:-} ]] ||
    mistake "this script is for Slurm: sbatch slurm/container.sh. Without Slurm, see slurm/cifar_dist.def."
SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0} MAX_REQUEUES=${MAX_REQUEUES:-20}
for name in SLURM_JOB_ID SLURM_JOB_NUM_NODES SLURM_RESTART_COUNT MAX_REQUEUES; do
    [[ ${!name:-} =~ ^[0-9]{1,10}$ ]] || mistake "$name is '${!name:-}'; valid: a whole number."
done
image=${CIFAR_DIST_IMAGE:-cifar_dist.sif}
[[ -e $image ]] || mistake "there is no image $image in $PWD. Build it (see slurm/cifar_dist.def), or set CIFAR_DIST_IMAGE."
for program in srun apptainer; do
    type -P "$program" >/dev/null ||
        mistake "$program is not in PATH on $(uname -n). Load the site's module of it; see docs/slurm.md, section Sites."
done
export NNODES=$SLURM_JOB_NUM_NODES NODE_RANK=slurm RUN_ID=$SLURM_JOB_ID-$SLURM_RESTART_COUNT
export MASTER_ADDR=${MASTER_ADDR:-$(uname -n)} MASTER_PORT=${MASTER_PORT:-$((16384 + SLURM_JOB_ID % 16384))}
unset CIFAR_DIST_PYTHON PYTHONPATH  # of the host
code=0
srun --kill-on-bad-exit=0 --export=ALL apptainer exec --nv "$image" /opt/cifar_dist/launch/multinode \
    --run.dir "runs/job-$SLURM_JOB_ID" --run.resume auto "$@" || code=$?
if [[ $code == 75 && $SLURM_RESTART_COUNT -lt $MAX_REQUEUES ]]; then
    echo "job $SLURM_JOB_ID: stopped; requeueing it (requeued $SLURM_RESTART_COUNT times so far)"
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
