#!/usr/bin/env bash
# Calibrated on one text, evaluated on others.
# Bundled model, as below, Python 3.11.7: dense 150.44; calibrated on the same text: sparsessm 150.68.
#   bash scripts/table_transfer.sh --models demo --dataset demo --seqlen 128 --nsamples 8 --eval_windows 8
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/reproduce.py transfer "$@"
