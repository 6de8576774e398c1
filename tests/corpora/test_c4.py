"""C4 streamed from the hub gives the published draw. The shards are small files here."""

import gzip
import json
import random

import pytest

from sparsessm.corpora import c4
from sparsessm.corpora.text import calibration_windows, evaluation_stream
from sparsessm.errors import InputError

DOCUMENTS = 1500


@pytest.fixture
def shards(tmp_path, monkeypatch, private_cache):
    """The files of both splits; nine in ten documents are shorter than 40 tokens."""
    draw = random.Random(0)
    files = {}
    for split in ("train", "validation"):
        files[split] = str(tmp_path / f"c4-{split}.json.gz")
        with gzip.open(files[split], "wt") as file:
            for number in range(DOCUMENTS):
                length = draw.choice([5] * 9 + [120])
                words = " ".join(f"{number} {draw.choice('abcdefg')}" for _ in range(length))
                file.write(json.dumps({"text": words, "url": ""}) + "\n")
    monkeypatch.setattr(c4, "FILES", files)
    monkeypatch.setattr(c4, "TRAIN_DOCUMENTS", DOCUMENTS)
    return tmp_path


@pytest.mark.parametrize("seed", [0, 5])
def test_candidates_hold_whatever_the_draw_asks_for(seed):
    for documents in (1, 2, 300, 356317):
        known = c4.candidates(seed, documents, 2000)
        rng, other = random.Random(seed), random.Random(9)
        for _ in range(300):
            assert rng.randint(0, documents - 1) in known
            if other.random() < 0.3:
                rng.randint(0, other.choice([0, 1, 77, 5000, 2**31]))  # the start of a window
    assert len(c4.candidates(seed, 356317, c4.WORDS)) < 23_000


@pytest.mark.parametrize(("words", "whole"), [(400, False), (60, True)])
def test_the_stream_gives_the_published_draw(shards, tokenizer, monkeypatch, words, whole):
    import datasets

    monkeypatch.setattr(c4, "WORDS", words)
    loaded, load = [], datasets.load_dataset

    def counted(*given, **options):
        loaded.append(options.get("streaming"))
        return load(*given, **options)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    streamed = calibration_windows("c4", tokenizer, 8, 40, 3)
    assert loaded == [True, None] if whole else [True]
    local = calibration_windows("c4", tokenizer, 8, 40, 3, data_dir=shards)
    assert streamed.ids.tolist() == local.ids.tolist()
    assert (streamed.sha256, streamed.text_sha256) == (local.sha256, local.text_sha256)
    calibration_windows("c4", tokenizer, 8, 40, 3)
    assert loaded.count(True) == 1  # what was kept serves the next run


def test_the_evaluation_fetches_the_first_documents_only(shards, tokenizer):
    streamed = evaluation_stream("c4", tokenizer, 40)
    local = evaluation_stream("c4", tokenizer, 40, data_dir=shards)
    assert (streamed.sha256, streamed.text_sha256) == (local.sha256, local.text_sha256)
    assert streamed.source.startswith("c4 validation: the first 1100 documents of the hub's")


def test_another_shard_than_the_published_one_is_refused(shards, tokenizer, monkeypatch):
    monkeypatch.setattr(c4, "TRAIN_DOCUMENTS", DOCUMENTS + 1)
    with pytest.raises(InputError, match=r"cannot load c4 from the hub \(it has 1500 documents instead of 1501\)"):
        calibration_windows("c4", tokenizer, 8, 40, 3)
