#!/usr/bin/env bash
# Checks the scan for CUDA on this machine's GPU and times it. Installs nothing: takes the Python of $VENV (.venv) or, where
# that is missing, python3; torch with CUDA and triton have to be there, no other package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${VENV:-.venv}/bin/python"
[ -x "$PYTHON" ] || PYTHON=python3
exec "$PYTHON" scripts/gpu_check.py "$@"
