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
# Starts one task per GPU on two nodes, without another launcher. fasttrain gets the arguments of the script:
#
#   sbatch examples/slurm.sh --method dino --data_path /data/imagenet
#
# Two minutes before the job's time is up, SLURM sends SIGUSR1. Every rank ends after the current step, with a checkpoint
# and status 138. Then the script requeues the job. It resumes in the same folder, because --resume auto comes last.
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # differs between jobs, which may share a node
export MASTER_ADDR MASTER_PORT

# --cpu-bind=none: every rank must see all cores of its node, because fasttrain divides them among the node's ranks.
# --kill-on-bad-exit=0: otherwise the first rank that ends with 138 makes srun kill the others and return 143 or 137. If a
# rank fails, the others end without srun.
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
