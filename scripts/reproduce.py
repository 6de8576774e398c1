"""Fills a table of the paper: runs what is missing, resumes what broke off, prints it, writes Markdown, CSV, LaTeX and JSON.

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
from sparsessm.runs import grid, paper
from sparsessm.runs.experiment_output import carry_out

_PASSED = ("seqlen", "nsamples", "eval_windows")


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
    for name in _PASSED:
        parser.add_argument(f"--{name}", type=int, help="as of main.py")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    known, further = parser.parse_known_args(argv)
    experiment = paper.experiment(
        paper.load(known.table), models=known.models, dataset=known.dataset, ppl_datasets=known.ppl_datasets,
        only=known.only, seeds=known.seeds, argv=further,
        flags={name: value for name in _PASSED if (value := getattr(known, name)) is not None},
    )  # fmt: skip
    if known.dry_run:
        print(*(_described(cell, known.base_dir) for cell in experiment.cells), sep="\n")
        return 0
    return carry_out(experiment, known, "tables")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
