"""The page in a real browser: widths, keyboard, dark mode, paper; needs the Chromium of the system."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib

import pytest

from sparsessm.report.results import read_runs

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (380, 800, 1400)

# Pairs of texts of one picture whose boxes overlap by more than a pixel, what hangs out of its picture, and small text.
TEXTS = """() => [...document.querySelectorAll(".picture svg")].filter((svg) => svg.checkVisibility()).flatMap((svg) => {
  const named = [...svg.querySelectorAll("text")].map((text) => [text.textContent.trim(), text.getBoundingClientRect()]);
  const [frame, wrong] = [svg.getBoundingClientRect(), []];
  named.forEach(([name, a], i) => {
    if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.bottom > frame.bottom + 1) wrong.push(`out: ${name}`);
    if (Math.max(a.width, a.height) < 8) wrong.push(`small: ${name}`);
    for (const [other, b] of named.slice(i + 1)) {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      if (across > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) wrong.push(`${name} / ${other}`);
    }
  });
  return wrong.map((words) => `${svg.ariaLabel.slice(0, 40)}: ${words}`);
})"""

# Paths of runs that hang out of the line that names the run.
PATHS = """() => [...document.querySelectorAll("summary .path")].filter((path) =>
  path.getBoundingClientRect().bottom > path.parentElement.getBoundingClientRect().bottom).map((path) => path.textContent)"""

# The lowest contrast (WCAG) of any text that can be seen with the ground that it stands on, and the words.
CONTRAST = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const groundOf = (part) => {
    const ground = getComputedStyle(part).backgroundColor;
    return ground === "rgba(0, 0, 0, 0)" ? groundOf(part.parentElement) : ground;
  };
  const found = [...document.querySelectorAll("h1, h2, p, a, td, th button, dt, dd, summary span, figcaption, svg text")]
    .filter((part) => part.textContent.trim() && part.checkVisibility())
    .map((part) => {
      const style = getComputedStyle(part);
      const ink = part.matches("svg text") ? style.fill : style.color;
      const [a, b] = [light(ink), light(groundOf(part))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), part.textContent.trim()];
    });
  return found.sort((one, other) => one[0] - other[0])[0];
}"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        assert not os.environ.get("SPARSESSM_NEEDS_BROWSER"), "there is no chromium, and SPARSESSM_NEEDS_BROWSER is set"
        pytest.skip("there is no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(experiments, run_report, write_run, tmp_path_factory):
    """The page of the real runs, and of some that have long names, many variants, and parts that were removed."""
    base = tmp_path_factory.mktemp("browser")
    shutil.copytree(experiments, base / "e")
    options = {"method": "sparsessm", "prune_layers": True, "sparsity": 0.5, "model": "models/a-hybrid"}
    shares = {"sparsity": {"ssm": 0.0, "layers": 0.3, "mixer": 0.25, "attention": 0.4, "mlp": 0.123}}
    for index, sparsity in enumerate((0.1, 0.3, 0.5, 0.9)):
        value = {"perplexity": {"demo": 60.0 * 30**index}, "dense_perplexity": {"demo": 50.0}}
        write_run(base / "e" / f"h{index}", value | shares, **options | {"sparsity": sparsity, "alpha": 0.01 * index})
        write_run(base / "e" / f"w{index}", value, **options | {"ridge": 0.1 * index, "compensate": "out_proj"})
    removed = write_run(base / "e" / "removed", **options | {"method": "mamba-shedder"})
    steps = [{"event": "layer", "layer": layer, "perplexity": 50.0 + layer} for layer in range(12)]
    (removed / "events.jsonl").write_text("\n".join(map(json.dumps, steps)))
    target = base / "report.html"
    assert run_report([base / "e", "-o", target]) == 0
    return target


@pytest.fixture
def open_page(browser):
    """open_page(file, width=..., dark=..., fragment=...) -> a page; the test fails if it fetched or reported anything."""
    pages, heard = [], []

    def open_one(file, width=1400, dark=False, fragment=""):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        for event in ("console", "pageerror", "dialog"):
            page.on(event, lambda said: heard.append(str(said)))
        page.on("request", lambda asked: heard.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
        page.goto(file.as_uri() + fragment)
        pages.append(page)
        return page

    yield open_one
    for page in pages:
        page.close()
    assert not heard


def column(page, head):
    """The exact values of a column of the results, in the order of the rows that can be seen."""
    names = page.locator("#results thead button").all_inner_texts()
    rows = page.locator("#results tbody tr:not([hidden])")
    return rows.evaluate_all("(rows, i) => rows.map((row) => row.cells[i].dataset.value)", names.index(head))


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overlaps_at_any_width(report, open_page, width):
    page = open_page(report, width)
    page.locator("#open-all").click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(TEXTS) == [] == page.evaluate(PATHS)
    assert page.locator("details.run[open]").count() == 14 and page.locator(".picture svg").count() >= 18


@pytest.mark.slow
def test_it_is_sorted_and_filtered_by_keyboard(report, open_page):
    page = open_page(report)
    values = [float(value) for value in column(page, "perplexity demo")]
    page.get_by_role("button", name="perplexity demo", exact=True).focus()
    for key, order, reverse in (("Enter", "ascending", False), ("Space", "descending", True)):
        page.keyboard.press(key)
        assert [float(value) for value in column(page, "perplexity demo")] == sorted(values, reverse=reverse)
        assert page.locator("#results th[aria-sort]").get_attribute("aria-sort") == order
    page.get_by_role("button", name="sparsity", exact=True).click()
    assert column(page, "sparsity")[-1] == ""  # what has none stands last
    page.get_by_label("method").focus()
    page.keyboard.type("mag")
    assert column(page, "method") == ["magnitude"] and page.locator("#shown").inner_text() == "1 of 14 runs"
    assert page.locator("details.run:not([hidden])").count() == page.locator("#cost tbody tr:not([hidden])").count() == 1


@pytest.mark.slow
def test_it_can_be_read_by_day_and_by_night(report, open_page):
    grounds = set()
    for dark in (False, True):
        page = open_page(report, dark=dark)
        page.locator("#open-all").click()
        lowest, words = page.evaluate(CONTRAST)
        assert lowest >= 4.5, words
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == {"rgb(251, 250, 247)", "rgb(20, 23, 27)"}


@pytest.mark.slow
def test_paper_has_no_empty_page_and_no_cut_picture(report, open_page):
    page = open_page(report, dark=True)
    data = page.pdf(prefer_css_page_size=True)
    streams = {}
    compressed = rb"\n(\d+) 0 obj\n<<[^>]*/FlateDecode[^>]*>>\s*stream\r?\n(.*?)\r?\nendstream"
    for number, stream in re.findall(compressed, data, re.S):
        streams[int(number)] = zlib.decompressobj().decompress(stream)
    pages = [int(number) for number in re.findall(rb"/Type /Page\b[^e].*?/Contents (\d+) 0 R", data, re.S)]
    texts = [len(re.findall(rb"T[jJ]\b", streams[number])) for number in pages]
    assert 4 <= len(texts) <= 9 and min(texts) >= 10
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRAST)[0] >= 4.5


def test_a_link_to_a_run_opens_it(report, open_page):
    page = open_page(report, fragment="#run-5")
    assert page.locator("#run-5").get_attribute("open") is not None
    assert page.locator("details.run[open]").count() == 2
    row = next(i for i, record in enumerate(read_runs(report.parent / "e").finished, 1) if record.method == "magnitude")
    page.locator(f'#results a[href="#run-{row}"]').click()
    assert "magnitude" in page.locator(f"#run-{row}[open] summary").inner_text()


def test_hostile_names_run_nothing(hostile, tmp_path, run_report, open_page):
    assert run_report([tmp_path / "e", "-o", tmp_path / "r.html"]) == 0
    page = open_page(tmp_path / "r.html")
    assert page.title() == "Pruning runs: e" and page.locator("img").count() == 0
