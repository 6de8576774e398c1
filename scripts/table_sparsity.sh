#!/usr/bin/env bash
# A_log pruned by 10 to 90 %, four methods.
# Bundled model, as below, Python 3.11.7: dense 150.44; 90 %: magnitude 333.87, sparsegpt 219.02, sparsessm 165.44.
#   bash scripts/table_sparsity.sh --models demo --dataset demo --seqlen 128 --nsamples 8 --eval_windows 8
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/reproduce.py sparsity "$@"
