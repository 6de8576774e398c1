#!/usr/bin/env bash
# Installs what the tests need and runs them all, in two processes; arguments go to pytest, for example: bash scripts/test.sh -m "not slow"
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements-test.txt
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
