"""Texts with holes, marks and broken side files: read as a person would, or named in one line."""

import json

import pytest
import torch

from sparsessm.corpora.text import (
    calibration_windows,
    check_dataset,
    evaluation_stream,
)
from sparsessm.errors import InputError

SENTENCE = "The state of the model goes on from one step to the next and forgets a little. "


def rows(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize("dataset", ["wikitext2", "ptb", "c4"])
def test_rows_of_null_are_left_out_and_said(tmp_path, tokenizer, private_cache, caplog, dataset):
    key = "text" if dataset != "ptb" else "sentence"
    for name, texts in (("with", [SENTENCE * 4, None, SENTENCE * 3]), ("without", [SENTENCE * 4, SENTENCE * 3])):
        for split in ("train", "test", "validation"):
            rows(tmp_path / name / dataset / f"{split}.jsonl", texts)
            file = tmp_path / name / dataset / f"{split}.jsonl"
            file.write_text(file.read_text().replace('"text"', f'"{key}"'))
    seen = []
    for name in ("with", "without"):
        with caplog.at_level("WARNING", logger="sparsessm"):
            stream = evaluation_stream(dataset, tokenizer, 8, tmp_path / name)
            calibration_windows(dataset, tokenizer, 5, 8, 0, tmp_path / name)
        seen.append(stream)
    assert torch.equal(seen[0].ids, seen[1].ids)
    assert "1 of 3 rows hold no text (null) and are left out" in caplog.text


def test_a_column_of_numbers_is_named(tmp_path, tokenizer, private_cache):
    rows(tmp_path / "wikitext2" / "test.jsonl", [1, 2, 3])
    with pytest.raises(InputError, match="the column text holds int64, not text"):
        evaluation_stream("wikitext2", tokenizer, 4, tmp_path)


@pytest.mark.parametrize("dataset", ["wikitext2", "ptb", "folder"])
def test_a_byte_order_mark_is_not_text(tmp_path, tokenizer, dataset):
    seen = []
    for coding in ("utf-8", "utf-8-sig"):
        folder = tmp_path / coding / dataset
        folder.mkdir(parents=True)
        (folder / "test.txt").write_text(SENTENCE * 4 + "\n", encoding=coding)
        name, data_dir = (str(folder), None) if dataset == "folder" else (dataset, tmp_path / coding)
        seen.append(evaluation_stream(name, tokenizer, 8, data_dir).ids)
    assert torch.equal(*seen)


@pytest.mark.parametrize("state", ["", "{", "[]", "3", "[" * 5000])
def test_an_invalid_state_json_is_named(tmp_path, state):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "state.json").write_text(state)
    with pytest.raises(InputError, match=r"state.json cannot be read"):
        check_dataset("wikitext2", tmp_path, calibration=False)


def test_a_home_sign_means_the_home_folder(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data" / "wikitext2").mkdir(parents=True)
    (tmp_path / "data" / "wikitext2" / "test.txt").write_text(SENTENCE * 4)
    assert len(evaluation_stream("wikitext2", tokenizer, 8, "~/data").ids) > 8
    with pytest.raises(InputError, match=r"--data_dir .*other: there is no such folder"):
        check_dataset("wikitext2", "~/other", calibration=False)
