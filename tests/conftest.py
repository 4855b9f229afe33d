from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """``join`` turns them off for its process; here that is the process of all later tests."""
    yield
    torch.set_flush_denormal(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
