"""Files, folders and data sets of the hub by name. The hub is a folder here, in the form in which it keeps data sets."""

import gzip
import hashlib
import json
import os

import pytest

from sparsessm.corpora import reading, sources
from sparsessm.corpora.names import Name, parts_of, with_full_path
from sparsessm.corpora.text import calibration_windows, check_dataset, evaluation_stream
from sparsessm.errors import InputError

ROWS = ["The state decays slowly.", "It \"remembers\", a little.\nTwo lines.", "", "The last row."]
pytestmark = pytest.mark.usefixtures("private_cache")
ENDINGS = [ending for group in sources.KINDS.values() for ending in group if ending != ".txt"]


def write(path, rows, column="text", **others):
    """A table of the kind that the path's ending names."""
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {**others, column: rows}
    if path.suffix == ".parquet":
        Dataset.from_dict(columns).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_dict(columns).to_csv(path)
    else:
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        text = json.dumps(records) if path.name.split(".")[1] == "json" else lines
        (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)
    return path


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_single_table_serves_both_purposes(tmp_path, tokenizer, ending):
    rows = [row for row in ROWS if row] if ending == ".csv" else ROWS  # an empty cell of CSV is null
    name = str(write(tmp_path / f"my{ending}", rows, number=list(range(len(rows)))))
    for calibration in (True, False):
        check_dataset(name, calibration=calibration)
    stream = evaluation_stream(name, tokenizer, 4)
    assert tokenizer.decode(stream.ids) == "\n\n".join(rows)
    assert stream.source == f"file: {len(rows)} rows of {name}, column text"
    windows = calibration_windows(name, tokenizer, 3, 4, seed=0)
    ids = tokenizer(" ".join(rows))["input_ids"]
    assert any(windows.ids[0].tolist() == ids[start : start + 4] for start in range(len(ids)))
    assert windows.text_sha256 == stream.text_sha256 == sha256("\n".join(rows))
    assert windows.sha256 != stream.sha256


def test_words_that_stand_for_null_elsewhere_are_text_in_csv(tmp_path, tokenizer):
    rows = ["NA", "null", "None", "nan", "a sentence"]
    path = write(tmp_path / "wikitext2" / "test.csv", rows, number=[1, None, 3, 4, 5])
    for name, data_dir in ((str(path), None), ("wikitext2", tmp_path)):
        assert evaluation_stream(name, tokenizer, 4, data_dir).text_sha256 == sha256("\n".join(rows))
    check_dataset(f"{write(tmp_path / 'body.csv', rows, 'body', number=[1, None, 3, 4, 5])}", calibration=True)


def test_a_single_file_of_lines(tmp_path, tokenizer):
    (tmp_path / "my.txt").write_text("One line.\n \nAnother.\n")
    stream = evaluation_stream(str(tmp_path / "my.txt"), tokenizer, 4)
    assert tokenizer.decode(stream.ids) == "One line.\n\n\n\n\nAnother.\n"
    assert stream.text_sha256 == sha256("One line.\n\n\nAnother.\n")


def test_the_column_is_text_or_the_only_one_or_the_one_asked_for(tmp_path, tokenizer):
    only = write(tmp_path / "only.jsonl", ROWS, "body", number=[1, 2, 3, 4])
    assert "column body" in evaluation_stream(str(only), tokenizer, 4).source
    several = write(tmp_path / "several.jsonl", ROWS, "body", title=["a", "b", None, "c"])
    with pytest.raises(InputError, match=r"text in the columns title, body, and none is called text.*jsonl:::title"):
        check_dataset(str(several), calibration=True)
    with pytest.raises(InputError, match=r"text in the columns title, body, not boddy: choose one"):
        check_dataset(f"{several}:::boddy", calibration=True)
    check_dataset(f"{several}:::body", calibration=False)
    assert evaluation_stream(f"{several}:::body", tokenizer, 4).text_sha256 == sha256("\n".join(ROWS))
    numbers = write(tmp_path / "numbers.csv", [1, 2], "body")
    with pytest.raises(InputError, match=r"has the columns body, and none holds text"):
        check_dataset(str(numbers), calibration=True)


def test_a_column_that_stops_being_text_is_named(tmp_path, tokenizer):
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["a"] * 3) + '{"text": {"inner": "b"}}\n')
    with pytest.raises(InputError, match=r"mixed.jsonl"):
        evaluation_stream(str(path), tokenizer, 4)


def test_tables_are_read_up_to_a_size_that_is_said(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "long.jsonl", ["ten chars."] * 300)
    monkeypatch.setattr(reading, "MOST_CHARACTERS", 1995)
    stream = evaluation_stream(str(path), tokenizer, 4)
    assert stream.source.startswith("file: the first 200 rows of")
    assert tokenizer.decode(stream.ids) == "\n\n".join(["ten chars."] * 200)


