import json

import pytest

from sparsessm.metrics.published import TABLES, dense_warning, published_dense

MEASURED = {"seqlen": 2048, "all_windows": True}


@pytest.mark.parametrize("name", ["mamba-130m", "state-spaces/mamba-130m", "state-spaces/mamba-130m-hf", "x/mamba-130m-hf/"])
def test_a_model_is_known_by_its_name(name):
    assert published_dense(name, "wikitext2") == 20.6
    assert published_dense(name, "ptb") == 32.75
    assert published_dense(name, "c4") == 25.66


def test_mamba2_is_known_by_the_table_that_has_it():
    assert published_dense("state-spaces/mamba2-370m", "wikitext2") == 14.17
    assert published_dense("mamba2-780m", "c4") == 16.46


@pytest.mark.parametrize(("model", "dataset"), [("demo", "wikitext2"), ("mamba-130m", "demo"), ("mamba-9b", "ptb")])
def test_others_are_not_known(model, dataset):
    assert published_dense(model, dataset) is None
    assert dense_warning(model, dataset, 1e9, **MEASURED) is None


def test_every_model_of_the_tables_has_three_figures():
    rows = json.loads(TABLES.read_text())["tables"]["ssm_50"]["rows"]
    assert {"mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b"} <= set(rows)
    for name in rows:
        for dataset in ("wikitext2", "ptb", "c4"):
            assert published_dense(name, dataset) == rows[name]["dense"][dataset]


@pytest.mark.parametrize(
    ("factor", "warns"), [(1.0, False), (1.0099, False), (0.9901, False), (1.0101, True), (0.9899, True)]
)
def test_one_percent_is_the_limit(factor, warns):
    assert (dense_warning("mamba-130m", "wikitext2", 20.6 * factor, **MEASURED) is not None) == warns


def test_the_warning_gives_both_figures_and_likely_causes():
    text = dense_warning("state-spaces/mamba-130m-hf", "wikitext2", 22.66, **MEASURED)
    for part in ("state-spaces/mamba-130m-hf", "wikitext2", "22.66", "20.60", "+10.0%", "datasets", "tokenizer", "--dtype"):
        assert part in text
    assert "\n" not in text


def test_only_the_tables_window_length_over_the_whole_text_is_compared():
    assert dense_warning("mamba-130m", "wikitext2", 99.0, seqlen=1024, all_windows=True) is None
    assert dense_warning("mamba-130m", "wikitext2", 99.0, seqlen=2048, all_windows=False) is None
