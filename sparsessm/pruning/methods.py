"""The named methods. Each is data: what it does to A_log, and what to the weights of the linear and conv1d modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One row of the tables of methods.

    Attributes:
        saliency, aggregate: keys of SALIENCIES and AGGREGATES; both None where A_log is not scored.
        obs_on_A_log: A_log is solved by OBS as a matrix (D,N) instead.
        structure: "entries", or "columns" (whole states are removed). needs_n_of_m: prunen and prunem are required.
        weights: rule for linear and conv1d weights, "magnitude", "wanda" or "obs"; None where the method has none.
        search: one of SEARCHES, for a saliency that knows how entries interact.
        polish: iterations after OBS. module_order, compensate: see compensation.CompensationPlan.
        allocation: "uniform", "sensitivity" (spread by alpha), "output" (by measured errors).
        sheds: whole SSMs or blocks are removed greedily instead of all of the above (shed_target).
        about: one line for --help and the README.
    """

    about: str
    saliency: str | None = None
    aggregate: str | None = None
    obs_on_A_log: bool = False
    structure: str = "entries"
    needs_n_of_m: bool = False
    search: str = "independent"
    weights: str | None = None
    polish: int = 0
    module_order: str = "parallel"
    compensate: str = "none"
    allocation: str = "uniform"
    sheds: bool = False

    @property
    def prunes_A_log(self) -> bool:
        return self.saliency is not None or self.obs_on_A_log


STRUCTURES = ("entries", "columns")

_OBS_EVERYWHERE = Method("SparseGPT: OBS on A_log (D,N) and on the weights", obs_on_A_log=True, weights="obs")

METHODS = {
    "magnitude": Method("smallest absolute values", "magnitude", "sum", weights="magnitude"),
    "sparsessm": Method(
        "A_log^2 h^2, votes over time; OBS with sensitivities", "a_log", "vote", weights="obs", allocation="sensitivity"
    ),
    "sparsessm_dev": Method(
        "Abar^2 h^2, power-law weights over time; OBS with sensitivities",
        "transition", "power", weights="obs", allocation="sensitivity",
    ),  # fmt: skip
    "ts_real": Method("A_log^2 h^2 summed over time (the paper's L2 ablation)", "a_log", "sum"),
    "ts_semi": Method("A_log^2 h^2, votes over time, N:M", "a_log", "vote", needs_n_of_m=True),
    "mag_semi": Method("smallest absolute values, N:M", "magnitude", "sum", needs_n_of_m=True),
    "structure_ts": Method("A_log^2 h^2, votes over time; removes whole states", "a_log", "vote", structure="columns"),
    "structure_mag": Method("smallest absolute values; removes whole states", "magnitude", "sum", structure="columns"),
    "gpt_extend": _OBS_EVERYWHERE,
    "sparsegpt": _OBS_EVERYWHERE,
    "wanda": Method("abs(W) times the norm of its input, per output row", weights="wanda"),
    "sparsessm_obs": Method(
        "what the block's output loses, greedily; the rest makes up for it: OBS module by module, out_proj refitted",
        "output", "sum", search="greedy", weights="obs", polish=20, module_order="sequential", compensate="out_proj",
        allocation="output",
    ),  # fmt: skip
    "mamba-shedder": Method("whole SSMs or blocks, greedily by calibration perplexity", sheds=True),
}
