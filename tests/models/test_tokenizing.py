"""The tokenizer is the one that AutoTokenizer takes from the folder, it fits, and nothing else serves in silence."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from sparsessm.errors import InputError
from sparsessm.models import checkpoint
from sparsessm.models.tokenizing import load_tokenizer, tokenizer_sha256


def complaint(folder) -> str:
    with pytest.raises(InputError) as caught:
        load_tokenizer(checkpoint.find(str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_model(demo_dir, change) -> str:
    content = json.loads((demo_dir / "tokenizer.json").read_text())
    change(content)
    return json.dumps(content)


BROKEN = {
    "empty": lambda demo: "",
    "no values": lambda demo: "{}",
    "a list": lambda demo: "[]",
    "half a file": lambda demo: (demo / "tokenizer.json").read_text()[:5000],
    "deep": lambda demo: "[" * 5000,
    "another format": lambda demo: json.dumps({"vocab": {"a": 0}, "merges": []}),
    "negative ids": lambda demo: with_model(demo, lambda c: c["model"]["vocab"].update({"qqq": -5})),
    "ids beyond the embedding": lambda demo: with_model(demo, lambda c: c["model"]["vocab"].update({"qqq": 4096})),
    "ids far beyond": lambda demo: with_model(demo, lambda c: c["model"]["vocab"].update({"qqq": 1 << 31})),
    "added ids beyond": lambda demo: with_model(
        demo, lambda c: c["added_tokens"].append({**c["added_tokens"][0], "id": 5000, "content": "<new>"})
    ),
    "words for ids": lambda demo: with_model(demo, lambda c: c["model"]["vocab"].update({"qqq": "one"})),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_tokenizer_json_that_is_invalid(tiny_checkpoint, demo_dir, case):
    folder = tiny_checkpoint()
    (folder / "tokenizer.json").write_text(BROKEN[case](demo_dir))
    assert "tokenizer" in complaint(folder)


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"added_tokens_decoder": 3}', '{"eos_token": {"a": [1]}}',
                                  '{"eos_token": 7}', '{"tokenizer_class": 5}',
                                  '{"extra_special_tokens": "x"}'])  # fmt: skip
def test_a_tokenizer_config_of_odd_types(tiny_checkpoint, text):
    folder = tiny_checkpoint()
    (folder / "tokenizer_config.json").write_text(text)
    assert "tokenizer" in complaint(folder)


def test_what_the_tokenizer_does_is_hashed(tiny_checkpoint, demo_dir):
    folder = tiny_checkpoint()
    hashes = [tokenizer_sha256(load_tokenizer(checkpoint.find(str(folder))))]
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    hashes.append(tokenizer_sha256(load_tokenizer(checkpoint.find(str(folder)))))
    assert hashes[0] == tokenizer_sha256(AutoTokenizer.from_pretrained(demo_dir)) != hashes[1]


def test_a_hugging_face_folder_without_a_tokenizer_takes_nobody_elses(tiny_checkpoint):
    folder = tiny_checkpoint()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in complaint(folder)


def test_the_files_of_an_older_tokenizer_are_its_own(tiny_checkpoint, demo_dir):
    """vocab.json and merges.txt alone: what AutoTokenizer makes of them, or an error; never another model's."""
    folder = tiny_checkpoint()
    model = json.loads((demo_dir / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    text = "The state of the model goes on."
    try:
        expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    except Exception:
        assert complaint(folder)
        return
    assert load_tokenizer(checkpoint.find(str(folder)))(text)["input_ids"] == expected


def test_a_state_spaces_folder_says_whose_tokenizer_it_takes(tiny_checkpoint, caplog, monkeypatch, shared_dir):
    from sparsessm.models import tokenizing

    monkeypatch.setattr(tokenizing, "FALLBACK_TOKENIZER", str(shared_dir / "tokenizers" / "gpt-neox-20b"))
    folder = tiny_checkpoint(vocab_size=50280)
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {"d_state": 6, "dt_rank": 3}}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with caplog.at_level("INFO", logger="sparsessm"):
        assert len(load_tokenizer(checkpoint.find(str(folder)))) == 50277
    assert f"because {folder} has none" in caplog.text
    shutil.rmtree(folder)
