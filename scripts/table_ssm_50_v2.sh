#!/usr/bin/env bash
# 50 % of A_log pruned with weights over time (sparsessm_dev), mamba-130m to 2.8b, mamba2-370m and 780m.
# Published: mamba-130m under sparsessm_dev gives 21.26 on wikitext2, dense 20.6.
#   bash scripts/table_ssm_50_v2.sh --models 130m
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/reproduce.py ssm_50_v2 "$@"
