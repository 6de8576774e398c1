"""text.py: joins, window starts, local layouts and complaints, each against values worked out by hand.

The tokenizer of the demo checkpoint is byte-level and adds no special tokens, so decoding ids gives the text back to
the byte: what was joined can be read off the stream.
"""

import gzip
import hashlib
import json
import random
import struct
import sys
from pathlib import Path

import pytest
import torch

from sparsessm.corpora import sources
from sparsessm.corpora.text import (
    calibration_windows,
    check_dataset,
    cut_windows,
    evaluation_stream,
)
from sparsessm.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"

# Five lines: blank, blank but for spaces, and a last one without a newline.
LINES = " \n = Title = \n   \n First line . \n Last line ."
CALIBRATION = "  = Title = \n   First line . \n  Last line ."  # ["", " = Title = \n", "", " First line . \n", ...]
EVALUATION = "\n\n = Title = \n\n\n\n\n First line . \n\n\n Last line ."
SENTENCES = ["no it was n't black monday", "the market rose", "prices fell"]


def sha256(ids: list[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).hexdigest()


def write_gzipped_json(path: Path, documents: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document, "url": ""}) + "\n" for document in documents)


def test_folder_joins_and_draws_by_wikitext2s_rule(tmp_path, tokenizer):
    (tmp_path / "train.txt").write_text(LINES)
    (tmp_path / "valid.txt").write_text("not this one")
    (tmp_path / "test.txt").write_text(LINES)

    stream = evaluation_stream(str(tmp_path), tokenizer, 4)
    assert tokenizer.decode(stream.ids) == EVALUATION
    assert stream.ids.dtype == torch.int64
    assert stream.sha256 == sha256(tokenizer(EVALUATION)["input_ids"])
    assert "5 lines" in stream.source and "test.txt" in stream.source

    ids = tokenizer(CALIBRATION)["input_ids"]
    rng = random.Random(7)
    starts = [rng.randint(0, len(ids) - 4 - 1) for _ in range(6)]
    windows = calibration_windows(str(tmp_path), tokenizer, nsamples=6, seqlen=4, seed=7)
    assert windows.ids.tolist() == [ids[start : start + 4] for start in starts]
    assert windows.sha256 == sha256(ids)  # of the stream: the same text under any seed and seqlen
    assert calibration_windows(str(tmp_path), tokenizer, 2, 5, seed=8).sha256 == windows.sha256


def test_the_draw_ignores_what_was_drawn_before(tmp_path, tokenizer):
    (tmp_path / "train.txt").write_text(LINES * 3)
    random.seed(1)
    first = calibration_windows(str(tmp_path), tokenizer, 3, 4, seed=0)
    random.seed(2)
    again = calibration_windows(str(tmp_path), tokenizer, 5, 4, seed=0)
    assert torch.equal(first.ids, again.ids[:3])
    assert not torch.equal(first.ids, calibration_windows(str(tmp_path), tokenizer, 3, 4, seed=1).ids)


def test_valid_stands_in_for_train(tmp_path, tokenizer):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "valid.txt").write_text(LINES)
    folder = calibration_windows(str(tmp_path / "wikitext2"), tokenizer, 2, 4, seed=0)
    local = calibration_windows("wikitext2", tokenizer, 2, 4, seed=0, data_dir=tmp_path)
    assert torch.equal(folder.ids, local.ids)
    assert local.sha256 == folder.sha256 == sha256(tokenizer(CALIBRATION)["input_ids"])
    assert "validation" in local.source


def test_ptb_lines_are_stripped_and_joined_by_spaces(tmp_path, tokenizer):
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "test.txt").write_text("".join(f" {sentence} \n" for sentence in SENTENCES))
    stream = evaluation_stream("ptb", tokenizer, 4, data_dir=tmp_path)
    assert tokenizer.decode(stream.ids) == "no it was n't black monday the market rose prices fell"


