"""Fills a table of the paper: runs what is missing, resumes what was interrupted, prints it, writes Markdown, CSV and LaTeX.

    python scripts/reproduce.py ssm_50 --models 130m 370m
    python scripts/reproduce.py ssm_50 --models demo --dataset demo --seqlen 128 --nsamples 8 --eval_windows 8

The tables are described in sparsessm/runs/tables. A flag that is not one of these goes to main.py as it is: --eval_zero_shot
fills the zero-shot columns, --data_dir DIR reads local copies of the texts. Exit code: 0 when every run of the table is
there, 1 when some failed, 2 for a mistake in the call, 128 + the signal's number when it was stopped; the same call
continues.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsessm.errors import ending_in_one_line
from sparsessm.runs import grid, paper, paper_output


def reproduce(
    name: str, changes: paper.Changes, *, base_dir: Path, out: Path | None, workers: int, devices: Sequence[str] | None,
    dry_run: bool,
) -> int:  # fmt: skip
    """Returns the exit code, or raises InputError.

    Args:
        out: folder for the tables (default: BASE_DIR/tables). dry_run: print the commands of what is to be done instead.
    """
    table = paper.load(name)
    lines = paper.entries(table, changes)
    cells = [cell for line in lines for cell in line.cells]
    if dry_run:
        for cell in cells:
            print(_described(cell, base_dir))
        return 0

    def tell(failures: dict[grid.Cell, str]) -> None:
        filled = paper.fill_in(table, lines, base_dir, failures)
        files = paper_output.write(filled, out or base_dir / "tables", base_dir)
        print(paper_output.text(filled))
        print("tables:", *files, sep="\n  ")

    return grid.fill_and_tell(cells, base_dir, tell, workers=workers, devices=devices, group=name)


def _described(cell: grid.Cell, base_dir: Path) -> str:
    """The command of a cell as a line of a shell; a comment where there is nothing to run."""
    if cell.refusal:
        return f"# fails: {shlex.join(cell.argv)}: {cell.refusal}"
    done, broken_off = grid.finished(cell, base_dir), grid.interrupted(cell, base_dir)
    if done:
        return f"# done: {done}"
    argv = ["--resume", str(broken_off)] if broken_off else cell.command(base_dir)
    return shlex.join(["python", "main.py", *argv])


@ending_in_one_line
def main(argv: Sequence[str]) -> int:
    parser = grid.parser(__doc__)
    parser.add_argument("table", help=f"one of: {', '.join(paper.names())}")
    parser.add_argument("--models", nargs="+", help=f"{', '.join(paper.MODELS)}, hub ids, folders, or demo")
    parser.add_argument("--dataset", nargs="+", help="text for calibration, and for evaluation without --ppl_datasets")
    parser.add_argument("--ppl_datasets", nargs="+", help="texts for evaluation")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="rows to keep, by name or method")
    passed = ("seqlen", "nsamples", "eval_windows")
    for name in passed:
        parser.add_argument(f"--{name}", type=int, help="as of main.py")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    known, further = parser.parse_known_args(argv)
    flags = {name: value for name in passed if (value := getattr(known, name)) is not None}
    changes = paper.Changes(
        models=known.models, dataset=known.dataset, ppl_datasets=known.ppl_datasets, only=known.only,
        seeds=known.seeds, flags=flags, argv=further,
    )  # fmt: skip
    return reproduce(
        known.table, changes, base_dir=known.base_dir, out=known.out, workers=known.workers, devices=known.devices,
        dry_run=known.dry_run,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
