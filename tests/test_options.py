"""The command line's arguments: spellings that must work, and mistakes that must be named in one line."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import MambaConfig, MambaForCausalLM

from sparsessm import commandline, options
from sparsessm.errors import InputError
from sparsessm.models.architecture import Layout
from sparsessm.procedure.fitness import check_model
from sparsessm.procedure.plan import plan_of
from sparsessm.pruning.methods import METHODS
from sparsessm.pruning.patterns import Columns, NofM, Unstructured
from sparsessm.version import __version__


def parse(argv):
    chosen, resumed = commandline.parse(argv)
    assert resumed is None
    return chosen


with torch.device("meta"):
    SMALL = Layout(MambaForCausalLM(
        MambaConfig(hidden_size=24, state_size=12, num_hidden_layers=3, conv_kernel=4, vocab_size=64)
    ))  # fmt: skip


def plan(argv):
    chosen = parse(argv)
    return plan_of(chosen, SMALL.targets(chosen.target_modules, chosen.parts, chosen.module))


BASE = ["demo", "demo"]
PRUNE = [*BASE, "--method", "sparsessm", "--prune_A", "--sparsity", "0.5"]


@pytest.mark.parametrize(
    ("argv", "wanted"), [([], False), (["--prune_A"], True), (["--prune_A", "True"], True), (["--prune_A", "False"], False),
                          (["--prune_A=True"], True), (["--prune_A=false"], False)]
)  # fmt: skip
def test_booleans_take_no_word_or_true_or_false(argv, wanted):
    assert parse([*BASE, "--method", "magnitude", "--prune_layers", "--sparsity", "0.5", *argv]).prune_A is wanted


def test_released_defaults():
    chosen = parse(PRUNE)
    found = (chosen.nsamples, chosen.seqlen, chosen.seed, chosen.recipe.percdamp, chosen.blocksize, chosen.alpha)
    assert found == (128, 2048, 0, 0.01, 128, 0.0)
    assert (chosen.minlayer, chosen.maxlayer, chosen.target_modules) == (-1, 1000, ("nn.Linear", "nn.Conv1d"))


@pytest.mark.parametrize(
    ("method", "given", "wanted"),
    [("sparsegpt", [], 0.01), ("sparsessm_obs", [], 0.1), ("sparsessm_obs", ["--percdamp", "0.01"], 0.01)],
)
def test_the_damping_is_the_methods_unless_it_is_given(method, given, wanted):
    found = plan([*BASE, "--method", method, "--prune_A", "--prune_layers", "--sparsity", "0.5", *given])
    assert (found.transitions.percdamp, found.weights.percdamp) == (wanted, wanted)


def test_the_readmes_spellings():
    argv = [*BASE, "--method", "sparsessm", "--prune_layer", "True", "--sparsity", "0.5",
             "--target_modules", "nn.Conv1d", "nn.Linear", "--alpha", "0.04"]  # fmt: skip
    weights = plan(argv).weights
    assert weights.modules == ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj") and weights.alpha == 0.04


def test_model_and_dataset_as_flags():
    chosen = parse(["--model_path", "demo", "--dataset", "wikitext2"])
    assert (chosen.model, chosen.dataset) == ("demo", "wikitext2")


def test_a_pattern_for_each_structure():
    assert plan(PRUNE).transitions.pattern == Unstructured(0.5)
    assert plan([*PRUNE, "--prunen", "2", "--prunem", "4"]).transitions.pattern == NofM(2, 4)
    columns = [*BASE, "--method", "structure_ts", "--prune_A", "--sparsity", "0.25"]
    assert plan(columns).transitions.pattern == Columns(0.25)


def test_overrides_replace_one_part_of_the_method():
    found = plan([*PRUNE, "--saliency", "transition", "--aggregate", "window", "--time_window", "0.5"]).transitions
    assert (found.saliency, found.aggregate, found.parameter) == ("transition", "window", 0.5)
    found = plan([*PRUNE, "--aggregate", "discount"]).transitions
    assert (found.saliency, found.aggregate, found.parameter) == ("a_log", "discount", 0.9)


def test_alpha_spreads_only_where_the_method_says_so():
    argv = [*BASE, "--prune_layers", "--sparsity", "0.5", "--alpha", "0.1", "--method"]
    assert plan([*argv, "sparsessm_dev"]).weights.alpha == 0.1
    assert plan([*argv, "sparsegpt"]).weights.alpha == 0.0


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.removes_parts])
def test_every_method_does_what_its_row_says(name):
    method = METHODS[name]
    share = ["--prunen", "2", "--prunem", "4"] if method.needs_n_of_m else ["--sparsity", "0.5"]
    for flag, able in (("--prune_A", method.prunes_A_log), ("--prune_layers", method.weights is not None)):
        argv = [*BASE, "--method", name, flag, *share]
        if able:
            parse(argv)
        else:
            with pytest.raises(InputError, match="has no rule for"):
                parse(argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["demo"], "give a MODEL and a DATASET"),
        ([*BASE, "more"], "got 3 arguments"),
        ([*BASE, "--dataset", "c4"], "given twice"),
        ([*BASE, "--colour", "red"], "unrecognized arguments"),
        ([*BASE, "--nsample", "3"], "unrecognized arguments"),
        ([*PRUNE, "--method", "sparsesm"], "invalid choice"),
        ([*PRUNE, "--prune_A", "perhaps"], "expected True or False"),
        ([*PRUNE, "--sparsity", "1"], "--sparsity must lie between 0 and 1"),
        ([*PRUNE, "--sparsity", "0"], "--sparsity must lie between 0 and 1"),
        ([*PRUNE, "--sparsity", "nan"], "--sparsity must lie between 0 and 1"),
        ([*PRUNE, "--nsamples", "0"], "--nsamples must be at least 1"),
        ([*PRUNE, "--seqlen", "0"], "--seqlen must be at least 1"),
        ([*PRUNE, "--seqlen", "1"], "--seqlen must be at least 2"),
        ([*PRUNE, "--eval_windows", "0"], "--eval_windows must be at least 1"),
        ([*PRUNE, "--memory_budget", "-1"], "--memory_budget must not be negative"),
        (["--resume", "nowhere"], "holds no options.json"),
        (["--resume", "nowhere", "--seed", "1"], "leave out all others"),
        ([*PRUNE, "--percdamp", "-1"], "--percdamp must not be negative"),
        ([*PRUNE, "--alpha", "0.5"], "keep alpha below 0.5"),
        ([*PRUNE, "--sparsity", "0.1", "--alpha", "0.2"], "keep alpha below 0.1"),
        ([*PRUNE, "--alpha", "-0.1"], "--alpha must not be negative"),
        ([*PRUNE, "--prunen", "4", "--prunem", "4"], "--prunen must be at least 1 and below --prunem"),
        ([*PRUNE, "--prunen", "0", "--prunem", "4"], "--prunen must be at least 1 and below --prunem"),
        ([*PRUNE, "--prunen", "1", "--prunem", "4"], "contradicts 1:4"),
        ([*PRUNE, "--prunen", "2", "--prunem", "4", "--blocksize", "6"], "must divide --blocksize"),
        ([*PRUNE, "--prunen", "2", "--prunem", "4", "--alpha", "0.1"], "leave it out with --prunen"),
        ([*PRUNE, "--time_window", "0"], "--time_window"),
        ([*PRUNE, "--time_discount", "0"], "--time_discount"),
        ([*BASE, "--method", "sparsessm", "--sparsity", "0.5"], "give --prune_A, --prune_layers or both"),
        ([*BASE, "--method", "sparsessm", "--prune_A"], "needs --sparsity"),
        ([*BASE, "--method", "ts_semi", "--prune_A", "--sparsity", "0.5"], "needs N:M"),
        ([*BASE, "--method", "structure_ts", "--prune_A", "--prunen", "2", "--prunem", "4"], "removes whole states"),
        ([*BASE, "--method", "sparsegpt", "--prune_A", "--sparsity", "0.5", "--saliency", "a_log"], "does not score A_log"),
        ([*BASE, "--method", "sparsegpt", "--prune_A", "--sparsity", "0.5", "--search", "greedy"], "how entries interact"),
        ([*BASE, "--prune_A"], "say how to prune with --method"),
        ([*BASE, "--sparsity", "0.5"], "say how to prune with --method"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(argv, says):
    with pytest.raises(InputError, match=says) as caught:
        parse(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*PRUNE, "--minlayer", "3"], "leave none of the model's 3 layers"),
        ([*PRUNE, "--prunen", "4", "--prunem", "8"], "--prunem 8 does not divide the 12 entries of a row of A_log"),
        ([*BASE, "--method", "structure_ts", "--prune_A", "--sparsity", "0.5", "--minlayer", "1"], "needs every layer"),
        ([*BASE, "--method", "structure_ts", "--prune_A", "--sparsity", "0.01"], "removes none or all of the 12 states"),
        ([*BASE, "--method", "sparsegpt", "--prune_layers", "--prunen", "2", "--prunem", "4"], "2 columns of dt_proj"),
        ([*BASE, "--method", "sparsegpt", "--prune_layers", "--prunen", "4", "--prunem", "8",
          "--target_modules", "nn.Conv1d"], "4 columns of conv1d"),
    ],
)  # fmt: skip
def test_mistakes_that_the_config_shows(argv, says):
    with pytest.raises(InputError, match=says):
        check_model(parse(argv), SMALL)


def test_layer_range_is_cut_to_the_model():
    assert check_model(parse(PRUNE), SMALL) == (0, 3)
    assert check_model(parse([*PRUNE, "--minlayer", "1", "--maxlayer", "2"]), SMALL) == (1, 2)


# --- help, versions, files of options


def told(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        commandline.parse(argv)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_has_every_option_once_and_the_common_ones_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = told(capsys, "--help").splitlines()
    assert len("\n".join(lines).split("\n\n")[0].splitlines()) == 3  # the usage
    flags = [line.split()[0].rstrip(",") for line in lines if line.startswith("  --")]
    names = ["model_path" if spec.name == "model" else spec.name for spec in dataclasses.fields(options.Options)]
    assert flags == [*(f"--{name}" for name in names), "--config", "--resume", "--version"]
    assert flags[:7] == ["--model_path", "--dataset", "--method", "--prune_A", "--prune_layers", "--sparsity", "--nsamples"]
    assert [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")] == [
        *options.GROUPS.values(), "instead of options, and about this program", "methods",
    ]  # fmt: skip
    assert {line.split()[0] for line in lines[lines.index("methods:") + 1 :]} == METHODS.keys()
    assert any("--nsamples N" in line and "(default: 128)" in line for line in lines)
    assert not any("None" in line or "BOOL" in line for line in lines)


def test_help_and_version_wait_for_no_torch():
    code = (
        "import sys\nfrom sparsessm.__main__ import main\n"
        "try: main([sys.argv[1]])\nfinally: assert 'torch' not in sys.modules"
    )
    for flag, says in (("--help", "usage: "), ("--version", f"sparsessm {__version__} (python ")):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(says), done.stderr


def test_the_version_is_that_of_the_package_and_of_torch(capsys):
    assert told(capsys, "--version").strip().endswith(f"torch {torch.__version__}, transformers {transformers.__version__})")


def config_file(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    return ["--config", str(tmp_path / "run.yaml")]


def test_a_file_of_options_says_the_same_as_flags_and_the_command_line_wins(tmp_path):
    file = config_file(
        tmp_path,
        "model: demo\ndataset: wikitext2\nmethod: sparsessm\nprune_A: true\nprune_layer: yes\nsparsity: 0.5\n"
        "target_modules: [nn.Linear]\nalpha: 4e-2\nmodule: null\nseed: 3\n",
    )
    argv = ["demo", "wikitext2", "--method", "sparsessm", "--prune_A", "--prune_layers", "--sparsity", "0.5",
            "--target_modules", "nn.Linear", "--alpha", "0.04", "--seed", "3"]  # fmt: skip
    assert parse(file) == parse(argv)
    over = ["--seed", "4", "--target_modules", "nn.Conv1d", "nn.Linear", "--prune_A", "False"]
    assert parse([*file, *over]) == parse([*argv, *over])
    assert parse([*over, *file]) == parse([*argv, *over])
    assert parse(["other", "ptb", *file]) == parse(["other", "ptb", *argv[2:]])
    assert parse(["--dataset", "c4", *file]) == parse(["demo", "c4", *argv[2:]])


def test_the_options_of_a_run_are_a_file_of_options(tmp_path):
    chosen = parse([*PRUNE, "--ppl_datasets", "ptb", "demo", "--alpha", "0.04", "--save", str(tmp_path / "out")])
    (tmp_path / "options.json").write_text(json.dumps(dataclasses.asdict(chosen)))
    assert parse(["--config", str(tmp_path / "options.json")]) == chosen
    assert parse(["--config", str(tmp_path / "options.json"), "--seed", "7"]).seed == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sparsitty: 0.5", "there is no option sparsitty, did you mean sparsity?"),
        ("resume: runs/1", "there is no option resume"),
        ("3: 4", "there is no option 3"),
        ("seed: fast", "argument --seed: invalid int value: 'fast'"),
        ("calib_batch: most", "argument --calib_batch: expected a number or auto, not 'most'"),
        ("method: best", "argument --method: invalid choice: 'best'"),
        ("prune_layers: true\nprune_layer: true", "gives prune_layers twice"),
        ("method: {name: sparsessm}", "method must be a value or a list of values"),
        ("- demo\n- demo", "holds no options"),
        ("", "holds no options"),
        ("a: [", "cannot be read"),
    ],
)
def test_mistakes_in_a_file_of_options(tmp_path, text, says):
    with pytest.raises(InputError) as caught:
        parse([*BASE, *config_file(tmp_path, text)])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_options_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        parse([*BASE, "--config", str(tmp_path / "none.yaml")])
