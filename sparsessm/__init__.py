"""SparseSSM: one-shot pruning of Mamba language models (arXiv 2506.09613), reproduced and extended.

Letters used for sizes throughout:

    B  batch (windows)            L  time steps of a window       T  time steps of a chunk of it
    D  d_inner, channels          N  d_state, states per channel  M  d_model
    R  dt_rank                    K  d_conv, width of the convolution

and for the quantities of one selective scan (Gu and Dao 2023, section 3; docs/DESIGN.md has the formulas):

    A = -exp(A_log)  (D,N)        Abar_t = exp(dt_t A)  (D,N)     h_t  state after step t  (D,N)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsessm.version import __version__

if TYPE_CHECKING:
    from sparsessm.api import calibration, evaluation, load, perplexity, prune, save
    from sparsessm.compacting import compact
    from sparsessm.pruning.saliency import register_saliency
    from sparsessm.result import Result
    from sparsessm.training import hold_masks

# Threads of torch that wait for the next operation look for it in a loop, by default for milliseconds: beside other work on
# the same cores they take the time that the others need to get there. A short look is enough. It holds where torch has not
# been imported before, for processes that this one starts as well, and what the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Where each public name is; imported on first use, so that --help does not wait for torch.
_PUBLIC = {
    **dict.fromkeys(("load", "calibration", "evaluation", "prune", "perplexity", "save"), "sparsessm.api"),
    "compact": "sparsessm.compacting",
    "register_saliency": "sparsessm.pruning.saliency",
    "Result": "sparsessm.result",
    "hold_masks": "sparsessm.training",
}

__all__ = [
    "Result", "__version__", "calibration", "compact", "evaluation", "hold_masks", "load", "perplexity", "prune",
    "register_saliency", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparsessm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