def test_a_folder_of_splits(tmp_path, tokenizer):
    write(tmp_path / "train-00000-of-00002.parquet", ["one two three"])
    write(tmp_path / "train-00001-of-00002.parquet", ["four five six"])
    write(tmp_path / "valid.jsonl", ["seven eight nine"])
    (tmp_path / "README.md").write_text("not read")
    windows = calibration_windows(str(tmp_path), tokenizer, 1, 2, seed=0)
    assert windows.text_sha256 == sha256("one two three\nfour five six") and "and 1 more" in windows.source
    stream = evaluation_stream(str(tmp_path), tokenizer, 2)  # there is no test split
    assert tokenizer.decode(stream.ids) == "seven eight nine" and stream.source.startswith("folder validation: 1 rows")
    assert evaluation_stream(f"{tmp_path}::train", tokenizer, 2).text_sha256 == windows.text_sha256
    with pytest.raises(InputError, match=r"has no split dev: it has train, validation"):
        check_dataset(f"{tmp_path}::dev", calibration=False)


def test_a_folder_of_other_files_is_used_as_it_is(tmp_path, tokenizer):
    for name, text in (("b.txt", "of b.\n"), ("a.txt", "of a.\n")):
        (tmp_path / name).write_text(text)
    stream = evaluation_stream(str(tmp_path), tokenizer, 2)
    assert tokenizer.decode(stream.ids) == "of a.\n\n\nof b.\n" and stream.source.startswith("folder: 2 lines of")
    assert calibration_windows(str(tmp_path), tokenizer, 1, 2, seed=0).text_sha256 == stream.text_sha256
    with pytest.raises(InputError, match=r"no split train: its files are not named after splits"):
        check_dataset(f"{tmp_path}::train", calibration=True)
    write(tmp_path / "c.jsonl", ROWS)
    with pytest.raises(InputError, match=r"files of several kinds \(txt, json\): keep one kind"):
        check_dataset(str(tmp_path), calibration=True)


def test_folders_of_save_to_disk(tmp_path, tokenizer):
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_dict({"text": ROWS})).save_to_disk(tmp_path / "splits")
    Dataset.from_dict({"body": ROWS}).save_to_disk(tmp_path / "single")
    for folder in ("splits", "single"):
        windows = calibration_windows(str(tmp_path / folder), tokenizer, 1, 2, seed=0)
        assert windows.text_sha256 == sha256("\n".join(ROWS))
    check_dataset(str(tmp_path / "single"), calibration=False)
    with pytest.raises(InputError, match=r"splits has no text for evaluation: put test.txt there, or name its split"):
        check_dataset(str(tmp_path / "splits"), calibration=False)


@pytest.mark.parametrize(
    ("file", "content", "suffix", "said"),
    [
        ("my.txt", b"", "", r"my.txt is empty"),
        ("my.txt", b"caf\xe9", "", r"my.txt is not UTF-8"),
        ("my.txt", b"text", ":::text", r"my.txt is plain text, without the column text"),
        ("my.txt", b"text", "::train", r"is one file, without splits"),
        ("my.txt", b"text", ":en", r"is a file or folder, without configurations: write .*::SPLIT:COLUMN"),
        ("my.txt", b"text", "::::", r"expected NAME:CONFIG:SPLIT:COLUMN, got 5 parts"),
        ("my.pdf", b"text", "", r"my.pdf is no text that can be read here: give a .txt, .parquet, .*or .csv file"),
        ("my.jsonl", b"", "", r"my.jsonl is empty"),
        ("my.jsonl", b"{", "", r"cannot read .*my.jsonl .*is the file whole"),
        ("my.parquet", b"not parquet", "", r"cannot read .*my.parquet .*is the file whole"),
        ("my.json.gz", b"not gzip", "", r"cannot read .*my.json.gz .*is the file whole"),
        ("my.csv", b"\n", "", r"cannot read .*my.csv .*is the file whole"),
        ("my.csv", b"text\n", "", r"my.csv has no rows"),
    ],
)
def test_what_cannot_be_read_is_known_at_the_check(tmp_path, capfd, file, content, suffix, said):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=said) as failure:
        check_dataset(f"{tmp_path / file}{suffix}", calibration=True)
    assert "\n" not in str(failure.value) and capfd.readouterr() == ("", "")


def test_a_run_on_one_file_says_that_both_texts_are_one(tmp_path, run_main, text_folder):
    (tmp_path / "my.txt").write_text((text_folder / "train.txt").read_text())
    argv = ["demo", str(tmp_path / "my.txt"), "--seqlen", "64", "--nsamples", "2", "--eval_windows", "1"]
    outcome = run_main([*argv, "--method", "magnitude", "--prune_A", "--sparsity", "0.5"])
    told = [line for line in (outcome.folder / "output.log").read_text().splitlines() if "warning" in line]
    assert len(told) == 1 and f"calibrated on the text of evaluation {tmp_path}/my.txt" in told[0]
    assert len(set(outcome.metrics["text_sha256"].values())) == 1


