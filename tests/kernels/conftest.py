import zlib

import pytest
import torch

from sparsessm.kernels.selective_scan import force_kernel


@pytest.fixture(params=["compiled", "by torch"])
def kernel(request):
    """A test runs with the kernel for CPUs, and with torch's products."""
    with force_kernel("ref" if request.param == "by torch" else None):
        yield


@pytest.fixture
def seed(request):
    """Another one for each test, the same in every run."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def at_most_threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
