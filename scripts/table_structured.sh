#!/usr/bin/env bash
# Whole states removed: 25, 50 and 75 %.
# Bundled model, as below, Python 3.11.7: dense 150.44; 50 %: structure_mag 250.66, structure_ts 153.36.
#   bash scripts/table_structured.sh --models demo --dataset demo --seqlen 128 --nsamples 8 --eval_windows 8
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/reproduce.py structured "$@"
