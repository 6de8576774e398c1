"""What the benchmark of checkpoints counts, and that its sentence follows its numbers. No time is asserted."""

import dataclasses
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.bench_inference import bench
from sparsessm.errors import InputError
from sparsessm.metrics.speed import Costs, cells, measure, nonzero_share, subjects_of, verdict
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from tests.family import HYBRIDS, random_model_of

ROOT = Path(__file__).resolve().parents[2]
LAYERS, D, N, K, BATCH = 2, 32, 6, 4, 3
SHORT = dict(device="cpu", prompt=5, tokens=2, batch=BATCH, rounds=3)


@pytest.fixture
def pruned(run_main, tiny_checkpoint, text_folder, tmp_path):
    """pruned("--method", ...) is the folder of a tiny checkpoint, pruned by the command to 50 %."""

    def make(*argv):
        out = tmp_path / f"pruned{len(list(tmp_path.glob('pruned*')))}"
        done = run_main([tiny_checkpoint("dense"), text_folder, *argv, "--sparsity", 0.5, "--seqlen", 32, "--nsamples", 2,
                         "--ppl_datasets", "none", "--save", out])  # fmt: skip
        assert done.code == 0, done.stderr
        return str(out)

    return make


def test_sizes_are_those_of_the_checkpoints(pruned, tmp_path):
    unstructured = pruned("--method", "sparsessm", "--prune_A")
    structured = pruned("--method", "structure_ts", "--prune_A")
    ssm = pruned("--method", "mamba-shedder", "--prune_A")
    block = pruned("--method", "mamba-shedder", "--prune_layers")
    dense = str(tmp_path / "dense")
    names = [dense, unstructured, structured, ssm, block]
    found = measure(subjects_of(names), **SHORT)
    assert [costs.name for costs in found] == names
    parameters = sum(tensor.numel() for tensor in load_file(Path(dense) / "model.safetensors").values())
    in_block = sum(
        tensor.numel() for name, tensor in load_file(Path(dense) / "model.safetensors").items() if ".layers.0." in name
    )
    fewer = LAYERS * 3 * (D + 2 * D)  # 3 of 6 states: columns of A_log, rows of B and C
    assert [costs.parameters for costs in found] == [
        parameters, parameters, parameters - fewer, parameters, parameters - in_block,
    ]  # fmt: skip
    for costs in found:
        assert costs.parameter_bytes == 4 * costs.parameters
        assert costs.file_bytes == (Path(costs.name) / "model.safetensors").stat().st_size
        assert costs.peak_bytes is None and costs.memory == costs.parameter_bytes + costs.state_bytes
        assert len(costs.prefill) == len(costs.decode) == 3 and min(*costs.prefill, *costs.decode) > 0
    state = 4 * BATCH * D * (K + N)
    assert [costs.state_bytes for costs in found] == [
        LAYERS * state, LAYERS * state, LAYERS * 4 * BATCH * D * (K + 3), LAYERS * state, state,
    ]  # fmt: skip
    assert found[2].parameter_bytes < found[0].parameter_bytes and found[2].file_bytes < found[0].file_bytes
    expected = {0: 0, 1: LAYERS * D * N // 2, 2: 0, 3: D * N + N * D, 4: 0}  # of an SSM: A_log, and the rows of C
    for i, gone in expected.items():
        assert found[i].nonzero == pytest.approx(1 - gone / found[i].parameters, abs=1e-9)
    text = verdict(found)
    assert "\n" not in text and all(name in text for name in names)
    assert f"{fewer / parameters:.1%} of the parameters removed, gained" in text


def test_zeros_and_marks_are_counted_once(tiny_checkpoint):
    folder = tiny_checkpoint()
    weights = load_file(folder / "model.safetensors")
    total = sum(tensor.numel() for tensor in weights.values())
    name, other = "backbone.layers.0.mixer.A_log", "backbone.layers.1.mixer.A_log"
    weights[name][0] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    mask = torch.zeros(D, N, dtype=torch.bool)
    mask[:2] = True  # the first row is zero as well
    save_file({name: mask, other: torch.ones(D, N + 1, dtype=torch.bool)}, folder / "masks.safetensors")
    source = checkpoint.find(str(folder))
    assert nonzero_share(source, checkpoint.load(source)) == pytest.approx(1 - 2 * N / total, abs=1e-12)


def test_the_state_spaces_layout_is_measured_as_well(pruned, tmp_path):
    out = pruned("--method", "structure_ts", "--prune_A", "--save_format", "state-spaces")
    (costs,) = measure(subjects_of([out]), **SHORT)
    assert costs.file_bytes == (Path(out) / "pytorch_model.bin").stat().st_size
    assert costs.state_bytes == LAYERS * 4 * BATCH * D * (K + 3)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_the_caches_of_hybrids_are_counted_by_kind(tmp_path, kind):
    model = random_model_of(kind)
    model.save_pretrained(tmp_path / kind)
    (costs,) = measure(subjects_of([str(tmp_path / kind)]), **SHORT)
    layout, steps = Layout(model), SHORT["prompt"] + SHORT["tokens"]
    mixers = [mixer for layer in layout.layers if (mixer := layout.mixer(layer))]
    H_P_N = 32 * 6
    channels = 32 if kind == "jamba" else 32 + 2 * 6
    whole = sum(map(layout.whole_windows, layout.layers))
    keys = 2 * (4 * 8 if kind == "zamba2" else 2 * 4)  # of heads that keep keys and values
    assert costs.states == {
        "SSM": 4 * len(mixers) * H_P_N, "convolution": 4 * len(mixers) * channels * K, "key-value": 4 * whole * keys * steps
    }  # fmt: skip
    assert costs.state_bytes == BATCH * sum(costs.states.values())
    row = cells(costs)
    assert row["SSM KiB each"] == f"{costs.states['SSM'] / 1024:.1f}" and "key-value KiB each" in row


@pytest.mark.parametrize("word", ["prompt", "tokens", "batch", "rounds"])
def test_lengths_below_one_are_refused(tiny_checkpoint, word):
    with pytest.raises(InputError, match=f"--{word} must be at least 1"):
        measure(subjects_of([str(tiny_checkpoint())]), **SHORT | {word: 0})


# --- the sentence --------------------------------------------------------------------------------------------------

DENSE = Costs("dense", (4e-6, 4e-6, 5e-6, 4e-6), (2e-3,) * 4, 1000, 1.0, 4000, 400, 4100)


def like(name="other", **changed):
    return dataclasses.replace(DENSE, name=name, **changed)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "other, nothing pruned, gained nothing (prefill 1.00x as fast, decoding 1.00x as fast, "
             "memory 1.000x, state 1.000x, file 1.000x)"),
        ({"nonzero": 0.75}, "25.0% of the entries pruned in place, gained nothing ("),
        ({"parameters": 900}, "10.0% of the parameters removed, gained nothing ("),
        ({"parameters": 900, "nonzero": 0.9},
         "10.0% of the parameters removed and 10.0% of the entries pruned in place, gained nothing ("),
        ({"prefill": (2e-6, 2e-6, 2.5e-6, 2e-6)}, "gained faster prefill (prefill 2.00x as fast, decoding 1.00x"),
        ({"decode": (4e-3,) * 4}, "gained nothing at the cost of slower decoding (prefill 1.00x as fast, decoding 0.50x"),
        ({"decode": (1.96e-3,) * 4}, "gained nothing (prefill 1.00x as fast, decoding 1.02x"),
        ({"decode": (1e-3, 1e-3, 2e-3, 2e-3)}, "gained nothing (prefill 1.00x as fast, decoding 1.50x"),  # rounds disagree
        ({"decode": (1e-3, 1e-3, 1e-3, 2e-3)}, "gained faster decoding ("),  # three of four agree
        ({"decode": (4e-3, 4e-3, 4e-3, 2e-3)}, "at the cost of slower decoding ("),
        ({"parameter_bytes": 3600}, "gained less memory (prefill 1.00x as fast, decoding 1.00x as fast, memory 0.909x"),
        ({"state_bytes": 800}, "gained nothing at the cost of more memory and a larger state ("),
        ({"file_bytes": 2050, "parameter_bytes": 2000, "state_bytes": 200},
         "gained less memory, a smaller state and a smaller file ("),
        ({"file_bytes": 4099}, "gained nothing ("),  # a header that differs by a byte
    ],
)  # fmt: skip
def test_the_sentence_follows_the_numbers(changed, says):
    text = verdict([DENSE, like(**changed)])
    assert text.startswith("Against dense: other, ") and text.endswith(").") and says in text