def test_a_wrong_column_ends_the_command_before_a_run_begins(tmp_path, run_main):
    path = write(tmp_path / "my.csv", ROWS, "body")
    outcome = run_main(["demo", f"{path}:::text", "--base_dir", str(tmp_path / "runs")])
    assert outcome.code == 2 and not (tmp_path / "runs").exists()
    assert f"my.csv has text in the columns body, not text: choose one, as {path}:::body" in outcome.stderr


def test_rows_without_a_letter_are_no_text(tmp_path, tokenizer):
    path = write(tmp_path / "my.jsonl", ["", ""])
    with pytest.raises(InputError, match="the column text holds no text"):
        evaluation_stream(str(path), tokenizer, 4)


@pytest.mark.parametrize("name", ["", "/absent", "./absent", "~/absent", "absent.jsonl", "a/b/c"])
def test_what_is_neither_here_nor_an_id_is_not_asked_of_the_hub(name):
    with pytest.raises(InputError, match=r"unknown data set .*no such file or folder; give one of wikitext2, "):
        check_dataset(name, calibration=True)


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    (tmp_path / "c.csv").write_text("")
    assert parts_of("a:b") == Name("a:b")
    assert parts_of("allenai/c4:en::text") == Name("allenai/c4", "en", "", "text")
    assert str(parts_of("allenai/c4:en::")) == "allenai/c4:en"
    assert with_full_path("a:b") == os.path.join(tmp_path, "a:b")
    assert with_full_path("c.csv:::body") == os.path.join(tmp_path, "c.csv:::body")
    assert with_full_path("allenai/c4:en") == "allenai/c4:en"
    (tmp_path / "ptb").mkdir()
    assert with_full_path("ptb") == "ptb"
    with pytest.raises(InputError, match=r"ptb has a rule of its own: give it without :penn"):
        check_dataset("ptb:penn", calibration=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub: hub/OWNER/NAME holds files, and a README.md that lists configurations."""
    import datasets

    def here(function):
        return lambda name, *others, **options: function(
            str(tmp_path / name) if (tmp_path / name).is_dir() else name, *others, **options
        )

    for name in ("get_dataset_config_names", "get_dataset_default_config_name", "get_dataset_split_names", "load_dataset"):
        monkeypatch.setattr(datasets, name, here(getattr(datasets, name)))
    sources._splits_on_hub.cache_clear()
    for config in ("old", "new"):
        for split in ("train", "validation"):
            rows = [f"{config} {split} {number}" for number in range(300)]
            write(tmp_path / "someone/tales" / config / f"{split}.jsonl", rows, "tale")
    listed = "\n".join(
        f"- config_name: {config}\n  data_files:\n" + "\n".join(
            f"  - split: {split}\n    path: {config}/{split}.jsonl" for split in ("train", "validation")
        )
        for config in ("old", "new")
    )  # fmt: skip
    (tmp_path / "someone/tales/README.md").write_text(f"---\nconfigs:\n{listed}\n---\n")
    write(tmp_path / "plain" / "train.csv", ["one two", "three four"], title=["a", "b"])
    write(tmp_path / "plain" / "test.csv", ["five six", "seven eight"], title=["a", "b"])
    yield tmp_path
    sources._splits_on_hub.cache_clear()


def test_a_data_set_of_the_hub(hub, tokenizer):
    rows = [f"new train {i}" for i in range(300)]
    check_dataset("someone/tales:new", calibration=True)
    windows = calibration_windows("someone/tales:new", tokenizer, 2, 8, seed=0)
    assert windows.sha256 == calibration_windows("someone/tales:new", tokenizer, 3, 9, seed=1).sha256
    assert windows.text_sha256 == sha256("\n".join(rows))
    assert windows.source == "hub train: 300 rows of the hub's someone/tales:new, column tale"
    assert "new validation 0" in tokenizer.decode(evaluation_stream("someone/tales:new", tokenizer, 8).ids)
    assert "new train 0" in tokenizer.decode(evaluation_stream("someone/tales:new:train:tale", tokenizer, 8).ids)
    stream = evaluation_stream("plain", tokenizer, 2)
    assert tokenizer.decode(stream.ids) == "five six\n\nseven eight" and stream.source.startswith("hub test: 2 rows")
    assert evaluation_stream("plain:::title", tokenizer, 2).text_sha256 == sha256("a\nb")


def test_what_the_hub_does_not_have(hub, tokenizer):
    for name, said in {
        "someone/tales": r"has the configurations old, new, and no default: choose one, as someone/tales:old",
        "someone/tales:odd": r"has the configurations old, new, not odd: choose one",
        "someone/tales:old:tset": r"has the splits train, validation, not tset: choose one, as someone/tales:old:train",
        "nobody/nothing": r"no data set nobody/nothing was found, here or on the hub",
    }.items():
        with pytest.raises(InputError, match=said):
            check_dataset(name, calibration=True)
    with pytest.raises(InputError, match=r"text in the columns tale, not story: choose one, as someone/tales:old::tale"):
        calibration_windows("someone/tales:old::story", tokenizer, 1, 4, seed=0)
