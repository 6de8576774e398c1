"""The named methods, as data, and the values of command-line flags; imports nothing, so that --help is quick.

Other names are errors. A new saliency is a function and a row in `saliency.SALIENCIES`, a new method a row
here.
"""

from __future__ import annotations

from dataclasses import dataclass

AGGREGATES = ("vote", "sum", "power", "discount", "linear", "window")
# The parameter of each aggregate that has one, as released.
TIME_PARAMETERS = {"power": 1.0, "discount": 0.9, "window": 0.25}
SEARCHES = ("independent", "greedy", "exchange", "exact")
STRUCTURES = ("entries", "columns", "heads")
# What goes whole, by the structures that remove it.
WHOLE = {"columns": "states", "heads": "heads"}
CONV_HESSIANS = ("tap", "channel")
ALLOCATIONS = ("uniform", "sensitivity", "output", "loss")
# Those that spread an unstructured sparsity by what was measured.
MEASURED = ("output", "loss")
WEIGHT_RULES = ("magnitude", "wanda", "obs", "obc")
IMPORTANCES = ("none", "rows", "tokens")
MODULE_ORDERS = ("parallel", "sequential")
COMPENSATIONS = ("none", "out_proj")
RECOVERIES = ("blocks", "model")
REMOVAL_TARGETS = ("ssm", "mamba_block")

# What a pruned entry of A_log is set to. zero: exp(-dt exp(30)) is 0 for every time step above 1e-11, in every runtime,
# so the state has no transition. unit: A = -1.
PRUNED_A_LOG = {"zero": 30.0, "unit": 0.0}


@dataclass(frozen=True)
class Method:
    """One row of the tables of methods.

    Attributes:
        saliency, aggregate: keys of SALIENCIES and AGGREGATES; both None where A_log is not scored.
        obs_on_A_log: A_log is solved by OBS as a matrix (rows,cols) instead.
        structure: of STRUCTURES; all but "entries" are removed whole. needs_n_of_m: prunen and prunem are required.
        weights: of WEIGHT_RULES; None where the method has none.
        importance: of IMPORTANCES, what errors at the outputs of modules count for (procedure.importance): none, all the
            same; rows, each row by its Fisher information; tokens, that and each token in the Hessian.
        search: of SEARCHES, for a saliency of interacting entries.
        percdamp: damping of the Hessians of OBS and OBC, as a share of their mean diagonal. Of few windows, or of tokens
            that count unlike, they are uncertain, and weights that follow them closely fit those windows (docs/BEYOND.md).
        polish: iterations of refinement after OBS. module_order, compensate: see procedure.plan.CompensationPlan.
        allocation: "uniform", "sensitivity" (spread by alpha), "output" (by measured errors), "loss" (one budget for the
            cheapest steps of all rows of all modules).
        spares_conv: the convolution stays dense where N:M is asked for, unless --target_modules names it.
        removes_parts: whole SSM branches or blocks are removed greedily instead of all of the above.
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
    importance: str = "none"
    percdamp: float = 0.01
    polish: int = 0
    module_order: str = "parallel"
    compensate: str = "none"
    allocation: str = "uniform"
    spares_conv: bool = False
    removes_parts: bool = False

    @property
    def prunes_A_log(self) -> bool:
        return self.saliency is not None or self.obs_on_A_log


_OBS_EVERYWHERE = Method("SparseGPT: OBS on A_log as a matrix and on the weights", obs_on_A_log=True, weights="obs")

METHODS = {
    "magnitude": Method("smallest absolute values", "magnitude", "sum", weights="magnitude"),
    "sparsessm": Method(
        "A_log^2 h^2, votes over time; OBS with sensitivities", "a_log", "vote", weights="obs", allocation="sensitivity"
    ),
    "sparsessm_dev": Method(
        "Abar^2 h^2, power-law weights over time; OBS with sensitivities",
        "transition", "power", weights="obs", allocation="sensitivity",
    ),
    "ts_real": Method("A_log^2 h^2 summed over time (the paper's L2 ablation)", "a_log", "sum"),
    "ts_semi": Method("A_log^2 h^2, votes over time, N:M", "a_log", "vote", needs_n_of_m=True),
    "mag_semi": Method("smallest absolute values, N:M", "magnitude", "sum", needs_n_of_m=True),
    "structure_ts": Method("A_log^2 h^2, votes over time; removes whole states", "a_log", "vote", structure="columns"),
    "structure_mag": Method("smallest absolute values; removes whole states", "magnitude", "sum", structure="columns"),
    "ghost": Method("(C h)^2 summed over time; removes whole states", "ghost", "sum", structure="columns"),
    "gpt_extend": _OBS_EVERYWHERE,
    "sparsegpt": _OBS_EVERYWHERE,
    "wanda": Method("abs(W) times the norm of its input, per output row", weights="wanda"),
    "sparsessm_obs": Method(
        "what the model's loss loses, in one budget; the rest compensates: OBC module by module, out_proj refitted",
        "output", "sum", search="greedy", weights="obc", importance="tokens", percdamp=0.1, polish=20,
        module_order="sequential", compensate="out_proj", allocation="loss", spares_conv=True,
    ),
    "mamba-shedder": Method("whole SSM branches or blocks, greedily by calibration perplexity", removes_parts=True),
}  # fmt: skip
