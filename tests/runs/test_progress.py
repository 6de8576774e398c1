"""How far a run is: the number of layers to come, the bar of a terminal, and the lines elsewhere."""

import io
import logging
import sys

import pytest
import torch

from sparsessm.models.mamba1 import Mamba1Mixer
from sparsessm.options import Options
from sparsessm.procedure.plan import plan_of
from sparsessm.procedure.prune import prune, reports
from sparsessm.pruning.methods import METHODS
from sparsessm.runs import progress
from sparsessm.runs.progress import LogBesideBar, Progress, doing
from tests.conftest import random_model

IDS = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", METHODS)
def test_every_layer_that_is_reported_was_expected(job, name):
    method, seen = METHODS[name], []
    share = {"prunen": 2, "prunem": 4} if method.needs_n_of_m else {"sparsity": 0.5}
    options = Options(
        model="-", dataset="-", method=name, prune_A=method.prunes_A_log or method.removes_parts,
        prune_layers=method.weights is not None, minlayer=1, maxlayer=4,
        alpha=0.04 if method.allocation == "sensitivity" else 0.0, **share,
    )  # fmt: skip
    if method.structure != "entries":
        options = Options(model="-", dataset="-", method=name, prune_A=True, sparsity=0.5)
    model = random_model(num_hidden_layers=5, state_size=8)
    work = job(model, IDS, report=lambda phase, layer, **figures: seen.append((phase, layer)))
    work.first, work.stop = max(0, options.minlayer), min(5, options.maxlayer)
    plan = plan_of(options, Mamba1Mixer.MODULES)
    expected = reports(work, plan)
    prune(work, plan, IDS)
    assert len(seen) == expected > 0


@pytest.fixture
def clock(monkeypatch):
    """What the module takes for the time, in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines():
    """What is logged."""
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("sparsessm")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)


def test_without_a_terminal_there_is_a_line_a_minute(clock, lines, capsys):
    say = logging.getLogger("sparsessm").info
    with Progress(40, "layer", say) as shown, Progress(40, "layer", say, shown=False) as silent:
        for layer in range(10):
            clock[0] += 25
            for one in (shown, silent):
                one.advance()
                one.show(doing("layers", layer), "error=0.5")
    assert lines == [
        "3 of 40 layers after 01:15, 15:25 left, error=0.5: pruning weights, layer 2",
        "6 of 40 layers after 02:30, 14:10 left, error=0.5: pruning weights, layer 5",
        "9 of 40 layers after 03:45, 12:55 left, error=0.5: pruning weights, layer 8",
    ]
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_screen(written):
    """The lines that a terminal shows after what was written, the last one unfinished."""
    lines, line, column = [], [], 0
    for character in written:
        if character == "\n":
            lines.append("".join(line).rstrip())
            line, column = [], 0
        elif character == "\r":
            column = 0
        else:
            line[column : column + 1] = [character]
            column += 1
    return [*lines, "".join(line).rstrip()]


def test_on_a_terminal_lines_and_the_bar_do_not_touch(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger, handler = logging.getLogger("sparsessm.beside"), LogBesideBar()
    logger.addHandler(handler)
    logger.propagate = False
    shown = Progress(4, "layer", logger.info)
    for layer in range(3):
        shown.advance()
        shown.show(doing("eval", layer))
        logger.warning("line %d", layer)
    *above, bar = on_screen(terminal.getvalue())
    assert above == ["line 0", "line 1", "line 2"]
    assert bar.startswith("3 of 4 layers |") and bar.endswith(" left  evaluating, layer 2")
    shown.close()
    assert on_screen(terminal.getvalue()) == [*above, ""]
    logger.removeHandler(handler)
