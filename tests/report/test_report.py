"""The page of many runs: what it says and links to, and that nothing in it comes alive that should not."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from markupsafe import escape

from sparsessm.report.results import read_run, read_runs
from sparsessm.report.wording import short_names


@pytest.fixture(scope="module")
def page(experiments, run_report, tmp_path_factory):
    target = tmp_path_factory.mktemp("page") / "report.html"
    assert run_report([experiments, "-o", target]) == 0
    return target


class Page(HTMLParser):
    """Tables as rows of cells (value, text), the kinds of elements, attributes of links, and what was left open."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.links, self.ids, self.rows, self.events = [], [], [], [], {}, []
        self.table = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.names.append(tag)
        self.events += [name for name in attrs if name.startswith("on")]
        self.links += [attrs[key] for key in ("href", "src") if key in attrs]
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "caption":
            self.table = self.rows.setdefault(attrs["id"], [])
        if tag == "tr" and self.table is not None:
            self.table.append([])
        if tag in ("td", "th") and self.table is not None:
            self.table[-1].append([attrs.get("data-value"), ""])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.table = None

    def handle_data(self, data):
        if (self.table and self.table[-1] and self.open[-1] not in ("span",)) or (self.table and "td" in self.open):
            self.table[-1][-1][1] += data


def parsed(page):
    found = Page(page.read_text())
    assert found.open == []
    return found


def table_of(found, name):
    head, *rows = found.rows[name]
    return [{title[1].strip(): [cell[0], cell[1].strip()] for title, cell in zip(head, row, strict=True)} for row in rows]


def test_the_table_shows_the_figures_of_metrics_json(page, experiments):
    found = parsed(page)
    rows = {row["run folder"][1].split("/")[0]: row for row in table_of(found, "results-table")}
    assert len(rows) == 5
    for record in read_runs(experiments).finished:
        row, metrics = rows[record.name.split("/")[0]], record.metrics
        assert float(row["perplexity demo"][0]) == metrics["perplexity"]["demo"]
        assert row["perplexity demo"][1] == f"{metrics['perplexity']['demo']:.2f}"
        assert float(row["seconds"][0]) == sum(metrics["seconds"].values())
        assert int(row["peak memory"][0]) == metrics["peak_memory_bytes"]["process"]
        assert row["method"][1] == (record.options["method"] or "dense") and row["seed"][1] == str(record.options["seed"])
    assert rows["all"]["pruned"][1] == "A_log 50 %, weights 50 %" and rows["dense"]["pruned"][1] == "nothing"
    assert rows["vote"]["sparsity"] == ["0.3", "30 %"] and rows["dense"]["sparsity"] == ["", "–"]
    assert rows["all"]["alpha"][1] == "0.04" and rows["vote"]["alpha"][1] == "–"
    times = {row["run folder"][1].split("/")[0]: row for row in table_of(found, "cost-table")}
    record = read_run(next(experiments.glob("vote/*")))
    assert float(times["vote"]["prune"][0]) == record.metrics["seconds"]["prune"]
    assert int(times["vote"]["peak after load"][0]) == record.memory_after["load"]["process"]


