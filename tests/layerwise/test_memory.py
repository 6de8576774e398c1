import platform
import subprocess
import sys

import numpy as np
import pytest

from tests.processes import ROOT

# Page faults of eight tensors of 48 MiB, one after the other in the same place.
CHURN = """
import resource
import torch
from sparsessm.layerwise.memory import keep_freed
if {keep}:
    keep_freed()
torch.set_num_threads(1)
for _ in range(16):  # the heap finds its shape, within nine
    torch.ones(12 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(12 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_tensors_get_back_the_memory_of_those_before():
    faults = [
        int(subprocess.run([sys.executable, "-c", CHURN.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (True, False)
    ]
    assert faults[0] < 1000 < faults[1]


def test_the_peak_is_the_process_s_own_and_not_of_the_one_that_started_it():
    ballast = np.ones(1 << 27)  # 1 GiB here
    code = "import torch, sparsessm.layerwise.memory as memory; print(memory.peak_memory(torch.device('cpu'))['process'])"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1e8 < int(child.stdout) < ballast.nbytes
