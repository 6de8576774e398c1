"""Which runs count as done, and how a job of many runs resumes; a small program stands in for main.py here."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sparsessm import files
from sparsessm.errors import InputError, Interrupted
from sparsessm.options import PLACES, Options
from sparsessm.runs import grid, progress
from sparsessm.runs.grid import Cell, environment, fill, finished, interrupted

ROOT = Path(__file__).resolve().parents[2]
DENSE = ("demo", "demo", "--seqlen", "64")
PRUNED = (*DENSE, "--method", "sparsessm", "--prune_A", "--sparsity", "0.5")

# Does to a run folder what main.py does, in milliseconds. What each run shall do stands in the plan, by its seed.
STAND_IN = '''
import json, os, signal, sys, time
from pathlib import Path

root = Path(__file__).parent
words = sys.argv[1:]
if words[0] == "--resume":
    run = Path(words[1])
else:
    experiment = Path(words[words.index("--base_dir") + 1], words[words.index("--experiment_name") + 1])
    run = experiment / f"run-{len(list(experiment.iterdir()))}"
    run.mkdir(parents=True)
plan = json.loads((root / "plan.json").read_text())[run.parent.name]
(run / "options.json").write_text(json.dumps(plan["options"]))
seed = plan["options"]["seed"]
with (root / "calls").open("a") as calls:
    calls.write(json.dumps({"seed": seed, "resumed": words[0] == "--resume", "pid": os.getpid(),
                            "cuda": os.environ.get("CUDA_VISIBLE_DEVICES"), "omp": os.environ.get("OMP_NUM_THREADS"),
                            "group": os.environ.get("WANDB_RUN_GROUP")}) + "\\n")
if plan["do"] == "fail":
    print("Traceback and so on", file=sys.stderr)
    sys.exit("error: the weights are bad")
if plan["do"] == "refuse to resume" and words[0] == "--resume":
    sys.exit(2)
if plan["do"] == "hang":
    time.sleep(60)
if plan["do"] == "hang on":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    (root / "deaf").touch()
    time.sleep(60)
if plan["do"] == "linger":
    time.sleep(0.5)
if plan["do"] == "meet":
    while len((root / "calls").read_text().splitlines()) < 2:
        time.sleep(0.01)
(run / "metrics.json").write_text("{}")
'''


class Stage:
    """A base_dir, cells, and the stand-in that runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "runs"
        self.plan = {}
        (folder / "main.py").write_text(STAND_IN)

    def cell(self, seed: int, do: str = "finish") -> Cell:
        """A cell whose run does what the plan says: finish, linger, fail, hang, hang on, meet, or refuse to resume."""
        cell = Cell(f"seed {seed}", (*PRUNED, "--seed", str(seed)))
        self.plan[cell.name] = {"options": record(cell), "do": do}
        (self.folder / "plan.json").write_text(json.dumps(self.plan))
        return cell

    @property
    def calls(self) -> list[dict]:
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def seeds(self) -> list[int]:
        return [call["seed"] for call in self.calls]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "COMMAND", (sys.executable, str(tmp_path / "main.py")))
    monkeypatch.setattr(grid, "_LOOK", 0.05)
    return Stage(tmp_path)


def record(cell, **changes):
    """options.json of a cell's run."""
    places = {name: f"another {name}" for name in PLACES}
    return {**cell.settings, **places, "experiment_name": cell.name, **changes}


def leave(base, cell, name, options, metrics=None):
    """A run folder as a run leaves it; without metrics it broke off."""
    run = base / cell.name / name
    run.mkdir(parents=True)
    (run / "options.json").write_text(json.dumps(options))
    if metrics is not None:
        (run / "metrics.json").write_text(json.dumps(metrics))
    return run


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "words",
    [("--model_path=demo", "--dataset=demo", "--prune_A=True", "--sparsity=0.5", "--method=sparsessm", "--seqlen=64"),
     (*PRUNED, "--alpha", "0.0", "--target_modules", "nn.Linear", "nn.Conv1d"),
     (*PRUNED, "--base_dir", "b", "--offload", "disk", "--log_wandb")],
)  # fmt: skip
def test_one_run_has_one_name_however_it_is_spelled(words):
    assert Cell("", words).name == Cell("", PRUNED).name


