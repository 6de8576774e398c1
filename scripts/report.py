"""Makes one HTML page of all runs below a folder, and with --plots every picture as PNG and PDF.

    python scripts/report.py EXPERIMENTS_DIR -o report.html [--plots DIR]

The page opens from disk, needs no network, and links to the run folders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsessm.errors import ending_in_one_line
from sparsessm.report.page import write_report
from sparsessm.report.plots import write_plots
from sparsessm.report.results import read_runs
from sparsessm.report.wording import plural


@ending_in_one_line
def main(argv: Sequence[str]) -> int:
    """Exit code: 0, 2 with one line that says what to do, or 128 + the number of the signal that stopped it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", type=Path, metavar="EXPERIMENTS_DIR", help="folder of runs, at any depth")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="folder for each picture as PNG and PDF")
    options = parser.parse_args(argv)
    runs = read_runs(options.experiments)
    write_report(runs, options.experiments, options.output)
    left = len(runs.unfinished) + len(runs.damaged)
    written = [str(options.output), plural(len(runs.finished), "run"), *([f"{left} left out"] if left else [])]
    if options.plots:
        written.append(f"{plural(len(write_plots(runs.finished, options.plots)), 'plot')} in {options.plots}")
    print(", ".join(written))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
