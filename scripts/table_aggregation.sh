#!/usr/bin/env bash
# How scores over time become one: vote, sum, power, discount, linear, window; both saliencies.
# Bundled model, as below, Python 3.11.7: dense 150.44; a_log: vote 150.68, discount 156.77.
#   bash scripts/table_aggregation.sh --models demo --dataset demo --seqlen 128 --nsamples 8 --eval_windows 8
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/reproduce.py aggregation "$@"
