"""CUDA kernels on the CPU need g++ (or CXX), the compiler that the native module needs too."""

import os
import shutil

import pytest

from minidl.backend import cuda_kernels

ORDERS = (0, 1, 2, 3)  # of threads and blocks: as numbered, and three shuffles


def pytest_collection_modifyitems(items):
    if not (os.environ.get("CXX") or shutil.which("g++")):
        for item in items:
            if item.path.parent.name == "cuda":
                item.add_marker(pytest.mark.skip(reason="no g++"))


@pytest.fixture(params=ORDERS)
def order(request):
    before = cuda_kernels.order_seed
    cuda_kernels.order_seed = request.param
    yield request.param
    cuda_kernels.order_seed = before