def test_the_peak_counts_where_it_is_known():
    first, other = like("dense", peak_bytes=10_000), like(peak_bytes=5000)
    assert "gained less memory (" in verdict([first, other]) and "memory 0.500x" in verdict([first, other])
    assert cells(other)["peak MiB"] == "0.00" and "peak MiB" not in cells(DENSE)


def test_a_row_holds_medians():
    row = cells(DENSE)
    assert (row["prefill us/token"], row["decode us/token"], row["non-zero"]) == ("4.0", "2000.0", "100.0%")
    assert row["spread"] == "25%, 0%"  # of prefill: from 4 to 5, about 4


ASKED = {"checkpoints": [], "compact": False, "shape": None, "layers": None, "dtype": "float32", "prompt": 6, "tokens": 2,
         "batch": [1], "rounds": 1}  # fmt: skip


# --- the script ----------------------------------------------------------------------------------------------------


def test_the_script_prints_a_row_for_each_checkpoint_and_one_sentence(tiny_checkpoint, capsys):
    one, two = tiny_checkpoint("one"), tiny_checkpoint("two", num_hidden_layers=1)
    bench(**ASKED | {"checkpoints": [str(one), str(two)], "batch": [2]})
    _, lengths, header, _, *rows, sentence = capsys.readouterr().out.splitlines()
    assert lengths == "batch 2, prompts of 6 tokens, 2 decoded, medians of 1 rounds"
    assert [row.split()[0] for row in rows] == [str(one), str(two)] and header.startswith("checkpoint")
    assert re.search(r"state 0\.500x", sentence) and "of the parameters removed, gained" in sentence


