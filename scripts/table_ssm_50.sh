#!/usr/bin/env bash
# 50 % of A_log pruned by four methods, mamba-130m to 1.4b.
# Published: mamba-130m under sparsessm gives 27.7 on wikitext2, dense 20.6, magnitude 740.3.
#   bash scripts/table_ssm_50.sh --models 130m
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/reproduce.py ssm_50 "$@"
