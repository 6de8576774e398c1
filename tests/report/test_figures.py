"""What the pictures show, and how they are drawn on the page: numbers, axes, names, colours."""

from __future__ import annotations

import json
import re
import zlib
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsessm.report import figures, palette, svg
from sparsessm.report.png import share_png
from sparsessm.report.results import read_run, read_runs
from sparsessm.report.wording import perplexity_text, short_names

STYLE = Path(svg.__file__).with_name("report.css")


def test_pictures_show_the_numbers_they_should(experiments):
    records = read_runs(experiments).finished
    named = {record.name.split("/")[0]: record for record in records}
    first, both = figures.perplexity_charts(records)
    assert [line.label for line in first.series] == ["sparsessm", "magnitude", "sparsessm_dev"]
    assert first.series[0].line == ((0.3, named["vote"].perplexity["demo"]),)
    assert first.level[0] == named["dense"].perplexity["demo"] == pytest.approx(both.level[0])
    thirty, fifty = figures.state_charts(records)
    mean = np.mean([mask.numpy().mean(0) for mask in named["vote"].masks().values()], 0)
    assert [y for _, y in thirty.series[0].line] == pytest.approx(mean.tolist())
    assert mean.mean() == pytest.approx(0.3, abs=1e-4)
    assert len(fifty.series) == 3 and len(fifty.series[0].line) == 16  # alpha changes no mask of A_log: one curve a method
    (weights,) = figures.weight_charts(records)
    power, vote = weights.series
    harmonic = sum(1 / (t + 1) for t in range(128))
    assert power.label == "power, p = 1 (sparsessm_dev)" and vote.label == "vote (sparsessm)"
    assert all(y == pytest.approx(1 / (step * harmonic)) for step, y in power.line)
    assert vote.line[0] == (2, 1 / 127) and power.line[-1][0] == vote.line[-1][0] == 128
    cells = figures.share_map(named["all"])
    assert cells.rows == ("A_log", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj") and len(cells.columns) == 6
    assert cells.values[1][4] == named["all"].shares[4, "in_proj"]
    strips = figures.mask_map(named["vote"])
    assert strips.per_column == 1 and (strips.layers[3][1] == named["vote"].masks()[3].T.numpy()).all()


def test_wide_masks_share_columns_and_deep_models_turn_the_map(tmp_path, write_run):
    mask = torch.zeros(800, 2, dtype=torch.bool)
    mask[:3, 1] = True
    folder = write_run(tmp_path / "run", method="sparsessm", prune_A=True, sparsity=0.5)
    save_file({f"backbone.layers.{i}.mixer.A_log": mask.clone() for i in range(20)}, folder / "masks.safetensors")
    record = read_run(folder)
    strips = figures.mask_map(record)
    assert strips.per_column == 3 and strips.layers[0][1].shape == (2, 267) and strips.layers[0][1][1, :2].tolist() == [1, 0]
    cells = figures.state_map(record)
    assert cells.rows == ("0", "1") and len(cells.columns) == 20 and cells.values[1][7] == 3 / 800
    assert svg.mask_map(strips).count("<image") == 20 and 'class="masks wide"' in svg.mask_map(strips)
    rows = ((0.25,) * 20, (0.75,) * 20) * 11
    big = figures.HeatMap("k", "t", tuple("ab" * 11), tuple(map(str, range(20))), rows, "r", "c")
    assert svg.heat_map(big).count("<image") == 1 and "<rect" in svg.heat_map(cells)


def test_runs_that_differ_are_other_curves_and_seeds_are_averaged(tmp_path, write_run):
    options = {"method": "sparsessm", "prune_A": True, "sparsity": 0.5, "nsamples": 8}
    changes = [{"seed": 0}, {"seed": 1}, {"nsamples": 64}, {"nsamples": 64, "sparsity": 0.7}]
    for index, (changed, value) in enumerate(zip(changes, (10.0, 20.0, 12.0, 99.0), strict=True)):
        write_run(tmp_path / str(index), {"perplexity": {"demo": value}}, **options | changed)
    write_run(tmp_path / "other", {"perplexity": {"demo": 1.0}}, **options | {"eval_windows": None})  # not comparable
    first, other = figures.perplexity_charts(read_runs(tmp_path).finished)
    lines = {line.label: line for line in first.series}
    assert lines["sparsessm, nsamples 8"].line == ((0.5, 15.0),) and len(lines["sparsessm, nsamples 8"].points) == 2
    assert lines["sparsessm, nsamples 64"].line == ((0.5, 12.0), (0.7, 99.0))
    assert first.y.log and not other.y.log and other.note == "all windows of 128 tokens"
    assert lines["sparsessm, nsamples 8"].style != lines["sparsessm, nsamples 64"].style


def test_removed_layers_are_named_and_not_drawn(tmp_path, write_run):
    folder = write_run(tmp_path / "run", method="mamba-shedder", prune_A=True, sparsity=0.5)
    names = [f"backbone.layers.{i}.mixer.A_log" for i in (1, 4)]
    save_file({name: torch.ones(4, 2, dtype=torch.bool) for name in names}, folder / "masks.safetensors")
    (folder / "sparsity.json").write_text(json.dumps({name: {"pruned": 8, "total": 8} for name in names}))
    record = read_run(folder)
    assert record.pattern == "whole SSMs" and figures.share_map(record) == "100 % of A_log in layers 1, 4"
    assert figures.mask_map(record) is figures.state_map(record) is None and figures.state_charts([record]) == []


def test_shares_as_png():
    """Decoded by the letter of the format: header, palette, and two pixels a byte, odd widths padded."""
    shares = np.array([[0.0, 1.0, 0.5], [0.2, 0.0, 1.0]])
    data = share_png(shares, "#102030")
    at, chunks = 8, {}
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        chunks[kind] = data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size]) == zlib.crc32(kind + chunks[kind])
        at += 12 + size
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and chunks[b"IHDR"] == bytes([0, 0, 0, 3, 0, 0, 0, 2, 4, 3, 0, 0, 0])
    assert chunks[b"PLTE"] == bytes([16, 32, 48]) * 16 and chunks[b"tRNS"][0] == 0 and chunks[b"tRNS"][15] == 255
    assert zlib.decompress(chunks[b"IDAT"]) == bytes([0, 0x0F, 0x80, 0, 0x30, 0xF0])


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
    for names, colours in zip(blocks, (palette.LIGHT, palette.DARK), strict=False):
        for ground in (names["paper"], names["card"], names["faint"]):
            assert all(contrast(names[kind], ground) >= 4.5 for kind in ("ink", "muted", "link"))
        assert all(contrast(colour, names["card"]) >= 3 for colour in (*colours, palette.HEAT))
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

    for colours in (palette.LIGHT, palette.DARK):
        for seen in blind:
            points = [lab(seen @ linear(colour)) for colour in colours]
            assert min(np.linalg.norm(a - b) for a, b in combinations(points, 2)) > 20
    looks = list(palette.METHOD_STYLES.values())
    assert len({(look.marker, look.dash, look.colour) for look in looks}) == len(looks)