@pytest.mark.slow
def test_the_script_compares_what_pruning_a_shape_buys(capsys):
    bench(**ASKED | {"shape": "mamba2-130m", "layers": 1, "batch": [1, 2]})
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line.startswith(("dense", "half"))]
    names = ["dense", "half of the states removed", "half of the heads removed", "half of the heads pruned",
             "half of the heads pruned, compact"]  # fmt: skip
    assert [row[0] for row in rows] == names * 2
    whole = 24 * 64 * 128 * 4 / 2**10  # H P N numbers of four bytes
    states = [f"{share * whole:.1f}" for share in (1, 0.5, 0.5, 1, 0.5)]
    assert [[cell.strip() for cell in row if cell.strip()][6] for row in rows] == states * 2


def test_a_checkpoint_with_pruned_heads_stands_there_once_more_without_their_states(tmp_path, demo_dir, capsys):
    model = random_model_of("mamba2")
    model.backbone.layers[0].mixer.A_log.data[:4] = 30.0
    model.save_pretrained(tmp_path / "pruned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_dir / name, tmp_path / "pruned")
    bench(**ASKED | {"checkpoints": [str(tmp_path / "pruned")], "compact": True})
    _, _, _, _, plain, compact, sentence = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / 'pruned'}, compact" in compact
    assert " 1.5 " in plain and " 1.1 " in compact  # KiB: 16 and 12 heads of 4 x 6 numbers
    assert "gained" in sentence and "a smaller state" in sentence


@pytest.mark.slow
def test_the_script_as_a_process(tiny_checkpoint):
    argv = [sys.executable, "scripts/bench_inference.py", "--prompt", "4", "--tokens", "1", "--rounds", "1"]
    done = subprocess.run([*argv, tiny_checkpoint()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "batch 1, prompts of 4 tokens, 1 decoded" in done.stdout


def test_the_script_ends_in_one_line_for_what_is_no_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_inference.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "bench_inference.py"), run_name="__main__")
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "has no config.json" in line