def test_other_runs_have_other_names():
    variants = [DENSE, PRUNED, (*PRUNED, "--seed", "1"), (*PRUNED, "--prune_layers"), (*PRUNED[:2], *PRUNED[4:])]
    assert len({Cell("", words).name for words in variants}) == len(variants)
    assert Cell("", ("org/mamba-130m hf", *DENSE[1:])).name.startswith("mamba-130m_hf-dense-")


def test_a_folder_is_resolved_to_its_full_path_and_a_name_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "demo", "wikitext2"):
        (tmp_path / name).mkdir()
    assert grid.resolved_model("mine") == grid.resolved_dataset("./mine") == str(tmp_path / "mine")
    assert grid.resolved_model("demo") == "demo" and grid.resolved_dataset("wikitext2") == "wikitext2"
    assert grid.resolved_model("state-spaces/mamba-130m-hf") == "state-spaces/mamba-130m-hf"


def test_done_is_metrics_and_the_same_options_whatever_the_places(tmp_path):
    cell = Cell("", PRUNED)
    leave(tmp_path, cell, "1-broke-off", record(cell))
    assert finished(cell, tmp_path) is None
    leave(tmp_path, cell, "2-other", record(cell, seqlen=128), {})
    assert finished(cell, tmp_path) is None
    leave(tmp_path, cell, "3-unknown", record(cell, of_another_version=1), {})
    assert finished(cell, tmp_path) is None
    done = leave(tmp_path, cell, "0-done", record(cell), {})
    assert finished(cell, tmp_path) == done


def test_a_run_of_before_a_flag_existed_counts_if_the_flag_is_at_its_default(tmp_path):
    cell, other = Cell("", PRUNED), Cell("", (*PRUNED, "--alpha", "0.1"))
    for each in (cell, other):
        old = record(each)
        del old["alpha"]
        leave(tmp_path, each, "old", old, {})
    assert finished(cell, tmp_path) and not finished(other, tmp_path)


WEIGHTS = ("--prune_layers", "--sparsity", "0.5")


@pytest.mark.parametrize(
    ("words", "counts"),
    [((), True), (("--method", "sparsessm", *WEIGHTS), True), (("--method", "sparsessm_obs", *WEIGHTS), False)],
    ids=["dense", "sparsessm", "sparsessm_obs"],
)
def test_a_run_that_recorded_a_methods_own_value_counts_while_it_is_that(tmp_path, words, counts):
    cell = Cell("", (*DENSE, *words))
    run = leave(tmp_path, cell, "before", record(cell, percdamp=0.01), {})
    assert grid.finished(cell, tmp_path) == (run if counts else None)


def test_the_newest_run_that_can_go_on_is_taken(tmp_path):
    cell = Cell("", PRUNED)
    for age, name in ((300, "c"), (100, "a"), (200, "b")):
        run = leave(tmp_path, cell, name, record(cell))
        os.utime(run / "options.json", (time.time() - age,) * 2)
    old = record(cell)
    del old["alpha"]  # --resume would refuse it
    leave(tmp_path, cell, "d", old)
    (tmp_path / cell.name / "e").mkdir()
    (tmp_path / cell.name / "e" / "options.json").write_text("{half")
    assert interrupted(cell, tmp_path).name == "a"


def test_every_run_is_done_once(stage):
    cells = [stage.cell(0), stage.cell(1)]
    assert fill([*cells, Cell("again", cells[0].argv)], stage.base) == {}
    assert stage.seeds == [0, 1]
    before = snapshot(stage.base)
    assert fill(cells, stage.base) == {}
    assert stage.seeds == [0, 1]
    assert snapshot(stage.base) == before


