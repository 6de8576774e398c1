"""The examples of docs/EXTENDING.md as they stand, and the made-up architecture by the command line."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsessm.models.architecture import Layout
from sparsessm.models.family import ARCHITECTURES
from sparsessm.procedure.rules import RULES
from sparsessm.pruning.methods import METHODS
from sparsessm.pruning.saliency import SALIENCIES

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "EXTENDING.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """What all examples of the page leave, run in their order; the tables are as before afterwards."""
    tables = [SALIENCIES, RULES, METHODS, ARCHITECTURES]
    before = [dict(table) for table in tables]
    scope: dict = {"__name__": "extending"}
    for block in BLOCKS:
        exec(compile(block, "docs/EXTENDING.md", "exec", dont_inherit=True), scope)
    yield scope
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def test_a_registered_saliency_chooses_by_its_scores(names):
    assert SALIENCIES["kept_norm"].score is names["kept_norm"]
    assert SALIENCIES["kept_norm"].needs == ("h2", "abar")


def test_a_new_weight_rule_keeps_the_largest_inputs(names):
    """The same columns of out_proj are gone for every row, half of them."""
    masks = names["sparsessm"].prune(names["sparsessm"].load("demo")[0], names["windows"], "inputs", parts=["weights"],
                                     module="out_proj", sparsity=0.5).masks  # fmt: skip
    assert set(masks) == {f"backbone.layers.{i}.mixer.out_proj.weight" for i in range(6)}
    for mask in masks.values():
        assert torch.equal(mask, mask[:1].expand_as(mask)) and int(mask[0].sum()) == 192


def test_a_new_architecture_is_one_row_and_one_mixer(names):
    assert names["model"].config.states == 4
    assert names["model"].stack[1].ssm.A_log.shape == (16, 4)
    assert int(names["result"].masks["stack.1.ssm.A_log"].sum()) == 16 * 4
    assert Layout(names["model"]).parts()["stack.1.ssm.select.weight"] == ("layers",)


@pytest.fixture
def checkpoint(names, tmp_path, demo_dir):
    torch.manual_seed(0)
    names["SteadyForCausalLM"](names["SteadyConfig"](vocab_size=4096)).save_pretrained(tmp_path / "in")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / file).write_bytes((demo_dir / file).read_bytes())
    return tmp_path / "in"


def whole(model, text_folder, *argv):
    return [model, text_folder, "--method", "sparsessm_obs", "--prune_A", "--prune_layers", "--sparsity", "0.5",
            "--seqlen", "48", "--nsamples", "4", *argv]  # fmt: skip


def test_the_command_prunes_and_saves_it(run_main, checkpoint, text_folder, tmp_path):
    outcome = run_main(whole(checkpoint, text_folder, "--save", tmp_path / "out"))
    assert outcome.code == 0, outcome.stderr
    assert outcome.metrics["sparsity"]["ssm"] == 0.5
    assert outcome.metrics["sparsity"]["layers"] == pytest.approx(0.5, abs=0.01)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    masks = load_file(tmp_path / "out" / "masks.safetensors")
    assert len(masks) == 2 * 4
    for name, mask in masks.items():
        gone = stock.get_parameter(name)[mask]
        assert (gone == (30 if name.endswith("A_log") else 0)).all()
    again = run_main([tmp_path / "out", text_folder, "--seqlen", "48"])
    assert again.code == 0, again.stderr
    assert again.metrics["perplexity"][str(text_folder)] == pytest.approx(
        outcome.metrics["perplexity"][str(text_folder)], rel=1e-6
    )
    assert again.metrics["sparsity"] == outcome.metrics["sparsity"]


def test_the_command_resumes_it(run_main, checkpoint, text_folder, tmp_path, monkeypatch):
    """Interrupted after the first layer, it resumes with the second and ends with the same bytes."""
    whole_run = run_main(whole(checkpoint, text_folder, "--save", tmp_path / "one"))
    assert whole_run.code == 0, whole_run.stderr
    from sparsessm.runs.journal import Journal

    store, stored = Journal.store, []

    def once(self, phase, layer, values, masks):
        store(self, phase, layer, values, masks)
        stored.append(layer)
        if len(stored) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "store", once)
    broken = run_main(whole(checkpoint, text_folder, "--save", tmp_path / "two"))
    assert broken.code == 130 and "--resume" in broken.stderr
    resumed = run_main(["--resume", broken.folder], base_dir=False)
    assert resumed.code == 0, resumed.stderr
    assert stored == [0, 1]
    for file in ("model.safetensors", "masks.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
