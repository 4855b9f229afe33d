import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_MEMORY, _ENOUGH = Path("/dev/shm"), 4 << 30
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ENOUGH:
    # Homes and ledgers sync whatever they write, and tests would wait for the disk a third of
    # their time. What a lost write does, the tests of kills and power cuts say by themselves.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """``join`` turns them off for its process; here that is the process of all later tests."""
    yield
    torch.set_flush_denormal(False)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first, or at the end one process is busy with the last of them.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
