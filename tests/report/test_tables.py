"""Rows, figures and tables as text."""

import math

import pytest

from sparsessm.commandline import parse
from sparsessm.report import tables
from sparsessm.report.tables import Figure

METRICS = {
    "sparsity": {"ssm": 0.5, "layers": 0.0}, "perplexity": {"/a/news": 69.06, "/b/news": None},
    "dense_perplexity": {"/a/news": 67.68}, "zero_shot": {}, "seconds": {"load": 1.0, "prune": 2.5},
    "peak_memory_bytes": {"process": 2**30},
}  # fmt: skip


def options(*argv):
    return parse(["demo", "demo", *argv])[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "sparsessm"),
        (["--aggregate", "sum", "--seed", "1", "--nsamples", "4", "--dtype", "float32"], "sparsessm, seed 1, aggregate sum"),
        (["--saliency", "transition", "--raw_zeros"], "sparsessm, saliency transition, raw_zeros"),
        (["--parts", "mixer", "mlp"], "sparsessm, parts mixer mlp"),
    ],
)
def test_a_variant_of_a_method_says_what_it_changes(argv, said):
    assert tables.variant(options("--method", "sparsessm", "--prune_A", "--sparsity", "0.5", *argv)) == said


def test_the_row_of_a_run():
    row = tables.row(options("--method", "sparsessm", "--prune_A", "--sparsity", "0.5", "--aggregate", "sum"), METRICS)
    assert row == {
        "method": "sparsessm, aggregate sum", "sparsity": "ssm 50.0%", "perplexity a/news": "69.06 (+1.38)",
        "perplexity b/news": "inf", "dense a/news": "67.68", "seconds": "3.5", "memory": "1024 MiB process",
    }  # fmt: skip
    assert tables.row(options(), METRICS)["method"] == "pruned before"
    assert tables.row(options(), METRICS | {"sparsity": {"ssm": 0, "layers": 0}})["method"] == "dense"


def test_a_figure_over_seeds():
    figure = Figure((27.0, 28.0, 30.0), published=27.7, dense=30.0)
    assert figure.text == "28.33 ± 1.53 (-1.67)" and figure.over(figure.published) == pytest.approx(0.6333, abs=1e-4)
    assert Figure((1.0, math.inf), dense=2.0).text == "inf (+inf)"
    assert Figure((math.inf,), dense=math.inf).text == "inf"  # no difference can be said
    assert Figure(()).text == tables.NOTHING
