#!/usr/bin/env bash
# Whole states of mamba-370m removed, 25 % and 50 %.
# Published: mamba-370m under sparsessm 50 % gives 18.13 on wikitext2, magnitude 50 % 117.0.
#   bash scripts/table_structured_370m.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/reproduce.py structured_370m "$@"