def test_a_failure_is_named_and_stops_nothing(stage):
    refused, failing, good = Cell("refused", (*PRUNED, "--nonsense")), stage.cell(0, "fail"), stage.cell(1)
    same = Cell("the same run in another table", failing.argv)
    failures = fill([refused, failing, good, same], stage.base)
    assert stage.seeds == [0, 1] and finished(good, stage.base)
    assert failures.keys() == {refused, failing, same}
    assert "--nonsense" in failures[refused]
    assert failures[failing].startswith("error: the weights are bad (exit code 1; ") and "console.log" in failures[failing]


def test_a_run_with_other_options_than_asked_for_does_not_count(stage):
    cell = stage.cell(0)
    stage.plan[cell.name]["options"]["seqlen"] = 65
    (stage.folder / "plan.json").write_text(json.dumps(stage.plan))
    assert "was the program changed meanwhile?" in fill([cell], stage.base)[cell]


def test_what_broke_off_or_failed_is_resumed(stage):
    cell = stage.cell(0)
    run = leave(stage.base, cell, "run-0", record(cell))
    assert fill([cell], stage.base) == {}
    assert [call["resumed"] for call in stage.calls] == [True]
    assert finished(cell, stage.base) == run


def test_what_cannot_be_resumed_is_started_anew(stage):
    cell = stage.cell(0, "refuse to resume")
    leave(stage.base, cell, "run-0", record(cell))
    assert fill([cell], stage.base) == {}
    assert [call["resumed"] for call in stage.calls] == [True, False]


def test_workers_run_side_by_side_each_on_its_device(stage):
    cells = [stage.cell(0, "meet"), stage.cell(1, "meet"), stage.cell(2)]
    assert fill(cells, stage.base, workers=2, devices=["4", "7"], group="table") == {}
    assert sorted(stage.seeds) == [0, 1, 2]
    assert {call["cuda"] for call in stage.calls[:2]} == {"4", "7"}
    assert {call["group"] for call in stage.calls} == {"table"}


def test_a_run_that_outlived_its_job_is_waited_for(stage):
    """As after SIGKILL of the job alone: the run holds the lock, and then there are its figures."""
    held, free = stage.cell(0), stage.cell(1)
    (stage.base / held.name).mkdir(parents=True)
    lock = (stage.base / held.name / ".lock").open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def end():
        while not finished(free, stage.base):  # the wait for one cell does not keep the others
            time.sleep(0.01)
        time.sleep(5 * grid._LOOK)  # it looks in vain some times
        leave(stage.base, held, "run-0", record(held), {})
        lock.close()

    other = threading.Thread(target=end)
    other.start()
    assert fill([held, free], stage.base) == {}
    other.join()
    assert stage.seeds == [1]


def test_the_lock_is_handed_to_the_run(stage):
    """A job is killed, its run lives on."""
    cell = stage.cell(0, "hang")
    script = f"""
from pathlib import Path
from sparsessm.runs import grid
grid.COMMAND = ({sys.executable!r}, {str(stage.folder / "main.py")!r})
grid.fill([grid.Cell("", {cell.argv!r})], Path({str(stage.base)!r}), devices=[])
"""
    job = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while not stage.calls:
        time.sleep(0.01)
    job.kill()
    job.wait()
    try:
        assert files.lock(stage.base / cell.name / ".lock") is None
    finally:
        os.kill(stage.calls[0]["pid"], signal.SIGKILL)
    assert files.lock(stage.base / cell.name / ".lock", wait=10) is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_leaves_the_rest(stage, number):
    cells = [stage.cell(0), stage.cell(1, "hang"), stage.cell(2)]

    def tell():
        while len(stage.calls) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    teller = threading.Thread(target=tell)
    teller.start()
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        fill(cells, stage.base)
    teller.join()
    assert str(stopped.value) == signal.Signals(number).name and signal.getsignal(number) == before
    assert stage.seeds == [0, 1]
    with pytest.raises(ProcessLookupError):
        os.kill(stage.calls[1]["pid"], 0)
    stage.cell(1)  # now it would finish
    assert fill(cells, stage.base) == {}
    assert [(call["seed"], call["resumed"]) for call in stage.calls[2:]] == [(1, True), (2, False)]