@pytest.mark.parametrize(("value", "shown"), [(67.684, "67.68"), (1234.56, "1234.6"), (2.31e7, "2.3e+07")])
def test_perplexities_read_well(value, shown):
    assert perplexity_text(value) == shown


def test_names_are_as_short_as_they_can_be():
    names = ["/data/a/wikitext2", "/data/b/wikitext2", "ptb", "state-spaces/mamba-130m", "./models/x/"]
    assert list(short_names(names).values()) == ["a/wikitext2", "b/wikitext2", "ptb", "state-spaces/mamba-130m", "x"]


def test_axes_hold_their_data_and_names_do_not_overlap():
    lines = tuple(
        figures.Series(f"method {i}", palette.plain_style(i), ((0.5, 60 + i / 100, ""),), ((0.3, 50.0), (0.5, 60 + i / 100)))
        for i in range(9)
    )
    axes = figures.Axis("sparsity", "percent"), figures.Axis("perplexity")
    drawn = svg.line_chart(figures.LineChart("k", "t", "", *axes, lines, level=(40.0, "dense")))
    height = float(re.search(r'viewBox="0 0 560 (\d+)"', drawn)[1])
    places = [tuple(map(float, place)) for place in re.findall(r"translate\(([\d.]+) ([\d.]+)\)", drawn)]
    assert len(places) == 18 and all(0 < x < 560 and 0 < y < height for x, y in places)
    names = re.findall(r'<text x="[\d.]+" y="([\d.]+)">method \d</text>', drawn)
    tops = sorted(map(float, names))
    assert len(tops) == 9 and all(b - a >= 15.9 for a, b in pairwise(tops))
    assert {"30 %", "50 %"} <= set(re.findall(r">(\d+ %)</text>", drawn))


def test_logarithmic_ticks_are_within_the_plot():
    line = figures.Series("m", palette.plain_style(0), (), ((0.1, 20.0), (0.9, 4e6)))
    drawn = svg.line_chart(figures.LineChart("k", "t", "", figures.Axis("x"), figures.Axis("y", log=True), (line,)))
    ticks = [(float(y), name) for y, name in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', drawn)]
    assert [name for _, name in ticks] == ["10", "100", "1000", "1e4", "1e5", "1e6"]
    steps = [a - b for (a, _), (b, _) in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * 5, abs=0.02) and "log scale" in drawn
