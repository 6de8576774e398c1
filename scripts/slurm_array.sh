#!/usr/bin/env bash
#SBATCH --job-name=sparsessm
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --output=slurm-%A_%a.log
# A sweep as a job array, one run a job; what was interrupted resumes when it is submitted again. From the repository:
#   count=$(python scripts/sweep_local.py FILE --count [--seeds N ...])
#   sbatch --array=0-$((count - 1)) scripts/slurm_array.sh FILE [--set NAME=VALUE ...] [--seeds N ...]
# Then, for the table: python scripts/sweep_local.py FILE [--set NAME=VALUE ...] [--seeds N ...]
set -euo pipefail
cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of this file from elsewhere
exec "${PYTHON:-python}" scripts/sweep_local.py "$@" --index "$SLURM_ARRAY_TASK_ID"
