# Sourced by the other scripts: makes .venv with Python 3.11 or later and installs a requirements file into it, once.
# VENV chooses another place for the environment.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or later is needed; install it and run this again" >&2
    return 2
}

# install FILE: into $VENV, unless that very file was installed there before.
install() {
    local file="$1" stamp="$VENV/.installed-$1" wanted python
    if [ ! -x "$VENV/bin/python" ]; then
        python="$(find_python)"
        echo "Making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    wanted="$(cat requirements*.txt)"  # one may name another
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing $file"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
        printf '%s\n' "$wanted" > "$stamp"
    fi
}
