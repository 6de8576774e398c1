#!/usr/bin/env bash
# 50 % of A_log and of the linear and conv1d weights pruned, mamba-130m to 1.4b.
# Published: mamba-130m under sparsessm gives 59.17 on wikitext2, dense 20.6, mamba-shedder 364.8.
#   bash scripts/table_whole_50.sh --models 130m
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/reproduce.py whole_50 "$@"