def test_the_page_stands_alone(page, experiments):
    text, found = page.read_text(), parsed(page)
    assert not re.search(r"https?://", re.sub(r'xmlns(:xlink)?="http://www.w3.org/[0-9]{4}/(svg|xlink)"', "", text))
    assert "1 unfinished run: stopped/20260101-000000" in text and "torch&nbsp;" in text
    assert len(set(found.ids)) == len(found.ids)
    for link in found.links:
        if link.startswith("#"):
            assert link[1:] in found.ids
        elif not link.startswith("data:image/png;base64,"):
            assert (page.parent / link / "metrics.json").is_file()
    assert sum(link.startswith("./../") or link.startswith("./") for link in found.links) == 2 * 5
    (content,) = re.findall("<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert not list(page.parent.glob(".*"))


def test_the_page_draws_every_picture(page):
    text = page.read_text()
    labels = [html.unescape(label) for label in re.findall(r'role="img" aria-label="([^"]*)"', text)]
    starts = ["demo on demo: A_log pruned.", "demo on demo: A_log + weights pruned.", "demo: 30 % of A_log.",
              "demo: 50 % of A_log.", "demo: sparsessm, A_log + weights 50 %, alpha 0.04.", "Windows of 128 tokens.",
              "Pruned share by module and layer", "Pruned share of A_log by layer and state", "Masks of A_log"]  # fmt: skip
    assert all(any(label.startswith(start) for label in labels) for start in starts)
    assert len(labels) == 6 + 4 * 2 + 1  # charts, states and masks of four runs, the shares of one
    (chart,) = [label for label in labels if label.startswith("demo on demo: A_log pruned.")]
    assert re.search(r"magnitude: \d+(\.\d+)? at 50 %", chart)
    assert "30 % of A_log in 6 layers" in text


def test_zero_shot_and_infinite_perplexity_are_shown(tmp_path, capsys, run_report, write_run):
    tasks = {"piqa": {"metric": "acc", "value": 0.6, "stderr": 0.1, "documents": 9}, "mean": {"value": 0.6, "stderr": 0.1}}
    write_run(tmp_path / "e" / "one", {"perplexity": {"demo": math.inf, "ptb": 12345.678}, "zero_shot": tasks})
    peaks = {"process": 1, "cuda": 2**31}
    write_run(tmp_path / "e" / "two", {"perplexity": {"demo": math.nan, "ptb": 3e7}, "peak_memory_bytes": peaks})
    assert run_report([tmp_path / "e", "-o", tmp_path / "r.html"]) == 0
    assert "2 runs" in capsys.readouterr().out
    one, two = table_of(parsed(tmp_path / "r.html"), "results-table")
    assert one["perplexity demo"] == ["Infinity", "inf"] and two["perplexity demo"] == ["", "not a number"]
    assert (one["perplexity ptb"][1], two["perplexity ptb"][1]) == ("12345.68", "3.00e+07")
    assert one["zero\u2011shot mean"] == ["0.6", "60 %"] and two["zero\u2011shot mean"][0] == ""
    assert two["peak cuda"] == [str(2**31), "2.00 GiB"] and one["peak cuda"][0] == ""
    assert "because it is not finite: one, two" in (tmp_path / "r.html").read_text()


def test_nothing_that_a_file_says_becomes_markup(hostile, tmp_path, run_report):
    target = tmp_path / "r.html"
    assert run_report([tmp_path / "e", "-o", target]) == 0
    text, found = target.read_text(), parsed(target)
    assert found.names.count("script") == 1 and "img" not in found.names and not found.events and "i" not in found.names
    assert str(escape(hostile.text)) in text and hostile.text not in text and "<i>stopped" not in text
    assert not [link for link in found.links if not link.startswith(("#", "./", "data:image/png;base64,"))]
    rows = table_of(found, "results-table")
    head = f"perplexity {short_names([hostile.text])[hostile.text]}"
    assert rows[0]["method"][1] == hostile.text and rows[0][head][0] == "9.0"
    (link,) = {link for link in found.links if link.startswith("./")}
    assert ":" not in link and (tmp_path / re.sub(r"%(..)", lambda m: chr(int(m[1], 16)), link)).samefile(hostile.folder)


def test_damaged_runs_are_left_out_and_named(experiments, tmp_path, capsys, run_report):
    shutil.copytree(experiments, tmp_path / "e")
    (magnitude,), (vote,), (dev,) = (list((tmp_path / "e").glob(f"{name}/*")) for name in ("magnitude", "vote", "dev"))
    (magnitude / "metrics.json").write_text("{")
    (vote / "masks.safetensors").write_bytes((vote / "masks.safetensors").read_bytes()[:-9])
    (dev / "metrics.json").write_text(json.dumps({"perplexity": {"demo": "<b>"}}))
    runs = read_runs(tmp_path / "e")
    assert len(runs.finished) == 2 and [name.split("/")[0] for name, _ in runs.damaged] == ["dev", "magnitude", "vote"]
    reasons = ["metrics.json: perplexity", "metrics.json cannot", "masks.safetensors cannot"]
    assert all(why.startswith(reason) for (_, why), reason in zip(runs.damaged, reasons, strict=True))
    assert run_report([tmp_path / "e", "-o", tmp_path / "r.html"]) == 0
    assert "3 damaged runs: dev/" in (tmp_path / "r.html").read_text() and "4 left out" in capsys.readouterr().out


@pytest.mark.parametrize(("case", "says"), [("empty", "holds no finished run"), ("missing", "is not a folder"),
                                            ("unfinished", "1 unfinished run: stopped")])  # fmt: skip
def test_no_run_is_one_line_and_code_2(tmp_path, capsys, case, says, run_report, write_run):
    folder = tmp_path / case
    if case != "missing":
        folder.mkdir()
    if case == "unfinished":
        (write_run(folder / "stopped") / "metrics.json").unlink()
    assert run_report([folder, "-o", tmp_path / "r.html"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line and not (tmp_path / "r.html").exists()


def test_the_page_is_written_whole_or_not_at_all(tmp_path, capsys, run_report, write_run):
    write_run(tmp_path / "e" / "run")
    folder = tmp_path / "taken"
    folder.mkdir()
    for target in (folder, tmp_path / "missing" / "r.html"):
        assert run_report([tmp_path / "e", "-o", target]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "taken"] and not list(folder.iterdir())
