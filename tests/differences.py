"""Derivatives by brute force."""

from collections.abc import Callable, Iterator

from torch import Tensor

_STEP = 1e-5


def quotients(loss: Callable[[], float], value: Tensor) -> Iterator[float]:
    """The derivative of a loss by each number of a float64 tensor that it reads, from two values close to either side."""
    flat = value.view(-1)
    for i, number in enumerate(flat.tolist()):
        sides = []
        for step in (_STEP, -_STEP):
            flat[i] = number + step
            sides.append(loss())
        flat[i] = number
        yield (sides[0] - sides[1]) / (2 * _STEP)
