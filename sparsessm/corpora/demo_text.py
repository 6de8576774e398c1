"""The data set `demo`: English prose that comes with every CPython, so that a first run needs no download.

The text is the docstrings of the standard library's modules, read from their source with `ast`; nothing is imported or
run. It depends on the Python version (a Tokens' sha256 tells two versions apart) and is not a benchmark with published
numbers. mamba-demo has not seen it in training.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from sparsessm.errors import InputError

# Not prose, or not in every installation: test suites, bundled programs, packages that newer versions of
# Python or slim installations leave out, tables of characters, and pydoc's topics (which mamba-demo was trained on).
SKIPPED = frozenset(
    "test tests idle_test idlelib lib2to3 turtledemo ensurepip distutils tkinter encodings pydoc_data".split()
)


@lru_cache(maxsize=2)
def docstrings(evaluation: bool) -> tuple[str, ...]:
    """The cleaned docstrings of one half of the library: modules sorted by dotted name, in each the source's order.

    Which half a module belongs to is decided by a hash of its dotted name, so the two halves share no module and adding
    a module moves no other. Raises InputError where the library's sources are not installed.
    """
    found = tuple(
        docstring
        for name, path in _modules()
        if belongs_to_evaluation(name) == evaluation
        for docstring in _docstrings_of(path)
    )
    if not found:
        raise InputError("this Python lacks the sources of its standard library: use another data set than demo")
    return found


def belongs_to_evaluation(module: str) -> bool:
    """Whether the module of this dotted name is evaluation text; about every second one is."""
    return hashlib.sha256(module.encode()).digest()[0] % 2 == 1


def _modules() -> list[tuple[str, Path]]:
    """(dotted name, file) of the public standard library modules, sorted by name; site-packages is not among them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for name in sys.stdlib_module_names - SKIPPED:
        folder = root / name
        for path in [folder.with_suffix(".py"), *folder.rglob("*.py")]:
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            # A leading underscore marks what is private: often the Python version of a C module, with the same docstrings.
            private = any(part.startswith("_") and part != "__main__" for part in parts)
            if path.is_file() and not private and not SKIPPED.intersection(parts):
                modules.append((".".join(parts), path))
    return sorted(modules)


def _docstrings_of(path: Path) -> Iterator[str]:
    """Docstrings of one source file; none where it does not parse (templates are shipped under .py names)."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    yield from _docstrings_under(tree)


def _docstrings_under(node: ast.AST) -> Iterator[str]:
    """Docstrings under `node` in source order. Only statements are visited: expressions hold none and are the bulk."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for field in ("body", "handlers", "orelse", "finalbody"):
        children = getattr(node, field, None)
        if isinstance(children, list):  # in a lambda or a conditional expression these fields are not lists
            for child in children:
                yield from _docstrings_under(child)
