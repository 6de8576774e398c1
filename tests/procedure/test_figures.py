"""An independent implementation of the methods gave these figures; ours agree within 0.5 % (weights: 1 %).

By the steps of the command, on windows that all cases share; test_main.py has two figures of the command itself.
"""

import pytest

from sparsessm.corpora import text
from sparsessm.layerwise.stream import Stream
from sparsessm.metrics.perplexity import perplexity
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.models.mamba1 import Mamba1Mixer
from sparsessm.models.tokenizing import load_tokenizer
from sparsessm.options import Options
from sparsessm.procedure.driver import Job
from sparsessm.procedure.plan import plan_of
from sparsessm.procedure.prune import prune

PLACE = {"device": "cpu", "offload": "cpu"}
REFERENCE = [
    (method, "prune_A", transition, sparsity, value)
    for method, zero50, unit50, zero80 in [
        ("magnitude", 84.81, 108.66, 118.18),
        ("sparsessm", 69.06, 74.16, 74.97),
        ("sparsessm_dev", 67.92, 80.31, 72.32),
        ("ts_real", 69.18, 74.29, 74.74),
    ]
    for transition, sparsity, value in [("zero", 0.5, zero50), ("unit", 0.5, unit50), ("zero", 0.8, zero80)]
    if (method, transition, sparsity) != ("sparsessm", "zero", 0.5)
] + [
    ("magnitude", "prune_layers", "zero", 0.5, 100.68),
    ("sparsegpt", "prune_layers", "zero", 0.5, 81.36),
]


@pytest.fixture(scope="module")
def texts(shared_dir):
    """The checkpoint, 32 windows of wikitext2 to calibrate on, 64 to measure on."""
    source, folder = checkpoint.find(str(shared_dir / "checkpoints" / "mamba-demo")), str(shared_dir / "data" / "wikitext2")
    tokenizer = load_tokenizer(source)
    calibration = text.calibration_windows(folder, tokenizer, 32, 512, seed=0).ids
    return source, calibration, text.cut_windows(text.evaluation_stream(folder, tokenizer, 512).ids, 512, 64)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "what", "transition", "sparsity", "value"), REFERENCE)
def test_independent_figures_on_wikitext2(texts, method, what, transition, sparsity, value):
    source, calibration, evaluation = texts
    options = Options(model="-", dataset="-", method=method, sparsity=sparsity, pruned_transition=transition, **{what: True})
    layout = Layout(checkpoint.load(source))
    job = Job(layout, lambda: Stream.embed(layout, calibration, batch=8, **PLACE), 0, len(layout.layers))
    prune(job, plan_of(options, Mamba1Mixer.MODULES), calibration)
    measured = perplexity(layout, evaluation, batch=8, **PLACE).value
    assert measured == pytest.approx(value, rel=0.01 if what == "prune_layers" else 0.005)
