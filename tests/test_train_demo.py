"""scripts/train_demo.py: gradients against autograd, the loss against stock transformers, resuming to the bit."""

import math
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
)

from scripts import train_demo
from sparsessm.errors import InputError

TINY = dict(
    d_model=16, layers=2, d_state=4, vocab=300, seqlen=32, batch=4, steps=6, lr=0.01, seed=0, validation_share=0.1,
    save_every=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Sentences of ten words, in two files of which one lies deeper, and one that is no text."""
    folder = tmp_path_factory.mktemp("text")
    words = "the cat sat on a mat and saw ten birds".split()
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=9)) + ".\n" for _ in range(300)]
    (folder / "deeper").mkdir()
    (folder / "a.txt").write_text("".join(lines[:200]))
    (folder / "deeper" / "b.md").write_text("".join(lines[200:]))
    (folder / "c.bin").write_bytes(b"not to be read" * 1000)
    return folder


@pytest.fixture(scope="module")
def trained(text_folder, tmp_path_factory):
    """(checkpoint folder, validation perplexity) of an undisturbed tiny run."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    return output, train_demo.train(text_folder=text_folder, output=output, **TINY)


def test_selective_scan_has_the_right_values_and_gradients():
    L, B, D, N = 4, 2, 3, 2
    generator = torch.Generator().manual_seed(0)
    shapes = (D, N), (L, B, D), (L, B, D), (L, B, N), (L, B, N)
    A, dt, u, b, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    A, dt = -A.exp(), dt.exp()
    h, expected = torch.zeros(B, D, N, dtype=torch.float64), []
    for t in range(L):
        h = torch.exp(dt[t][..., None] * A) * h + torch.einsum("bd,bd,bn->bdn", dt[t], u[t], b[t])
        expected.append(torch.einsum("bdn,bn->bd", h, c[t]))
    inputs = [each.requires_grad_() for each in (A, dt, u, b, c)]
    torch.testing.assert_close(train_demo.SelectiveScan.apply(*inputs), torch.stack(expected))
    assert torch.autograd.gradcheck(train_demo.SelectiveScan.apply, inputs)


def test_loss_and_gradients_are_those_of_stock_transformers():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config)
    windows = torch.randint(0, 50, (3, 12))
    gradients = []
    for loss in (train_demo.mean_loss(model, windows), model(windows, labels=windows, use_cache=False).loss):
        model.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, stock in zip(*gradients, strict=True):
        assert torch.allclose(ours, stock, rtol=1e-4, atol=1e-6)  # float32, added up in another order


def test_training_lowers_the_loss_and_the_checkpoint_opens(trained, text_folder):
    output, perplexity = trained
    assert sorted(path.name for path in output.parent.iterdir()) == ["tiny"]  # no temporary folder, no training state
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.eos_token_id == 0
    text = (text_folder / "a.txt").read_text()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer("naïve 漢字")["input_ids"]) == "naïve 漢字"

    documents = train_demo.read_documents(text_folder, ("*.txt", "*.md"))
    assert documents == [text, (text_folder / "deeper" / "b.md").read_text()]
    ids = train_demo.tokenise(tokenizer.backend_tokenizer, documents)
    _, validation = train_demo.split_windows(ids, TINY["seqlen"], TINY["validation_share"])
    with torch.no_grad():  # what was reported is what stock transformers finds in the files
        losses = [model(window[None], labels=window[None]).loss.item() for window in validation]
    assert math.isclose(math.exp(sum(losses) / len(losses)), perplexity, rel_tol=1e-4)
    torch.manual_seed(TINY["seed"])
    untrained = train_demo.validation_perplexity(MambaForCausalLM(model.config), validation, 4)
    assert perplexity < 0.8 * untrained


def test_resumed_run_ends_with_the_same_weights(trained, text_folder, tmp_path, monkeypatch):
    output, perplexity = trained
    calls = 0
    mean_loss = train_demo.mean_loss

    def killed_in_step_4(model, windows):
        nonlocal calls
        calls += 1
        if calls == 5:  # steps 0 to 3 are made, the state of step 3 is written: one step is to be made again
            raise KeyboardInterrupt
        return mean_loss(model, windows)

    monkeypatch.setattr(train_demo, "mean_loss", killed_in_step_4)
    with pytest.raises(KeyboardInterrupt):
        train_demo.train(text_folder=text_folder, output=tmp_path / "again", **TINY)
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(train_demo, "mean_loss", mean_loss)

    with pytest.raises(InputError, match="started with another steps, lr: give the same"):
        train_demo.train(text_folder=text_folder, output=tmp_path / "again", **{**TINY, "steps": 7, "lr": 1e-3})
    torch.manual_seed(123)
    torch.rand(3)
    assert train_demo.train(text_folder=text_folder, output=tmp_path / "again", **TINY) == perplexity
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (output / file).read_bytes()


def test_every_epoch_sees_every_window_once():
    seen = [row for step in range(5) for row in train_demo.rows_of_step(10, 4, 0, step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert train_demo.rows_of_step(10, 4, 1, 0) != seen[:4]


def test_held_out_windows_are_not_trained_on():
    training, validation = train_demo.split_windows(torch.arange(45), seqlen=4, share=0.25)
    assert validation.tolist() == [[12, 13, 14, 15], [28, 29, 30, 31]]
    assert [row[0] for row in training.tolist()] == [0, 4, 8, 16, 20, 24, 32, 36, 40]


def test_only_matrices_decay():
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = train_demo.parameter_groups(model)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {names[id(parameter)].removeprefix("backbone.") for parameter in decayed["params"]} == {
        "embeddings.weight",
        *(f"layers.0.mixer.{name}_proj.weight" for name in ("in", "x", "dt", "out")),
    }
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_schedule():
    rates = [train_demo.schedule(step, 200) for step in range(200)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and math.isclose(rates[102], 0.5) and rates[-1] < 1e-3


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no *.txt or *.md files in"),
        (lambda folder: (folder / "a.txt").write_text("a few words"), "windows of 32, but 10 are needed"),
    ],
)
def test_unusable_text_is_one_line_and_exit_code_2(tmp_path, capsys, prepare, message):
    (tmp_path / "text").mkdir()
    prepare(tmp_path / "text")
    flags = [str(word) for name, value in TINY.items() for word in (f"--{name}", value)]
    assert train_demo.main([str(tmp_path / "text"), str(tmp_path / "output"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_numbers_out_of_range(tmp_path):
    for name, value in {"steps": 0, "batch": -1, "validation_share": 0.0}.items():
        with pytest.raises(InputError, match=f"--{name} must be"):
            train_demo.train(text_folder=tmp_path, output=tmp_path / "output", **{**TINY, name: value})


def test_an_existing_output_is_left_alone(trained, text_folder):
    with pytest.raises(InputError, match="exists: give another folder"):
        train_demo.train(text_folder=text_folder, output=trained[0], **TINY)
