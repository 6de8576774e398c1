"""The README's table of architectures says what the rows of the code say."""

from pathlib import Path

import pytest

from sparsessm.models.architecture import Layout
from sparsessm.models.family import ARCHITECTURES
from sparsessm.models.mamba2 import Mamba2Mixer
from tests.family import CONFIGS, random_model_of

ROOT = Path(__file__).resolve().parent.parent


def table():
    lines = (ROOT / "README.md").read_text().split("| `model_type` |")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]
    return {name.strip("`"): cells for name, *cells in rows}


def test_every_architecture_has_a_row():
    assert list(table()) and table().keys() == ARCHITECTURES.keys() == CONFIGS.keys()


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_can_be_pruned_and_removed(kind):
    ssm, parts, states, heads, layers, dense = table()[kind]
    row, layout = ARCHITECTURES[kind], Layout(random_model_of(kind))
    mixers = [mixer for layer in layout.layers if (mixer := layout.mixer(layer))]
    assert ssm == ("Mamba-2" if isinstance(mixers[0], Mamba2Mixer) else "Mamba-1")
    found = {module.part for layer in layout.layers for module in layout.modules(layer).values()}
    assert {"mixer", *filter(None, parts.split(", "))} == found
    assert states == "any number" and row.shrink["columns"](layout.model.config, 5)
    if not heads:
        assert "heads" not in row.shrink
    else:
        able = set()
        for left in range(1, len(mixers[0].A_log[0])):
            try:
                row.shrink["heads"](layout.model.config, left)
                able.add(left)
            except ValueError:
                pass
        assert able == ({4} if heads == "half" else set(range(1, 8)))
    assert (layers == "yes") == (row.without_layer is not None)
    assert bool(dense) or not layout.dense()
