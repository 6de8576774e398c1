"""What the pictures show, and how they are drawn on the page: numbers, axes, names, colours."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsessm.report import looks, pictures, plots
from sparsessm.report.results import read_run, read_runs
from sparsessm.report.wording import figure_text, short_names

STYLE = Path(plots.__file__).with_name("page.css")


def test_pictures_show_the_numbers_they_should(experiments):
    records = read_runs(experiments).finished
    named, of_all = {record.name.split("/")[0]: record for record in records}, looks.Looks(records)
    first, both = pictures.perplexity_charts(records, of_all)
    dense = named["dense"].metrics["perplexity"]["demo"]
    assert [line.label for line in first.series] == ["sparsessm", "magnitude", "sparsessm_dev"]
    assert first.series[0].line == [(0.3, named["vote"].metrics["perplexity"]["demo"] - dense)]
    assert first.y.label.startswith("perplexity above dense") and f"dense {figure_text(dense)}" in first.note
    assert [line.label for line in both.series] == ["sparsessm, alpha 0.04"] and both.x.ticks == [0.5]
    thirty, fifty = pictures.state_charts(records, of_all)
    mean = np.mean([mask.mean(0) for mask in named["vote"].masks().values()], 0)
    assert [y for _, y in thirty.series[0].line] == pytest.approx(mean.tolist())
    assert mean.mean() == pytest.approx(0.3, abs=1e-4)
    assert len(fifty.series) == 3 and len(fifty.series[0].line) == 16  # alpha changes no mask of A_log: one curve a method
    same = [line.style for chart in (first, thirty, fifty) for line in chart.series if line.label == "sparsessm"]
    assert len(same) == 3 and len(set(same)) == 1 != both.series[0].style
    (weights,) = pictures.weight_charts(records, of_all)
    power, vote = weights.series
    harmonic = sum(1 / (t + 1) for t in range(128))
    assert power.label == "power, p = 1 (sparsessm_dev)" and vote.label == "vote (sparsessm)"
    assert all(y == pytest.approx(1 / (step * harmonic)) for step, y in power.line)
    assert vote.line[0] == (2, pytest.approx(1 / 127)) and power.line[-1][0] == vote.line[-1][0] == 128
    cells = pictures.share_map(named["all"])
    assert cells.rows == ["A_log", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"] and len(cells.columns) == 6
    assert cells.values[1][4] == named["all"].shares[4, "in_proj"]
    strips = pictures.mask_map(named["vote"])  # 16 states and a gap of 3 rows for each layer, named in the middle
    assert len(strips.rows) == 6 * 19 and strips.rows[8] == "0" and strips.rows[3 * 19 + 8] == "3"
    assert (strips.values[3 * 19 : 3 * 19 + 16] == named["vote"].masks()[3].T).all()
    assert strips.values[16].shape == (384,) and np.isnan(strips.values[16]).all()


def test_wide_masks_share_columns_and_deep_models_turn_the_map(tmp_path, write_run):
    mask = torch.zeros(800, 2, dtype=torch.bool)
    mask[:3, 1] = True
    folder = write_run(tmp_path / "run", method="sparsessm", prune_A=True, sparsity=0.5)
    save_file({f"backbone.layers.{i}.mixer.A_log": mask.clone() for i in range(20)}, folder / "masks.safetensors")
    record = read_run(folder)
    strips = pictures.mask_map(record)
    assert len(strips.columns) == 267 and strips.columns[1] == "3" and list(strips.values[1][:2]) == [1, 0]
    assert strips.note == "states from top to bottom, 3 channels to a column"
    cells = pictures.state_map(record)
    assert cells.rows == ["0", "1"] and len(cells.columns) == 20 and cells.values[1][7] == 3 / 800
    assert plots.svg(strips).count("<image") == 2 and plots.svg(cells).count("<image") == 2  # the colour bar is one


def test_runs_that_differ_are_other_curves_and_seeds_are_averaged(tmp_path, write_run):
    options = {"method": "sparsessm", "prune_A": True, "sparsity": 0.5, "nsamples": 8}
    changes = [{"seed": 0}, {"seed": 1}, {"nsamples": 64}, {"nsamples": 64, "sparsity": 0.7}]
    for index, (changed, value) in enumerate(zip(changes, (10.0, 20.0, 12.0, 99.0), strict=True)):
        write_run(tmp_path / str(index), {"perplexity": {"demo": value}}, **options | changed)
    write_run(tmp_path / "other", {"perplexity": {"demo": 1.0}}, **options | {"eval_windows": None})  # not comparable
    records = read_runs(tmp_path).finished
    first, other = pictures.perplexity_charts(records, looks.Looks(records))
    lines = {line.label: line for line in first.series}
    assert lines["sparsessm, nsamples 8"].line == [(0.5, 15.0)] and len(lines["sparsessm, nsamples 8"].points) == 2
    assert lines["sparsessm, nsamples 64"].line == [(0.5, 12.0), (0.7, 99.0)]
    assert first.y.scale == "log" and other.y.scale == "linear" and other.note == "all windows of 128 tokens"
    assert lines["sparsessm, nsamples 8"].style != lines["sparsessm, nsamples 64"].style


def test_a_value_that_a_method_has_by_itself_makes_no_other_curve(tmp_path, write_run):
    for method in ("sparsegpt", "sparsessm_obs", None):
        for damping in (0.01, None):
            write_run(tmp_path / f"{method} {damping}", method=method, prune_layers=True, sparsity=0.5, percdamp=damping)
    records = read_runs(tmp_path).finished
    found = {looks.Looks(records).label(record) for record in records}
    assert found == {"dense", "sparsegpt", "sparsessm_obs", "sparsessm_obs, percdamp 0.01"}


def test_removed_layers_are_named_and_not_drawn(tmp_path, write_run):
    folder = write_run(tmp_path / "run", method="mamba-shedder", prune_A=True, sparsity=0.5)
    names = [f"backbone.layers.{i}.mixer.A_log" for i in (1, 4)]
    save_file({name: torch.ones(4, 2, dtype=torch.bool) for name in names}, folder / "masks.safetensors")
    (folder / "sparsity.json").write_text(json.dumps({name: {"pruned": 8, "total": 8} for name in names}))
    record = read_run(folder)
    assert record.pattern == "whole SSMs" and pictures.share_map(record) == "100 % of A_log in 2 layers"
    assert pictures.mask_map(record) is pictures.state_map(record) is None
    assert list(pictures.state_charts([record], looks.Looks([record]))) == []


def linear(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels])


def contrast(one, other):
    a, b = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) + 0.05 for c in (one, other))
    return b / a


def test_colours_can_be_read_and_told_apart():
    """WCAG contrast on both grounds; CIELAB distance as seen with each colour blindness (Machado et al. 2009)."""
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in STYLE.read_text().split("@media")[:2])
    assert tuple(light[f"s{i}"] for i in range(7)) == looks.COLOURS and light["heat"] == looks.HEAT
    for names in (light, dark):
        for ground in (names["paper"], names["card"], names["faint"]):
            assert all(contrast(names[kind], ground) >= 4.5 for kind in ("ink", "muted", "link"))
        assert all(contrast(colour, names["card"]) >= 3 for colour in (*(names[f"s{i}"] for i in range(7)), looks.HEAT))
        darkest = [0.25 * int(names["card"][i : i + 2], 16) + 0.75 * int(looks.HEAT[i : i + 2], 16) for i in (1, 3, 5)]
        assert contrast(names["ink"], "#" + "".join(f"{round(c):02x}" for c in darkest)) >= 4.5  # numbers in cells
    blind = [
        np.eye(3),
        np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
        np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
        np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
    ]
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(rgb):
        x, y, z = np.cbrt(to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    for colours in ([names[f"s{i}"] for i in range(7)] for names in (light, dark)):
        for seen in blind:
            points = [lab(seen @ linear(colour)) for colour in colours]
            assert min(np.linalg.norm(a - b) for a, b in combinations(points, 2)) > 20
    assert len(set(looks.METHOD_STYLES.values())) == len(looks.METHOD_STYLES)


@pytest.mark.parametrize(("value", "shown"), [(67.684, "67.68"), (-0.001, "0.00"), (2.31e7, "2.31e+07")])
def test_perplexities_read_well(value, shown):
    assert figure_text(value) == shown


def test_names_are_as_short_as_they_can_be():
    names = ["/data/a/wikitext2", "/data/b/wikitext2", "ptb", "state-spaces/mamba-130m", "./models/x/"]
    assert list(short_names(names).values()) == ["a/wikitext2", "b/wikitext2", "ptb", "state-spaces/mamba-130m", "x"]


def test_a_scale_does_not_flatten_and_says_so():
    assert pictures._axis("y", [10.0, 20.0]) == pictures.Axis("y") == pictures._axis("y", [])
    assert pictures._axis("y", [1.0, 7.0]) == pictures.Axis("y\n(log scale)", scale="log")
    assert pictures._axis("y", [-1.0, 3.0, 5.0]) == pictures.Axis("y")
    beyond_ten = pictures.Axis("y\n(log scale beyond 10)", scale="symlog", linear_to=10.0)
    assert pictures._axis("y", [-1.0, 3.0, 500.0]) == beyond_ten


def test_a_picture_of_the_page_takes_its_colours_and_shares_no_id():
    """Text is text, each point says what it is, and what the page's style has to colour is a variable."""
    series = [pictures.Series(f"_m{i}", looks.plain_style(i), [(0.5, 1.0 + i, f"run <{i}>")]) for i in range(2)]
    axes = pictures.Axis("sparsity", "percent", ticks=[0.5]), pictures.Axis("y")
    drawn = [plots.svg(pictures.LineChart("perplexity", key, "t", "", *axes, series)) for key in "ab"]
    assert drawn[0] == plots.svg(pictures.LineChart("perplexity", "a", "t", "", *axes, series))
    assert not re.findall(r": #[0-9a-f]{6}\b", drawn[0])
    assert all(f"var(--{name})" in drawn[0] for name in ("s0", "s1", "ink", "muted", "rule"))
    ids = [set(re.findall(r' id="([^"]+)"', one)) for one in drawn]
    assert ids[0] and not ids[0] & ids[1]
    assert re.findall(r"<title>(.*?)</title>", drawn[0]) == ["run &lt;0&gt;", "run &lt;1&gt;"]
    assert re.findall(r"<text[^>]*>\s*(_m\d|50 %)</text>", drawn[0]) == ["50 %", "_m0", "_m1"]
    assert 'aria-label="t. y against sparsity. _m0: 1 at 50 %; _m1: 2 at 50 %"' in drawn[0]


def test_parts_of_hybrids_and_steps_of_a_removal(tmp_path, write_run):
    shares = {"ssm": 0.5, "layers": 0.3, "mixer": 0.2, "attention": 0.4, "mlp": 0.1, "model": 0.2}
    options = {"method": "mamba-shedder", "prune_layers": True, "sparsity": 0.5}
    folder = write_run(tmp_path / "run", {"sparsity": shares}, **options)
    steps = [{"event": "layer", "phase": "shed", "layer": i, "perplexity": value} for i, value in ((4, 9.0), (1, 11))]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, steps)))
    records = read_runs(tmp_path).finished
    (removal,) = pictures.removal_charts(records, looks.Looks(records))
    assert removal.title == "demo: whole blocks removed" and removal.series[0].line == [(1, 9.0), (2, 11.0)]
    assert removal.series[0].points[1][2].endswith("layer 1: 11.00")
    (table,) = pictures.part_maps(records, looks.Looks(records))
    assert dict(zip(table.columns, table.values[0], strict=True)) == {
        "A_log": 0.5, "mixer": 0.2, "attention": 0.4, "MLP": 0.1, "weights": 0.3
    }  # fmt: skip
