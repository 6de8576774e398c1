"""What the pictures show, as data: numbers, scales, names, colours; and the SVG that becomes a part of the page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsessm.report import charts, looks, maps, plots
from sparsessm.report.charts import Axis, LineChart, Series
from sparsessm.report.results import read_run, read_runs
from sparsessm.report.wording import perplexity_text, short_names

STYLE = Path(plots.__file__).with_name("report.css")


def drawn(records):
    """The pictures of these runs by kind."""
    found = {}
    for picture in charts.pictures(records):
        found.setdefault(picture.kind, []).append(picture)
    return found


def test_pictures_show_the_numbers_they_should(experiments):
    records = read_runs(experiments).finished
    named = {record.name.split("/")[0]: record for record in records}
    found = drawn(records)
    first, both = found["perplexity"]
    dense = named["dense"].perplexity["demo"]
    assert [line.label for line in first.series] == ["sparsessm", "magnitude", "sparsessm_dev"]
    assert first.series[0].line == ((0.3, named["vote"].perplexity["demo"] - dense),)
    assert first.level == both.level == (0.0, "dense") and first.y.label == f"perplexity above dense ({dense:.2f})"
    thirty, fifty = found["states"]
    mean = np.mean([mask.numpy().mean(0) for mask in named["vote"].masks().values()], 0)
    assert [y for _, y in thirty.series[0].line] == pytest.approx(mean.tolist())
    assert mean.mean() == pytest.approx(0.3, abs=1e-4)
    assert len(fifty.series) == 3 and len(fifty.series[0].line) == 16  # alpha changes no mask of A_log: one curve a method
    (weights,) = found["time_weights"]
    power, vote = weights.series
    harmonic = sum(1 / (t + 1) for t in range(128))
    assert power.label == "power, p = 1 (sparsessm_dev)" and vote.label == "vote (sparsessm)"
    assert all(y == pytest.approx(1 / (step * harmonic)) for step, y in power.line)
    assert vote.line[0] == (2, 1 / 127) and power.line[-1][0] == vote.line[-1][0] == 128
    cells = maps.share_map(named["all"])
    modules = ("A_log", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    assert tuple(cells.rows.values()) == modules and len(cells.columns) == 6
    assert cells.values[1][4] == named["all"].shares[4, "in_proj"]
    strips = maps.mask_map(named["vote"])
    assert list(strips.rows)[3] == 3 * 18 + 7.5  # 16 states and a gap of 2 a layer
    assert (strips.values[54:70] == named["vote"].masks()[3].T.numpy()).all() and np.isnan(strips.values[52:54]).all()


def test_a_method_looks_the_same_in_every_section(experiments):
    found = drawn(read_runs(experiments).finished)
    several = found["perplexity"] + found["states"]
    styles = [{one.label.split(",")[0]: one.style for one in chart.series} for chart in several]
    merged = {name: style for each in reversed(styles) for name, style in each.items()}
    assert merged["magnitude"] == looks.METHOD_STYLES["magnitude"]
    assert all(each[name] == merged[name] for each in styles for name in each)
    assert found["time_weights"][0].series[0].style == merged["sparsessm_dev"]


def test_wide_masks_share_columns_and_deep_models_turn_the_map(tmp_path, write_run):
    mask = torch.zeros(800, 2, dtype=torch.bool)
    mask[:3, 1] = True
    folder = write_run(tmp_path / "run", method="sparsessm", prune_A=True, sparsity=0.5)
    save_file({f"backbone.layers.{i}.mixer.A_log": mask.clone() for i in range(20)}, folder / "masks.safetensors")
    record = read_run(folder)
    strips = maps.mask_map(record)
    assert strips.values.shape == (20 * 3 - 1, 267) and strips.values[1, :2].tolist() == [1, 0]
    assert strips.column_label == "800 channels across, 3 to a column; 2 states down"
    cells = maps.state_map(record)
    assert cells.row_label == "state index" and cells.values.shape == (2, 20) and cells.values[1][7] == 3 / 800


def test_runs_that_differ_are_other_curves_and_seeds_are_averaged(tmp_path, write_run):
    options = {"method": "sparsessm", "prune_A": True, "sparsity": 0.5, "nsamples": 8, "alpha": 0.0}
    changes = [{"seed": 0}, {"seed": 1}, {"nsamples": 128}, {"nsamples": 128, "sparsity": 0.7}, {"alpha": 0.1}]
    for index, (changed, value) in enumerate(zip(changes, (10.0, 20.0, 12.0, 99.0, 30.0), strict=True)):
        write_run(tmp_path / str(index), {"perplexity": {"demo": value}}, **options | changed)
    write_run(tmp_path / "other", {"perplexity": {"demo": 1.0}}, **options | {"eval_windows": None})  # not comparable
    first, other = drawn(read_runs(tmp_path).finished)["perplexity"]
    lines = {line.label: line for line in first.series}  # alpha is of the weights, which none of them prunes
    assert list(lines) == ["sparsessm, nsamples 8", "sparsessm"]  # 128 is the default
    assert lines["sparsessm, nsamples 8"].line == ((0.5, 20.0),) and len(lines["sparsessm, nsamples 8"].points) == 3
    assert lines["sparsessm"].line == ((0.5, 12.0), (0.7, 99.0)) and first.x.ticks == (0.5, 0.7)
    assert (first.y.label, first.y.scale, other.y.scale) == ("perplexity", "log", "linear") and first.level is None
    assert other.note == "all windows of 128 tokens"
    assert lines["sparsessm"].style == looks.METHOD_STYLES["sparsessm"] != lines["sparsessm, nsamples 8"].style


def test_differences_below_and_far_above_dense_share_an_axis(tmp_path, write_run):
    write_run(tmp_path / "dense", {"perplexity": {"demo": 50.0}})
    for index, value in enumerate((49.5, 52.5, 53.0, 450.0)):
        options = {"method": ("magnitude", "sparsessm", "wanda", "ghost")[index], "prune_A": True, "sparsity": 0.5}
        write_run(tmp_path / str(index), {"perplexity": {"demo": value}}, **options)
    (chart,) = drawn(read_runs(tmp_path).finished)["perplexity"]
    assert chart.y.scale == 1.0  # linear from -1 to 1
    texts = [text.text for text in ET.fromstring(plots.svg(chart, "g")).iter("{http://www.w3.org/2000/svg}text")]
    assert {"perplexity above dense (50.00), log scale, linear from -1 to 1", "0", "1", "10", "100"} <= set(texts)


def test_removed_layers_are_named_in_order(tmp_path, write_run):
    folder = write_run(tmp_path / "run", method="mamba-shedder", prune_A=True, sparsity=0.5)
    names = [f"backbone.layers.{i}.mixer.A_log" for i in (1, 4)]
    save_file({name: torch.ones(4, 2, dtype=torch.bool) for name in names}, folder / "masks.safetensors")
    (folder / "sparsity.json").write_text(json.dumps({name: {"pruned": 8, "total": 8} for name in names}))
    steps = [{"event": "layer", "phase": "shed", "layer": layer, "perplexity": p} for layer, p in ((4, 60.0), (1, 75.0))]
    steps.append({"event": "layer", "phase": "shed", "layer": 2})  # a trial
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, steps)))
    record = read_run(folder)
    assert record.pattern == "whole SSMs" and maps.share_map(record) == "100 % of A_log in layers 1, 4"
    found = drawn([record])
    assert found.keys() == {"removal"} | ({"perplexity"}) and charts.removals(record) == [(4, 60.0), (1, 75.0)]
    assert found["removal"][0].series[0].line == ((1.0, 60.0), (2.0, 75.0))


def test_parts_of_hybrids_are_compared_in_one_map(tmp_path, write_run):
    shares = {"ssm": 0.5, "layers": 0.25, "mixer": 0.45, "attention": 0.0, "mlp": 0.1, "model": 0.2}
    write_run(tmp_path / "one", {"sparsity": shares}, method="sparsessm", prune_A=True, sparsity=0.5)
    write_run(tmp_path / "two", {"sparsity": {"ssm": 0.5}}, method="sparsessm", prune_A=True, sparsity=0.5, model="other")
    (table,) = drawn(read_runs(tmp_path).finished)["parts"]
    assert list(table.columns.values()) == ["A_log", "mixer", "attention", "MLP", "all weights"] and table.title == "demo"
    assert table.values.tolist() == [[0.5, 0.45, 0.0, 0.1, 0.25]]


def linear(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels])


def contrast(one, other):
    a, b = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) + 0.05 for c in (one, other))
    return b / a


def test_colours_can_be_read_and_told_apart():
    """WCAG contrast on both grounds; CIELAB distance as seen with each colour blindness (Machado et al. 2009)."""
    css = STYLE.read_text()
    blocks = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r"\{[^{}]*--paper: #\w{6}[^{}]*\}", css)]
    for names, colours in zip(blocks, (looks.LIGHT, looks.DARK), strict=False):
        for ground in (names["paper"], names["card"], names["faint"]):
            assert all(contrast(names[kind], ground) >= 4.5 for kind in ("ink", "muted", "link"))
        assert all(contrast(colour, names["card"]) >= 3 for colour in colours)
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

    for colours in (looks.LIGHT, looks.DARK):
        for seen in blind:
            points = [lab(seen @ linear(colour)) for colour in colours]
            assert min(np.linalg.norm(a - b) for a, b in combinations(points, 2)) > 20
    styles = list(looks.METHOD_STYLES.values())
    assert len(set(styles)) == len(styles) == len({(style.marker, style.dash, style.colour) for style in styles})


@pytest.mark.parametrize(("value", "shown"), [(67.684, "67.68"), (1234.56, "1234.6"), (2.31e7, "2.3e+07")])
def test_perplexities_read_well(value, shown):
    assert perplexity_text(value) == shown


def test_names_are_as_short_as_they_can_be():
    names = ["/data/a/wikitext2", "/data/b/wikitext2", "ptb", "state-spaces/mamba-130m", "./models/x/"]
    assert list(short_names(names).values()) == ["a/wikitext2", "b/wikitext2", "ptb", "state-spaces/mamba-130m", "x"]


def test_svg_keeps_its_text_has_ids_of_its_own_and_takes_the_colours_of_the_page():
    lines = tuple(
        Series(f"method <{i}>", looks.plain_style(i), ((0.3, 50.0, ""), (0.5, y, f"note {i}")), ((0.3, 50.0), (0.5, y)))
        for i, y in enumerate(range(60, 69))
    )
    axes = Axis("sparsity", "percent", ticks=(0.3, 0.5)), Axis("perplexity")
    chart = LineChart("perplexity", "t", "", *axes, lines, level=(40.0, "dense"))
    one, other = plots.svg(chart, "one"), plots.svg(chart, "other")
    ids = [set(re.findall(r'id="([^"]+)"', text)) for text in (one, other)]
    assert not ids[0] & ids[1] and set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', one)) <= ids[0]
    assert one == plots.svg(chart, "one") and one.replace("one-", "other-") == other
    assert "method &lt;8&gt;</text>" in one and "<title>note 8</title>" in one and "30 %</text>" in one
    assert "var(--s0)" in one and "var(--ink)" in one and not set(looks.LIGHT) & set(re.findall(r"#\w{6}", one))
    assert "http" not in one.replace("http://www.w3.org/", "")


def test_logarithmic_ticks_are_few():
    line = Series("m", looks.plain_style(0), (), ((0.1, 20.0), (0.9, 4e6)))
    drawn = plots.svg(LineChart("k", "t", "", Axis("x"), Axis("y", scale="log"), (line,)), "g")
    ticks = re.findall(r">(1\w+)</text>", drawn)
    assert ticks == ["100", "1000", "1e4", "1e5", "1e6"] and "y, log scale</text>" in drawn


def test_any_letters_are_drawn():
    line = Series("a\x00b\ud800\u2028", looks.plain_style(0), ((1.0, 1.0, "\x1b"),), ((1.0, 1.0),))
    assert "a\ufffdb\ufffd\ufffd" in plots.svg(LineChart("k", "\x00", "", Axis("x"), Axis("y"), (line,)), "g")
