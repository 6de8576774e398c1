import zlib

import pytest

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