@pytest.mark.parametrize("column", ["sentence", "text"])
def test_ptb_from_parquet(tmp_path, tokenizer, private_cache, column):
    from datasets import Dataset

    table = Dataset.from_dict({"number": [1, 2, 3], column: [f" {sentence} " for sentence in SENTENCES]})
    table.to_parquet(tmp_path / "ptb_test-00000.parquet")
    table.to_parquet(tmp_path / "wikitext-test.parquet")  # of another set: in the same folder, but not to be read
    stream = evaluation_stream("ptb", tokenizer, 4, data_dir=tmp_path)
    assert tokenizer.decode(stream.ids) == " ".join(SENTENCES)
    assert "3 lines" in stream.source


def test_a_table_without_the_column(tmp_path, tokenizer, private_cache):
    (tmp_path / "test.jsonl").write_text('{"body": "some text"}\n')
    with pytest.raises(InputError, match="has the columns body: wikitext2 needs text"):
        evaluation_stream("wikitext2", tokenizer, 4, data_dir=tmp_path)


def test_save_to_disk(tmp_path, tokenizer, private_cache):
    from datasets import Dataset, DatasetDict, Split

    rows = ["", " = Title = \n", "", " First line . \n", " Last line ."]
    DatasetDict(
        train=Dataset.from_dict({"text": rows}), validation=Dataset.from_dict({"text": ["no"]})
    ).save_to_disk(tmp_path / "wikitext2")
    Dataset.from_dict({"text": rows}, split=Split.TEST).save_to_disk(tmp_path / "single")
    windows = calibration_windows("wikitext2", tokenizer, 2, 4, seed=0, data_dir=tmp_path)
    assert windows.sha256 == sha256(tokenizer(CALIBRATION)["input_ids"])
    stream = evaluation_stream("wikitext2", tokenizer, 4, data_dir=tmp_path / "single")
    assert tokenizer.decode(stream.ids) == EVALUATION
    with pytest.raises(InputError, match="no train or validation split"):
        check_dataset("wikitext2", tmp_path / "single", calibration=True)


def test_c4_draws_documents_then_windows(tmp_path, tokenizer, private_cache):
    documents = ["short", "one two three four five six seven eight nine ten", "tiny", " ".join("abcdefghijklmnop")]
    (tmp_path / "c4").mkdir()
    write_gzipped_json(tmp_path / "c4" / "c4-train.00000-of-01024.json.gz", documents)
    ids = [tokenizer(document)["input_ids"] for document in documents]
    assert [len(each) > 8 for each in ids] == [False, True, False, True]

    rng, expected = random.Random(3), []
    while len(expected) < 10:
        document = ids[rng.randint(0, 3)]
        if len(document) > 8:
            start = rng.randint(0, len(document) - 8 - 1)
            expected.append(document[start : start + 8])
    windows = calibration_windows("c4", tokenizer, nsamples=10, seqlen=8, seed=3, data_dir=tmp_path)
    assert windows.ids.tolist() == expected
    assert windows.sha256 == sha256([token for window in expected for token in window])
    assert "4 documents" in windows.source


def test_c4_ends_when_no_document_is_long_enough(tmp_path, tokenizer, private_cache):
    exactly = len(tokenizer("one two three")["input_ids"])  # as long as a window is not longer than it
    write_gzipped_json(tmp_path / "train.json.gz", ["one", "one two three", "one two"])
    with pytest.raises(InputError, match=f"the longest has {exactly} tokens.*--seqlen must be smaller"):
        calibration_windows("c4", tokenizer, nsamples=1, seqlen=exactly, seed=0, data_dir=tmp_path)


def test_c4_evaluation_takes_1100_documents_and_256_windows(tmp_path, tokenizer, private_cache):
    write_gzipped_json(tmp_path / "c4-validation.00000-of-00008.json.gz", [f"d{i}" for i in range(1105)])
    ids = tokenizer(" ".join(f"d{i}" for i in range(1100)))["input_ids"]
    assert evaluation_stream("c4", tokenizer, 2, data_dir=tmp_path).ids.tolist() == ids[: 256 * 2]
    long = evaluation_stream("c4", tokenizer, 1000, data_dir=tmp_path)
    assert long.ids.tolist() == ids and len(ids) < 256 * 1000
    assert long.sha256 == sha256(ids)
    assert "of these the first 1100" in long.source


