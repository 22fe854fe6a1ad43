#!/bin/bash
# A sweep on the nodes of one Slurm job: Ray starts on all of them, tuner on the first, and all end together.
#
#   sbatch cluster/slurm.sh run /shared/sweep.yaml
#   sbatch cluster/slurm.sh resume NAME                      (when the time was up; finished trials are kept)
#
# Submit from the repository, on a file system that all nodes see, after `make setup`. Whole nodes, because two Ray
# clusters on one host block each other.
#SBATCH --job-name=tuner
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=12:00:00
set -euo pipefail

source .venv/bin/activate
RAY_AUTH_TOKEN=$(openssl rand -hex 32)
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    -- env RAY_ADDRESS=auto tuner "$@"
