#!/usr/bin/env bash
#SBATCH --job-name=fasttrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A task for every GPU of two nodes, without another launcher. What follows the script's name goes to fasttrain:
#
#   sbatch examples/slurm.sh --method dino --data_path /data/imagenet
#
# Two minutes before its time is up SLURM sends SIGUSR1: every rank ends after the step under way, with a checkpoint and
# status 138, on which the job is queued again, to go on from there in the same folder, whatever --resume says.
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # of its own, should jobs share a node
export MASTER_ADDR MASTER_PORT

# fasttrain divides the cores that it sees among the ranks of a node, so each must see the node's.
# The first rank to end with 138 must not have srun kill the others, or its status would be theirs, 143 or 137; where a
# rank fails, the others end themselves.
srun --kill-on-bad-exit=0 --cpu-bind=none bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec python fasttrain/run.py "$@"
' fasttrain --output_dir "runs/$SLURM_JOB_ID" "$@" ${SLURM_RESTART_COUNT:+--resume auto}
status=$?
if [ "$status" -eq 138 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
