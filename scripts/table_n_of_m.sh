#!/usr/bin/env bash
# 2 of every 4 and 4 of every 8 entries pruned: A_log along the states, weights along the columns.
# Bundled model, as below, Python 3.11.7: dense 150.44; A_log 2:4: mag_semi 181.71, ts_semi 151.10.
#   bash scripts/table_n_of_m.sh --models demo --dataset demo --seqlen 128 --nsamples 8 --eval_windows 8
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/reproduce.py n_of_m "$@"
