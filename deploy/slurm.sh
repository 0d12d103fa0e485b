#!/bin/bash
# Four nodes of eight H100, one process a node: sbatch deploy/slurm.sh
#
# POD is a folder that all nodes see, with models/ and runs/ in it. SLURM tells each process who it is.
#SBATCH --job-name=forgejax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
POD=${POD:?set POD, a folder that all nodes see}

. .venv/bin/activate
srun --kill-on-bad-exit=0 python scripts/train.py --mesh=h100-32 --config configs/qwen3_8b_v5e64.toml \
    --mesh.fsdp 4 --mesh.context 1 --mesh.tensor 8 \
    --policy.path="$POD/models/qwen3-8b" --run.root="$POD/runs" --run.name=forgejax --resume=auto "$@" && exit 0
# 75: a host was lost, 130: stopped by a notice, 137: killed. All go on from the last checkpoint.
case $? in 75 | 130 | 137) scontrol requeue "$SLURM_JOB_ID" ;; *) exit 1 ;; esac
