"""The model card of a saved folder: what it says, whose licence it names, and that a card of somebody's stays."""

import shlex

import pytest
from huggingface_hub.repocard import metadata_load

import sparsessm
from sparsessm import files
from sparsessm.commandline import parse
from sparsessm.models.card import Facts, Origin, card_text, is_own_card, origin_of
from sparsessm.models.saving import rewrite_card

SMALL = ["--seqlen", "64", "--nsamples", "4", "--eval_windows", "2"]
PRUNE = [*SMALL, "--method", "magnitude", "--prune_A", "--sparsity", "0.5"]

pytestmark = pytest.mark.usefixtures("tokenised_once")


def front(folder, *lines):
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", "", "# A model", ""]))
    return folder


def test_a_card_says_what_was_pruned_how_and_with_what_result(run_main, tiny_checkpoint, text_folder, tmp_path):
    base = front(tiny_checkpoint("base"), "license: other", "license_name: theirs", "base_model: them/theirs", "x: [1]")
    done = run_main([base, text_folder, *PRUNE, "--seed", "3", "--eval_dense", "--save", tmp_path / "out"])
    assert done.code == 0, done.stderr
    card = tmp_path / "out" / "README.md"
    assert metadata_load(card) == {
        "base_model": "them/theirs", "license": "other", "license_name": "theirs", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["mamba", "pruned", "sparse", "sparsessm"],
    }  # fmt: skip
    text, name = card.read_text(), text_folder.name
    before, now = done.metrics["dense_perplexity"][str(text_folder)], done.metrics["perplexity"][str(text_folder)]
    for line in (
        "# base, pruned", "| method | `magnitude` |", f"| calibration | 4 windows of 64 tokens: {name}, seed 3 |",
        "| transitions A_log | 50.00% |", f"| {name} | {before:.2f} | {now:.2f} |",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert str(tmp_path) not in text and str(text_folder) not in text
    (command,) = [line for line in text.splitlines() if line.startswith("python main.py ")]
    chosen, _ = parse(["base", name, *PRUNE, "--seed", "3", "--eval_dense"])
    assert parse(shlex.split(command)[2:])[0].settings == chosen.settings


@pytest.mark.parametrize(
    ("lines", "licence"),
    [(["license: mit", "license_link: LICENSE"], {"license": "mit", "license_link": "LICENSE"}), (["license:"], {}),
     (["license: [a", "b"], {}), (["- a list"], {})],
)  # fmt: skip
def test_the_licence_is_what_the_models_own_card_says(tmp_path, lines, licence):
    assert origin_of("org/model", front(tmp_path, *lines)) == Origin("org/model", "org/model", licence)
    assert origin_of(str(tmp_path), tmp_path) == Origin(tmp_path.name, None, licence)


def test_without_a_card_nothing_is_said_of_a_licence(tmp_path):
    assert origin_of("demo", tmp_path) == Origin("demo")
    assert origin_of("", tmp_path) == Origin()
    assert "license" not in card_text({}, Facts(Origin("org/model", "org/model")), "mamba", "hf")


def test_in_python_as_well_and_pruned_again_both_methods_and_the_base_are_named(tiny_checkpoint, tiny_windows, tmp_path):
    base = front(tiny_checkpoint("base"), "license: mit", "base_model: them/theirs")
    model, tokenizer = sparsessm.load(str(base))
    result = sparsessm.prune(model, tiny_windows(), "magnitude", sparsity=0.25)
    once = sparsessm.save(model, tokenizer, tmp_path / "once", result)
    model, tokenizer = sparsessm.load(str(once))
    sparsessm.prune(model, tiny_windows(), "sparsessm", sparsity=0.5)
    twice = sparsessm.save(model, tokenizer, tmp_path / "twice")  # what was pruned is known without a result
    for folder in (once, twice):
        data = metadata_load(folder / "README.md")
        assert (data["base_model"], data["license"]) == ("them/theirs", "mit")
    text = (twice / "README.md").read_text()
    assert "| method | `sparsessm` |" in text
    assert "It was pruned before by `magnitude`; that counts below." in text and "| transitions A_log | 50.00% |" in text
    assert (twice / "masks.safetensors").is_file() and "own windows" in text


def test_the_state_spaces_layout_names_its_own_library(tmp_path):
    out = sparsessm.save(*sparsessm.load("demo"), tmp_path / "out", layout="state-spaces")
    assert metadata_load(out / "README.md")["library_name"] == "mamba-ssm"
    text = (out / "README.md").read_text()
    assert "MambaLMHeadModel.from_pretrained" in text and "# demo\n" in text and "pruned" not in text


@pytest.mark.parametrize("exchanged", [True, False])
def test_with_overwrite_only_a_card_of_ours_is_replaced(
    run_main, tiny_checkpoint, text_folder, tmp_path, monkeypatch, exchanged
):
    if not exchanged:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    base, out = tiny_checkpoint("base"), tmp_path / "out"
    card = out / "README.md"

    def save(*argv):
        done = run_main([base, text_folder, *PRUNE, "--save", out, *argv])
        assert done.code == 0, done.stderr
        return "README.md was written or edited by hand: it stays" in done.stderr

    assert not save()
    first = card.read_text()
    assert is_own_card(card)
    assert not save("--overwrite", "--seed", "1")
    second = card.read_text()
    assert second != first and "seed 1" in second
    card.write_text(second.replace("pruned in one shot", "pruned with care"))
    edited = card.read_text()
    assert save("--overwrite", "--seed", "2") and card.read_text() == edited
    card.write_text("# Mine\n")
    assert save("--overwrite", "--seed", "3") and card.read_text() == "# Mine\n"
    assert '"seed": 3' in (out / "sparsessm.json").read_text()


def test_accuracies_reach_a_card_that_is_ours(tmp_path):
    card = tmp_path / "README.md"
    record = {"sparsity": {"ssm": 0.5}}
    card.write_text(card_text(record, Facts(), "mamba", "hf"))
    found = {"piqa": {"metric": "acc_norm", "value": 0.61234, "stderr": 0.0101, "documents": 9},
             "mean": {"value": 0.61234, "stderr": None}}  # fmt: skip
    rewrite_card(tmp_path, record, Facts(zero_shot=found), "mamba", "hf")
    lines = card.read_text().splitlines()
    assert "| piqa | acc_norm | 0.6123 | 0.0101 |" in lines and "| mean |  | 0.6123 | – |" in lines and is_own_card(card)
    card.write_text("# Mine\n")
    rewrite_card(tmp_path, record, Facts(zero_shot=found), "mamba", "hf")
    assert card.read_text() == "# Mine\n"
