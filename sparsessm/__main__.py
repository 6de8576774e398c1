"""The command, for `python -m sparsessm`, for the installed `sparsessm`, and for main.py.

Nothing here or in what it imports waits for torch, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsessm.commandline import parse
from sparsessm.errors import BUG, INTERRUPTED, UNUSABLE, InputError, check_interrupted, ending_by_signals
from sparsessm.options import Options


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 for an error that the user can correct, 130 after an interruption, 1 for a bug, each with one line.

    argv: the arguments after the program's name, by default those of this process.
    """
    with ending_by_signals():
        try:
            chosen, resumed = parse(sys.argv[1:] if argv is None else argv)  # prints --help
            command = _imported()
        except InputError as error:
            if os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
                print(f"error: {error}", file=sys.stderr)
            return UNUSABLE
        except ImportError as error:
            print(f"error: {error}: pip install -r requirements.txt", file=sys.stderr)
            return BUG
        except KeyboardInterrupt:
            print("interrupted before anything was started", file=sys.stderr)
            return INTERRUPTED
        return command(chosen, resumed)


def _imported() -> Callable[[Options, Path | None], int]:
    """The command. An interruption that a package made an ImportError of, as transformers does, is one again."""
    try:
        from sparsessm.run import command
    except ImportError:
        check_interrupted()
        raise
    return command


if __name__ == "__main__":
    sys.exit(main())
