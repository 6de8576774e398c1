"""Runs a sweep file without a server, several points at a time; finished points are not repeated.

    python scripts/sweep_local.py scripts/sweeps/aggregation.yaml --workers 2 --set model_path=demo dataset=demo seqlen=128

Prints a table of the results, and writes it as Markdown, CSV and LaTeX. Run N alone: --index N, which writes no table,
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


def sweep_local(
    sweep: sweeps.Sweep, *, index: int | None, base_dir: Path, out: Path | None, workers: int, devices: Sequence[str] | None
) -> int:
    """Returns the exit code, or raises InputError. out: folder for the results (default: BASE_DIR/sweeps)."""
    if index is not None and not 0 <= index < len(sweep.cells):
        raise InputError(f"--index {index} is not a run of {sweep.name}: it has 0 to {len(sweep.cells) - 1}")
    cells = sweep.cells if index is None else [sweep.cells[index]]
    folder = out or base_dir / "sweeps"

    def tell(failures: dict[grid.Cell, str]) -> None:
        if index is not None:
            return
        found = sweeps.results(sweep, base_dir, failures)
        files = sweeps.write(sweep, found, folder, base_dir, failures)
        print(sweeps.text(sweep, found))
        print(f"results: {', '.join(map(str, files))}")

    return grid.fill_and_tell(cells, base_dir, tell, workers=workers, devices=devices, group=sweep.name)


@ending_in_one_line
def main(argv: Sequence[str]) -> int:
    parser = grid.parser(__doc__)
    parser.add_argument("file", type=Path, help="sweep file, as `wandb sweep` takes it; method grid")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="other parameters")
    parser.add_argument("--index", type=int, help="do this run alone, counted from 0")
    parser.add_argument("--count", action="store_true", help="print the number of runs and run nothing")
    known = parser.parse_args(argv)
    sweep = sweeps.load(known.file, known.set, known.seeds)
    if known.count:
        print(len(sweep.cells))
        return 0
    return sweep_local(
        sweep, index=known.index, base_dir=known.base_dir, out=known.out, workers=known.workers, devices=known.devices
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
