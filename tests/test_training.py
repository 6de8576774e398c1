"""Masks that hold in training: after every step, with any optimiser, in a plain loop and in transformers' Trainer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sparsessm
from sparsessm.errors import InputError
from tests.family import random_model_of

OPTIMISERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=2),
}


def pruned(tiny_checkpoint, tiny_windows, **options):
    """A tiny model with half of A_log and half of its weights pruned, ready to train; its tokenizer and the result."""
    model, tokenizer = sparsessm.load(str(tiny_checkpoint()))
    options = {"sparsity": 0.5, "parts": ["A_log", "weights"], **options}
    result = sparsessm.prune(model, tiny_windows(), "magnitude", **options)
    return model.requires_grad_(True), tokenizer, result


def held_values(model, masks):
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach()[mask].clone() for name, mask in masks.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps(model, optimiser, windows, count):
    """Losses of some steps."""

    def closure():
        optimiser.zero_grad()
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        return loss

    return [float(optimiser.step(closure)) for _ in range(count)]


@pytest.mark.parametrize("transition", ["zero", "unit"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_pruned_entries_stay_through_the_steps_of_an_optimiser(tiny_checkpoint, tiny_windows, optimiser, transition):
    model, _, result = pruned(tiny_checkpoint, tiny_windows, pruned_transition=transition)
    before, dense = held_values(model, result.masks), {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {float(value) for name, values in before.items() if name.endswith("A_log") for value in values} == (
        {30.0} if transition == "zero" else {0.0}
    )
    with sparsessm.hold_masks(model, result) as held:
        losses = steps(model, OPTIMISERS[optimiser](model.parameters()), tiny_windows(), 4)
        assert losses[-1] < losses[0] and held.masks.keys() == result.masks.keys()
        assert same(held_values(model, result.masks), before)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, dense[name])  # the others were trained
    steps(model, OPTIMISERS["SGD"](model.parameters()), tiny_windows(), 1)
    assert not same(held_values(model, {n: ~m for n, m in result.masks.items()}), before)


def test_after_the_handle_is_removed_entries_change_again(tiny_checkpoint, tiny_windows):
    model, _, result = pruned(tiny_checkpoint, tiny_windows)
    before = held_values(model, result.masks)
    held = sparsessm.hold_masks(model)  # what prune left is known
    steps(model, OPTIMISERS["AdamW"](model.parameters()), tiny_windows(), 1)
    assert same(held_values(model, result.masks), before)
    held.remove()
    steps(model, OPTIMISERS["AdamW"](model.parameters()), tiny_windows(), 1)
    assert not same(held_values(model, result.masks), before)


def test_pruned_entries_do_not_count_in_the_norm_of_the_gradients(tiny_checkpoint, tiny_windows):
    model, _, result = pruned(tiny_checkpoint, tiny_windows)
    with sparsessm.hold_masks(model):
        model(input_ids=tiny_windows(), labels=tiny_windows()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all((gradients[name][mask] == 0).all() for name, mask in result.masks.items())
    kept = sum(float((g[~result.masks[n]] if n in result.masks else g).square().sum()) for n, g in gradients.items())
    assert float(clip_grad_norm_(model.parameters(), 1.0)) == pytest.approx(kept**0.5, rel=1e-5)


def test_a_saved_model_is_trained_by_the_trainer_and_saved_again(tiny_checkpoint, tiny_windows, tmp_path):
    model, tokenizer, result = pruned(tiny_checkpoint, tiny_windows)
    once = sparsessm.save(model, tokenizer, tmp_path / "once", result)
    model, tokenizer = sparsessm.load(str(once))
    model.requires_grad_(True)
    data = [{"input_ids": row, "labels": row} for row in tiny_windows(8, 24)]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), per_device_train_batch_size=4, max_steps=6, learning_rate=0.01,
        weight_decay=0.1, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with sparsessm.hold_masks(model, once):
        trainer = Trainer(model=model, args=settings, train_dataset=data)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    twice = sparsessm.save(model.eval(), tokenizer, tmp_path / "twice")
    first, second = load_file(once / "masks.safetensors"), load_file(twice / "masks.safetensors")
    assert same(first, second) and first.keys() == result.masks.keys()
    stock = AutoModelForCausalLM.from_pretrained(twice)
    assert same(held_values(stock, second), held_values(AutoModelForCausalLM.from_pretrained(once), first))
    untrained = load_file(once / "model.safetensors")["backbone.embeddings.weight"]
    assert not torch.equal(stock.get_input_embeddings().weight, untrained)


def test_masks_from_values_from_a_folder_and_by_hand_are_the_same(tiny_checkpoint, tiny_windows, tmp_path):
    model, tokenizer, result = pruned(tiny_checkpoint, tiny_windows)
    folder = sparsessm.save(model, tokenizer, tmp_path / "out", result)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    for masks in (None, folder, str(folder), load_file(folder / "masks.safetensors"), result):
        with sparsessm.hold_masks(stock, masks) as held:
            assert same(held.masks, result.masks)


def test_removed_states_and_bfloat16(tiny_checkpoint, tiny_windows):
    model, _, result = pruned(tiny_checkpoint, tiny_windows, structure="columns", parts=["A_log"])
    masks = dict(result.masks)
    model.to(torch.bfloat16)
    sparsessm.prune(model, tiny_windows(), "magnitude", sparsity=0.5, parts=["weights"])
    with sparsessm.hold_masks(model) as held, sparsessm.hold_masks(model, masks):
        before = held_values(model, held.masks)
        losses = steps(model, OPTIMISERS["AdamW"](model.parameters()), tiny_windows(), 4)
        assert losses[-1] < losses[0] and same(held_values(model, held.masks), before)


def test_names_of_the_checkpoint_are_known_where_they_differ(tiny_windows):
    model = random_model_of("nemotron_h").requires_grad_(True)
    name = next(name for name, _ in model.named_parameters() if name.endswith("out_proj.weight"))
    parameter = dict(model.named_parameters())[name]
    mask = torch.rand(parameter.shape) < 0.5
    parameter.data[mask] = 0
    assert name.startswith("model.")
    with sparsessm.hold_masks(model, {name.replace("model.", "backbone.", 1): mask}) as held:
        assert same(held.masks, {name: mask})
        steps(model, OPTIMISERS["AdamW"](model.parameters()), tiny_windows(), 1)
        assert (parameter[mask] == 0).all() and (parameter[~mask] != 0).all()


@pytest.mark.parametrize(
    ("case", "says"),
    [("dense", "nothing of this model was pruned"), ("frozen", "requires_grad_"), ("name", "other.weight is not a mask"),
     ("dtype", "is not a mask"), ("shape", "has shape"), ("values", "entries that are not 0"), ("folder", "holds no masks")],
)  # fmt: skip
def test_masks_that_cannot_hold_are_named(tiny_model, tmp_path, case, says):
    model = tiny_model().requires_grad_(case != "frozen")
    name = "backbone.layers.0.mixer.out_proj.weight"
    weight = dict(model.named_parameters())[name]
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    masks = {
        "dense": None, "frozen": {name: mask}, "name": {"other.weight": mask}, "dtype": {name: mask.float()},
        "shape": {name: mask[:1]}, "values": {name: ~mask}, "folder": tmp_path,
    }[case]  # fmt: skip
    with pytest.raises(InputError, match=says):
        sparsessm.hold_masks(model, masks)


def test_the_documents_example_runs(tmp_path, text_folder, monkeypatch):
    """With less text and fewer steps than on the page."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "SHARING.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    text = f'calibration("{text_folder}"'
    for said, less in (('calibration("demo"', text), ("seqlen=128", "seqlen=16"), ("steps=8", "steps=2")):
        assert said in code
        code = code.replace(said, less)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    masks, weights = (load_file(tmp_path / "tuned" / f"{name}.safetensors") for name in ("masks", "model"))
    assert len(masks) == 6 * 6 and all(float(mask.float().mean()) == pytest.approx(0.5, abs=0.01) for mask in masks.values())
    assert {float(value) for name, mask in masks.items() for value in weights[name][mask].unique()} == {0.0, 30.0}
