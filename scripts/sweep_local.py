"""Runs a sweep file without a server, several points at a time; finished points are not repeated.

    python scripts/sweep_local.py scripts/sweeps/aggregation.yaml --workers 2 --set model_path=demo dataset=demo seqlen=128

Prints a table of the results, and writes it as Markdown, CSV, LaTeX and JSON. Run N alone: --index N, which writes no table,
because many may run at once; how many there are: --count. Exit code: 0 when every run is there, 1 when some failed, 2 for
a mistake in the call, 128 + the signal's number when it was stopped; the same call continues.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsessm.errors import InputError, ending_in_one_line
from sparsessm.runs import grid, sweeps
from sparsessm.runs.experiment_output import carry_out


@ending_in_one_line
def main(argv: Sequence[str]) -> int:
    parser = grid.parser(__doc__)
    parser.add_argument("file", type=Path, help="sweep file, as `wandb sweep` takes it; method grid")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="other parameters")
    parser.add_argument("--index", type=int, help="do this run alone, counted from 0")
    parser.add_argument("--count", action="store_true", help="print the number of runs and run nothing")
    known = parser.parse_args(argv)
    sweep = sweeps.load(known.file, known.set, known.seeds)
    count = len(sweep.cells)
    if known.count:
        print(count)
        return 0
    if known.index is not None and not 0 <= known.index < count:
        raise InputError(f"--index {known.index} is not a run of {sweep.name}: it has 0 to {count - 1}")
    return carry_out(sweep, known, "sweeps", known.index)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
