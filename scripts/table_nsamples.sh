#!/usr/bin/env bash
# 4 to 256 calibration windows.
# Bundled model, as below, Python 3.11.7: dense 150.44; sparsessm 4: 151.29, 256: 152.70.
#   bash scripts/table_nsamples.sh --models demo --dataset demo --seqlen 128 --eval_windows 8
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/reproduce.py nsamples "$@"
