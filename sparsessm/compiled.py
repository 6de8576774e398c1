"""Compiles a function by numba once and keeps the code on disk."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import njit


def source_of(*modules: ModuleType) -> str:
    """A name for the present source of modules."""
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()


def kept(function: Callable[..., None], **options: Any) -> Callable[..., None]:
    """The function compiled, and kept on disk or compiled again in each process if no folder can be written.

    numba looks only at the file of a function to tell whether what it kept is still good; what the function closes over is
    part of the name. So it has to close over `source_of` all modules that it calls: then a change of these counts as well.
    options: of numba's njit.
    """
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError as error:  # numba can write its cache neither beside the code nor in the home folder
        warnings.warn(f"compiled code cannot be kept ({error}); set NUMBA_CACHE_DIR to save its seconds", stacklevel=3)
        return njit(nogil=True, **options)(function)
