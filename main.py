"""Prune a Mamba language model in one shot, measure its perplexity, save it.

    python main.py MODEL DATASET --method sparsessm --prune_A --sparsity 0.5 --save OUT

See README.md; the command is in `sparsessm.__main__`, the steps of a run in `sparsessm.steps`.
"""

import sys

from sparsessm.__main__ import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
