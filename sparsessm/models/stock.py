"""Stock `transformers` on its own: by torch alone, whatever packages it finds for its kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def stock_torch_path(model: nn.Module) -> Iterator[None]:
    """Makes stock `transformers` compute by torch alone for a while, whatever packages it found for its kernels.

    Where mamba-ssm can be imported its kernels are taken even for tensors on the CPU, where they fail; with it and without
    causal-conv1d, Mamba's training path fails on CUDA.
    """
    changed = []
    names = {type(part).__module__ for part in model.modules()}
    for module in (sys.modules[name] for name in sorted(names) if name.startswith("transformers.")):
        for name, function in list(vars(module).items()):
            plain = getattr(function, "__wrapped__", None)
            own = getattr(function, "__module__", None) == module.__name__ and not isinstance(function, type)
            if plain is not None and own:
                changed.append((module, name, function))
                setattr(module, name, plain)
    try:
        yield
    finally:
        for module, name, function in changed:
            setattr(module, name, function)