def test_special_tokens_are_the_tokenizers_default_once(tmp_path):
    """A tokenizer that puts a token in front puts it in front of the stream, not of every line or window."""

    def tokenizer(text, **options):
        return {"input_ids": [0, *text.encode()]}

    (tmp_path / "test.txt").write_text("a\n\nb\n")
    assert evaluation_stream(str(tmp_path), tokenizer, 3).ids.tolist() == [0, *b"a\n\n\n\n\nb\n"]


def test_no_warning_about_the_models_length(tmp_path, tokenizer, monkeypatch, caplog):
    from transformers.utils import logging

    monkeypatch.setattr(tokenizer, "model_max_length", 4)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()  # the command may have silenced it
    (tmp_path / "test.txt").write_text(LINES)
    evaluation_stream(str(tmp_path), tokenizer, 4)
    assert "longer than" not in caplog.text
    tokenizer(LINES, verbose=True)
    assert "longer than" in caplog.text  # the warning was there to be silenced
    logging.set_verbosity(verbosity)


def test_cut_windows():
    ids = torch.arange(11)
    assert cut_windows(ids, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut_windows(ids, 3, limit=2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cut_windows(ids, 11, limit=5).tolist() == [list(range(11))]
    with pytest.raises(InputError, match="11 tokens, too few for a window of 12: --seqlen must be smaller"):
        cut_windows(ids, 12)


def test_a_text_too_short_is_named_with_its_length(tmp_path, tokenizer):
    for file in ("train.txt", "test.txt"):
        (tmp_path / file).write_text("one two three")
    count = len(tokenizer("one two three")["input_ids"])
    assert len(evaluation_stream(str(tmp_path), tokenizer, count).ids) == count
    with pytest.raises(InputError, match=f"{count} tokens, too few for a window of {count + 1}"):
        evaluation_stream(str(tmp_path), tokenizer, count + 1)
    # randint(0, T - seqlen - 1) needs one token more than the window.
    assert calibration_windows(str(tmp_path), tokenizer, 1, count - 1, seed=0).ids.shape == (1, count - 1)
    with pytest.raises(InputError, match=f"{count} tokens, too few for a window of {count}"):
        calibration_windows(str(tmp_path), tokenizer, 1, count, seed=0)


def test_what_check_dataset_refuses(tmp_path):
    check_dataset("demo", calibration=True)
    with pytest.raises(InputError, match="no such folder"):
        check_dataset("wikitext2", tmp_path / "absent", calibration=False)
    with pytest.raises(InputError, match=r"put train.txt or valid.txt there"):
        check_dataset(str(tmp_path), calibration=True)
    (tmp_path / "train.txt").write_text(LINES)
    check_dataset(str(tmp_path), calibration=True)
    with pytest.raises(InputError, match=r"put test.txt there, or name its split, as .*::train"):
        check_dataset(str(tmp_path), calibration=False)
    with pytest.raises(InputError, match=r"no validation split of c4 .*parquet, json, jsonl, json.gz or csv files"):
        check_dataset("c4", tmp_path, calibration=False)
    (tmp_path / "latest.json").write_text("{}")  # "test" must be a word of the name
    with pytest.raises(InputError, match=r"no test split of ptb .*looked for test.txt"):
        check_dataset("ptb", tmp_path, calibration=False)


def test_datasets_is_named_only_where_it_is_needed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install datasets"):
        check_dataset("c4", calibration=True)
    (tmp_path / "test.txt").write_text(LINES)
    assert tokenizer.decode(evaluation_stream("wikitext2", tokenizer, 4, tmp_path).ids) == EVALUATION


def test_the_hub(tokenizer, monkeypatch, private_cache):
    """What is asked of the hub, PTB's second way, and what is said when neither works."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        if arguments == ("parquet",):
            return datasets.Dataset.from_dict({"sentence": SENTENCES})
        raise RuntimeError("Dataset scripts are no longer supported\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = evaluation_stream("ptb", tokenizer, 4)
    assert tokenizer.decode(stream.ids) == " ".join(SENTENCES)
    file = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/test/0000.parquet"
    assert asked == [
        (("ptb-text-only/ptb_text_only",), {"revision": "refs/convert/parquet", "split": "test"}),
        (("parquet",), {"data_files": {"train": file}, "split": "train"}),
    ]
    assert stream.source == f"ptb test: 3 lines of the hub's {file}"

    with pytest.raises(InputError) as failure:
        calibration_windows("wikitext2", tokenizer, 1, 4, seed=0)
    assert asked[-1] == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"})
    assert str(failure.value) == (
        "cannot load wikitext2 from the hub (Dataset scripts are no longer supported): "
        "--data_dir reads a local copy instead"
    )
    for calibration, name in ((True, "train.00000-of-01024"), (False, "validation.00000-of-00008")):
        with pytest.raises(InputError, match=r"cannot load c4 from the hub \(Dataset scripts are no longer supported\)"):
            calibration_windows("c4", tokenizer, 1, 4, 0) if calibration else evaluation_stream("c4", tokenizer, 4)
        file = f"hf://datasets/allenai/c4/en/c4-{name}.json.gz"
        assert asked[-1] == (("json",), {"data_files": {"train": file}, "split": "train", "streaming": True})


def test_a_broken_table(tmp_path, tokenizer, private_cache):
    (tmp_path / "test.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"cannot read .*test.parquet") as failure:
        evaluation_stream("ptb", tokenizer, 4, data_dir=tmp_path)
    assert "\n" not in str(failure.value)


def test_text_that_is_not_utf8(tmp_path, tokenizer):
    (tmp_path / "test.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"test.txt is not UTF-8"):
        evaluation_stream(str(tmp_path), tokenizer, 4)


# The text `demo` never changes: figures measured with it hold for every version of Python.
DEMO = {
    "train": "7788784f93a19d4a1a78abfe6f6aa841fff4e3e23ea89db46b6f0f85f490577f",
    "test": "ce694e6ee3d170859622c76465caa5fc73597727882e054b2ec3f9b7cd654afe",
}


def test_demo_gives_the_same_tokens_for_good(tokenizer):
    stream = evaluation_stream("demo", tokenizer, 512)
    assert len(cut_windows(stream.ids, 512)) > 64
    text = (REPOSITORY / "data" / "demo-text" / "train.txt").read_bytes().decode()
    ids = tokenizer(text)["input_ids"]
    rng = random.Random(0)
    starts = [rng.randint(0, len(ids) - 512 - 1) for _ in range(3)]
    windows = calibration_windows("demo", tokenizer, 3, 512, seed=0)
    assert windows.ids.tolist() == [ids[start : start + 512] for start in starts]
    assert {"train": windows.sha256, "test": stream.sha256} == DEMO
    assert windows.text_sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_demo_without_its_files_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_TEXT", tmp_path)
    with pytest.raises(InputError, match="the text demo comes with a clone of the repository"):
        check_dataset("demo", calibration=True)


@pytest.mark.skipif(
    not (SHARED / "data" / "wikitext2").is_dir(), reason="no ../shared/data/wikitext2 beside this checkout"
)
def test_wikitext2_as_released(tokenizer):
    stream = evaluation_stream("wikitext2", tokenizer, 512, data_dir=SHARED / "data")
    assert "4358 lines" in stream.source  # the rows the hub's test split has
    text = tokenizer.decode(stream.ids)
    assert text.startswith("\n\n = Robert <unk> = \n\n\n\n\n Robert <unk> is an English film")
    folder = evaluation_stream(str(SHARED / "data" / "wikitext2"), tokenizer, 512)
    assert folder.sha256 == stream.sha256