def test_a_run_deaf_to_signals_is_killed(stage, monkeypatch):
    monkeypatch.setattr(grid, "_ENDING", tuple((number, 0.2) for number, _ in grid._ENDING[:2]) + grid._ENDING[2:])
    cell = stage.cell(0, "hang on")

    def tell():
        while not (stage.folder / "deaf").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell).start()
    with pytest.raises(Interrupted):
        fill([cell], stage.base)
    with pytest.raises(ProcessLookupError):
        os.kill(stage.calls[0]["pid"], 0)


def test_workers_share_the_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(grid, "_cores", lambda: 8)
    for variable in ("OMP_NUM_THREADS", "WANDB_RUN_GROUP", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    assert [environment(0, workers, [], None)["OMP_NUM_THREADS"] for workers in (1, 3, 16)] == ["8", "2", "1"]
    assert [environment(i, 3, ["0", "1"], None)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["0", "1", "0"]
    assert "OMP_NUM_THREADS" not in environment(0, 3, ["0"], None)
    assert "WANDB_RUN_GROUP" not in environment(0, 1, [], None)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    told = environment(0, 4, [], "table")
    assert (told["OMP_NUM_THREADS"], told["WANDB_RUN_GROUP"]) == ("5", "mine")


def test_devices_are_the_gpus_that_this_process_sees():
    assert grid.device_names(0, None) == grid.device_names(0, "0") == []
    assert grid.device_names(2, None) == grid.device_names(2, "") == ["0", "1"]
    assert grid.device_names(2, "3,GPU-6f") == ["3", "GPU-6f"]


def test_mistakes_are_input_errors(stage):
    with pytest.raises(InputError, match="--workers must be at least 1"):
        fill([stage.cell(0)], stage.base, workers=0)
    stage.base.write_text("a file")
    with pytest.raises(InputError, match="choose --base_dir elsewhere"):
        fill([stage.cell(0)], stage.base)


def test_settings_are_all_options_but_the_places():
    assert Cell("", PRUNED).settings.keys() == set(Options.__dataclass_fields__) - set(PLACES)


def test_the_command_is_that_of_this_package_from_everywhere(tmp_path):
    (tmp_path / "sparsessm").mkdir()
    (tmp_path / "sparsessm" / "__main__.py").write_text("print('another program')")
    variables = environment(0, 1, [], None)
    ended = subprocess.run([*grid.COMMAND, "--help"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert ended.stdout.startswith("usage: python -m sparsessm MODEL DATASET")


def test_without_a_terminal_there_is_a_line_a_minute(stage, capsys, monkeypatch):
    fill([stage.cell(0)], stage.base)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    fill([stage.cell(0), stage.cell(1, "linger"), stage.cell(2, "fail")], stage.base)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("1 of 3 runs after 00:00, ? left: seed 1")
    assert re.fullmatch(r"3 of 3 runs after 00:0\d, 00:00 left, 1 failed: ", lines[-1])


def test_on_a_terminal_one_line_is_rewritten(stage):
    cells = [stage.cell(seed, "linger").argv for seed in range(3)]
    script = f"""
from pathlib import Path
from sparsessm.runs import grid
grid.COMMAND, grid._LOOK = ({sys.executable!r}, {str(stage.folder / "main.py")!r}), 0.05
cells = [grid.Cell(f"a run with a long name {{'x' * 80}}", argv) for argv in {cells!r}]
grid.fill(cells, Path({str(stage.base)!r}), devices=[])
print("after")
"""
    shown, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    job = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=other, stderr=other)
    os.close(other)
    said = b""
    with suppress(OSError):  # the end of a terminal
        while piece := os.read(shown, 4096):
            said += piece
    assert job.wait() == 0
    bar, after, nothing = said.decode().replace("\r\n", "\n").split("\n")
    assert (after, nothing) == ("after", "") and all(len(one) <= 80 for one in bar.split("\r"))
    assert any(re.match(r"1 of 3 runs \|██████▋ .*\| 00:0\d, 00:0\d left  a run with a", one) for one in bar.split("\r"))
    assert bar.split("\r")[-1].startswith("3 of 3 runs |████████████████████|")
