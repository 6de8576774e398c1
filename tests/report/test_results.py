"""Run folders as records: they hold what the files hold, and the folder holds what the records need."""

from __future__ import annotations

import json
import shlex

import pytest
from safetensors.torch import load_file

from sparsessm import commandline
from sparsessm.options import PLACES
from sparsessm.report.results import read_run, read_runs


def test_records_hold_what_the_files_hold(experiments):
    runs = read_runs(experiments)
    assert runs.unfinished == ["stopped/20260101-000000"] and runs.damaged == []
    named = {record.name.split("/")[0]: record for record in runs.finished}
    assert list(named) == ["dense", "vote", "magnitude", "dev", "all"]  # by what is pruned, sparsity, method
    for record in runs.finished:
        assert record.metrics["perplexity"] == json.loads((record.folder / "metrics.json").read_text())["perplexity"]
    assert [named["all"].parts, named["vote"].parts, named["dense"].parts] == [("A_log", "weights"), ("A_log",), ()]
    assert [named[name].aggregation for name in ("dense", "magnitude", "vote", "dev")] == [
        None, None, ("vote", None), ("power", 1.0)
    ]  # fmt: skip
    shares = named["all"].shares
    assert len(shares) == 36 and {share for (_, m), share in shares.items() if m in ("A_log", "x_proj")} == {0.5}
    assert 0.53 < max(share for (_, m), share in shares.items() if m == "in_proj") <= 0.54
    sensitivity = named["all"].sensitivities
    events = [json.loads(line) for line in (named["all"].folder / "events.jsonl").read_text().splitlines()]
    third = next(e for e in events if e.get("phase") == "sensitivity" and e.get("layer") == 3)
    assert sensitivity["out_proj"][3] == third["out_proj"] > 0 and list(sensitivity["in_proj"]) == list(range(6))


def test_commands_start_the_same_run_again(experiments):
    for record in read_runs(experiments).finished:
        program, *argv = shlex.split(record.command)
        again, _ = commandline.parse(argv)
        assert program == "main.py"
        for name, value in record.options.items():
            if name not in PLACES:
                assert getattr(again, name) == (tuple(value) if isinstance(value, list) else value), name


def test_a_run_keeps_its_masks_of_A_log_and_its_phases(experiments):
    named = {record.name.split("/")[0]: record for record in read_runs(experiments).finished}
    saved = load_file(experiments.parent / "saved" / "masks.safetensors")
    kept = load_file(named["vote"].folder / "masks.safetensors")
    assert kept.keys() == saved.keys() and len(kept) == 6 and all((kept[name] == saved[name]).all() for name in kept)
    assert named["vote"].masks()[4].shape == (384, 16) and not (named["dense"].folder / "masks.safetensors").exists()
    assert set(load_file(named["all"].folder / "masks.safetensors")) == kept.keys()  # none of the weights
    for record in named.values():
        events = [json.loads(line) for line in (record.folder / "events.jsonl").read_text().splitlines()]
        phases = [event for event in events if event["event"] == "phase"]
        for phase, seconds in record.metrics["seconds"].items():
            assert sum(e["took"] for e in phases if e["phase"] == phase) == pytest.approx(seconds, abs=0.002)
        peaks = [event["peak_memory_bytes"]["process"] for event in phases]
        assert peaks == sorted(peaks) and peaks[0] > 1 << 27 and peaks[-1] <= record.metrics["peak_memory_bytes"]["process"]
        assert not list(record.folder.glob(".*"))


def test_a_resumed_run_tells_of_the_process_that_ended_it(tmp_path, write_run):
    folder = write_run(tmp_path / "run")
    phases = [("load", 9), ("prune", 99), ("load", 5), ("eval", 7)]
    events = [{"event": "phase", "phase": phase, "peak_memory_bytes": {"process": peak}} for phase, peak in phases]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    assert read_run(folder).memory_after == {"load": {"process": 5}, "eval": {"process": 7}}


@pytest.mark.parametrize(
    ("changed", "pattern", "sparsity"),
    [
        ({"method": None}, None, None),
        ({"method": "sparsessm", "prune_A": True, "sparsity": 0.4}, "unstructured", 0.4),
        ({"method": "ts_semi", "prune_A": True, "prunen": 2, "prunem": 8}, "2:8", 0.25),
        ({"method": "structure_ts", "prune_A": True, "sparsity": 0.5}, "structured", 0.5),
        ({"method": "sparsessm", "prune_A": True, "sparsity": 0.5, "structure": "columns"}, "structured", 0.5),
        ({"method": "mamba-shedder", "prune_layers": True, "sparsity": 0.5}, "whole blocks", 0.5),
    ],
)
def test_patterns(tmp_path, write_run, changed, pattern, sparsity):
    record = read_run(write_run(tmp_path / "run", **changed))
    assert (record.pattern, record.sparsity) == (pattern, sparsity)


@pytest.mark.parametrize(
    ("changed", "aggregation"),
    [
        ({"method": "magnitude"}, None),
        ({"method": "sparsegpt"}, None),
        ({"method": "ts_real"}, ("sum", None)),
        ({"method": "sparsessm_dev", "aggregate": "discount", "time_discount": 0.8}, ("discount", 0.8)),
        ({"method": "magnitude", "saliency": "a_log", "aggregate": "window"}, ("window", 0.25)),
        ({"method": "sparsessm", "saliency": "output"}, None),
    ],
)
def test_aggregations(tmp_path, write_run, changed, aggregation):
    record = read_run(write_run(tmp_path / "run", **{"prune_A": True, "sparsity": 0.5} | changed))
    assert record.aggregation == aggregation
