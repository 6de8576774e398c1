#!/usr/bin/env bash
# Sets everything up and prunes the bundled demo model offline with three methods; prints one table.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/demo.py "$@"
