"""The page in a real browser: widths, keyboard, colours, paper, and nothing that speaks to a console or a network."""

from __future__ import annotations

import os
import re
import shutil
import zlib
from types import SimpleNamespace

import pytest

from sparsessm.report.results import read_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = (380, 800, 1400)

pytestmark = pytest.mark.slow

# Texts of a picture that overlap, or that its edge cuts.
OVERLAPS = """() => [...document.querySelectorAll("figure svg")].flatMap((picture) => {
  const texts = [...picture.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  const edge = picture.getBoundingClientRect();
  const inside = (a) => Math.min(a.left - edge.left, edge.right - a.right, a.top - edge.top, edge.bottom - a.bottom) > -1;
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
  return texts.filter(([, a]) => !inside(a)).map(([text]) => `cut: ${text}`).concat(texts.flatMap(([one, a], i) =>
    texts.slice(i + 1).filter(([, b]) => meet(a, b)).map(([other]) => `${one} | ${other}`)));
})"""

# The lowest contrast of a text with its ground (WCAG), and the text; cells of maps have a ground that is no element.
LOWEST_CONTRAST = """() => {
  const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const weights = [0.2126, 0.7152, 0.0722];
  const light = (colour) => weights.reduce((sum, weight, i) => sum + weight * linear(rgb(colour)[i] / 255), 0);
  const ground = (part) => {
    while (rgb(getComputedStyle(part).backgroundColor)[3] === 0) part = part.parentElement;
    return getComputedStyle(part).backgroundColor;
  };
  const kinds = "h1, h2, p, td, th button, dt, dd, summary span, a, figcaption, small, svg text";
  const texts = [...document.querySelectorAll(kinds)].filter((part) => part.checkVisibility() && part.textContent.trim());
  return texts.filter((part) => !part.closest("[id*='-cell-']")).map((part) => {
    const style = getComputedStyle(part);
    const [a, b] = [light(part.matches("text") ? style.fill : style.color), light(ground(part))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), `${part.tagName}: ${part.textContent.slice(0, 40)}`];
  }).sort((x, y) => x[0] - y[0])[0];
}"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        assert not os.environ.get("SPARSESSM_NEEDS_BROWSER"), "there is no chromium on this machine"
        pytest.skip("there is no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(experiments, run_report, tmp_path_factory):
    target = tmp_path_factory.mktemp("page") / "report.html"
    assert run_report([experiments, "-o", target]) == 0
    return target


@pytest.fixture
def visit(browser):
    """visit(file, width=1400, scheme="light", fragment="") opens a page; what it says and asks for is in `heard`."""
    contexts = []

    def go(file, width=1400, scheme="light", fragment=""):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab, heard = context.new_page(), []
        tab.on("console", lambda message: heard.append(message.text))
        tab.on("pageerror", lambda error: heard.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or heard.append(request.url))
        tab.goto(file.as_uri() + fragment)
        return SimpleNamespace(tab=tab, heard=heard)

    yield go
    for context in contexts:
        context.close()


def open_all(tab):
    tab.locator("#open-all").press("Enter")
    for fold in tab.locator("details.more > summary").all():
        fold.press("Enter")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_or_overlaps(page, visit, width):
    seen = visit(page, width)
    open_all(seen.tab)
    assert seen.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert seen.tab.locator("details.run[open]").count() == 5
    assert seen.tab.evaluate(OVERLAPS) == [] and seen.heard == []
    smallest = seen.tab.evaluate("Math.min(...[...document.querySelectorAll('figure svg text')].map("
                                 "(text) => text.getBoundingClientRect().height))")  # fmt: skip
    assert smallest > 8  # of a line, in pixels


def test_heads_sort_and_filters_choose_by_keyboard(page, experiments, visit):
    seen = visit(page)
    tab = seen.tab

    def column(name):
        head = tab.locator("#results thead th").filter(has=tab.get_by_role("button", name=name, exact=True))
        head.locator("button").press("Enter")
        index = head.evaluate("head => head.cellIndex")
        cells = tab.locator(f"#results tbody tr td:nth-child({index + 1})")
        return cells.evaluate_all("cells => cells.map((cell) => cell.dataset.value)"), head.get_attribute("aria-sort")

    figures_of = sorted(record.perplexity["demo"] for record in read_runs(experiments).finished)
    for order, values in (("ascending", figures_of), ("descending", figures_of[::-1])):
        found, sort = column("perplexity demo")
        assert [float(value) for value in found] == values and sort == order
    assert [column("sparsity")[0] for _ in range(2)] == [["0.3", "0.5", "0.5", "0.5", ""], ["0.5", "0.5", "0.5", "0.3", ""]]
    assert column("method")[0] == ["dense", "magnitude", "sparsessm", "sparsessm", "sparsessm_dev"]
    tab.locator("select[data-filter=method]").focus()
    tab.keyboard.type("sparsessm")
    assert tab.locator("select[data-filter=method]").input_value() == "sparsessm"
    shown = [tab.locator(f"{rows}:visible").count() for rows in ("#results tbody tr", "#cost tbody tr", "details.run")]
    assert shown == [2, 2, 2] and tab.locator("#shown").text_content() == "2 of 5 runs"
    tab.locator("select[data-filter=method]").press("Home")
    assert tab.locator("#results tbody tr:visible").count() == 5 and seen.heard == []


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(251, 250, 247)"), ("dark", "rgb(20, 23, 27)")])
def test_every_text_can_be_read_on_its_ground(page, visit, scheme, ground):
    seen = visit(page, scheme=scheme)
    open_all(seen.tab)
    assert seen.tab.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    contrast, text = seen.tab.evaluate(LOWEST_CONTRAST)
    assert contrast >= 4.5, text


def test_paper_holds_full_pages_and_whole_pictures(page, visit):
    seen = visit(page, width=1047)  # of A4 across, without its margins
    content = seen.tab.pdf(prefer_css_page_size=True)
    objects = dict(re.findall(rb"(\d+) 0 obj\s(.*?)endobj", content, re.S))
    texts = []
    for number in re.findall(rb"/Type /Page\b.*?/Contents (\d+) 0 R", content, re.S):
        stream = objects[number].partition(b"stream\n")[2].partition(b"endstream")[0]
        texts.append(len(re.findall(rb"T[jJ]\b", zlib.decompress(stream))))
    assert 4 <= len(texts) <= 7 and min(texts) >= 20, texts
    seen.tab.emulate_media(media="print")
    assert seen.tab.evaluate("document.documentElement.scrollWidth") <= 1047
    heights = seen.tab.locator("figure").evaluate_all("all => all.map((part) => part.getBoundingClientRect().height)")
    assert max(heights) < 718 / 2  # two rows of pictures on a page


def test_a_link_to_a_run_opens_it(page, visit):
    seen = visit(page, fragment="#run-5")
    assert seen.tab.locator("details.run[open]").evaluate_all("runs => runs.map((run) => run.id)") == ["run-2", "run-5"]


def test_a_marker_tells_its_run(page, visit):
    told = visit(page).tab.locator("#perplexity svg use > title").all_text_contents()
    assert any(re.fullmatch(r"magnitude, A_log 50 %: \d+\.\d\d \(magnitude/.*\)", text) for text in told)


def test_hostile_names_run_nothing(hostile, tmp_path, run_report, visit):
    target = tmp_path / "r.html"
    assert run_report([tmp_path / "e", "-o", target]) == 0
    seen = visit(target)
    assert seen.tab.title() == "Pruning runs: e" and seen.heard == []
