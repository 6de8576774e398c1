"""Prune a Mamba language model in one shot, measure its perplexity, save it.

    python main.py MODEL DATASET --method sparsessm --prune_A --sparsity 0.5 --save OUT

See README.md; the steps are in `sparsessm.run`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sparsessm.errors import FAULT, INTERRUPTED, ending_by_signals


def main(argv: Sequence[str]) -> int:
    """Exit code: 0; 2 for what the user can correct, 130 after an interruption, 1 for a fault, each with one line."""
    with ending_by_signals():
        try:
            from sparsessm.run import command
        except ImportError as error:
            print(f"error: {error}: pip install -r requirements.txt", file=sys.stderr)
            return FAULT
        except KeyboardInterrupt:
            print("interrupted before anything was begun", file=sys.stderr)
            return INTERRUPTED
        return command(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
