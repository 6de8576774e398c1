import pytest

from sparsessm import options
from sparsessm.models import architecture
from sparsessm.models.family import ARCHITECTURES
from sparsessm.procedure.rules import RULES
from sparsessm.pruning.methods import AGGREGATES, METHODS, SEARCHES, STRUCTURES
from sparsessm.pruning.saliency import SALIENCIES

# The method tables of the specification: saliency, aggregation over time, structure.
ON_A_LOG = {
    "sparsessm": ("a_log", "vote", "entries"),
    "sparsessm_dev": ("transition", "power", "entries"),
    "ts_real": ("a_log", "sum", "entries"),
    "ts_semi": ("a_log", "vote", "n:m"),
    "sparsessm_obs": ("output", "sum", "entries"),
    "structure_ts": ("a_log", "vote", "columns"),
}
BY_MAGNITUDE = {"magnitude": "entries", "mag_semi": "n:m", "structure_mag": "columns"}
ON_WEIGHTS = {"magnitude": "magnitude", "wanda": "wanda", "sparsegpt": "obs", "sparsessm": "obs", "sparsessm_dev": "obs"}


def structure(method):
    return "n:m" if method.needs_n_of_m else method.structure


@pytest.mark.parametrize("name", ON_A_LOG)
def test_methods_on_A_log(name):
    method = METHODS[name]
    assert (method.saliency, method.aggregate, structure(method)) == ON_A_LOG[name]
    assert method.prunes_A_log and not method.obs_on_A_log


@pytest.mark.parametrize("name", BY_MAGNITUDE)
def test_methods_by_magnitude_of_A_log(name):
    assert (METHODS[name].saliency, structure(METHODS[name])) == ("magnitude", BY_MAGNITUDE[name])


@pytest.mark.parametrize("name", ["gpt_extend", "sparsegpt"])
def test_obs_on_A_log(name):
    assert METHODS[name].obs_on_A_log and METHODS[name].saliency is None and METHODS[name].prunes_A_log


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_methods_on_weights(name):
    assert METHODS[name].weights == ON_WEIGHTS[name]
    assert (METHODS[name].allocation == "sensitivity") == (name in ("sparsessm", "sparsessm_dev"))


def test_wanda_has_no_rule_for_A_log():
    assert not METHODS["wanda"].prunes_A_log


def test_every_part_that_a_method_names_exists():
    for method in METHODS.values():
        assert method.saliency is None or method.saliency in SALIENCIES
        assert (method.aggregate is None) == (method.saliency is None)
        assert method.aggregate is None or method.aggregate in AGGREGATES
        assert method.structure in STRUCTURES and method.search in SEARCHES
        assert method.weights is None or method.weights in RULES


def test_the_names_that_the_command_line_takes_without_torch_are_those_that_there_are():
    assert set(options.MODULE_KINDS) == architecture.MODULE_KINDS.keys()
    assert options.MODULE_PARTS == architecture.MODULE_PARTS
    mixers = {mixer for row in ARCHITECTURES.values() for mixer in row.mixers.values()}
    assert set(STRUCTURES) == {"entries", *(structure for mixer in mixers for structure in mixer.STRUCTURES)}
