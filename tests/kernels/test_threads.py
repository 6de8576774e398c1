import multiprocessing
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from sparsessm import threads as threads_module
from sparsessm.threads import for_each
from tests.processes import ROOT

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")


@pytest.fixture(params=["torch's threads", "a pool"])
def team(request, monkeypatch):
    if request.param == "a pool":
        monkeypatch.setattr(threads_module, "_team", lambda process: None)
    return request.param


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_task_is_done_once_whatever_its_turn(team, threads):
    done = []
    for_each(done.append, range(1000), threads)
    assert sorted(done) == list(range(1000))


def test_tasks_run_side_by_side(team):
    meeting = threading.Barrier(3, timeout=20)
    for_each(lambda _: meeting.wait(), range(3), 3)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_stops_the_rest_and_reaches_the_caller(team, threads):
    done = []

    def work(task):
        if task == 3:
            raise ZeroDivisionError("task 3")
        done.append(task)

    with pytest.raises(ZeroDivisionError, match="task 3"):
        for_each(work, range(100_000), threads)
    assert len(done) < 100_000 - 1


def test_on_linux_torch_lends_its_threads():
    if "OpenMP" not in torch.__config__.parallel_info() or not threads_module._loaded():
        pytest.skip("torch computes with another library than GNU's here")
    assert threads_module._team(threads_module._FIRST_PROCESS) is not None


def _child(results):
    done = []
    for_each(done.append, range(10), 2)
    results.put(sorted(done))


@needs_fork
def test_a_forked_process_has_its_own_threads():
    for_each(lambda _: None, range(10), 2)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_child, args=(results,))
    child.start()
    try:
        assert results.get(timeout=20) == list(range(10))
    finally:
        child.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU's OpenMP library on Linux")
@pytest.mark.parametrize(
    "waits, by_user", [("1000", {}), ("77", {"GOMP_SPINCOUNT": "77"}), ("0", {"OMP_WAIT_POLICY": "passive"})]
)
def test_threads_wait_shortly_unless_the_user_says_otherwise(waits, by_user):
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    said = subprocess.run(
        [sys.executable, "-c", "import sparsessm, torch"], env=clean | by_user | {"OMP_DISPLAY_ENV": "verbose"},
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said) == [waits]
