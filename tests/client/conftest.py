from pathlib import Path

import pytest

from crafts_core.foundation import Foundation
from support.foundations import tiny_foundation
from support.sites import Coordinator


@pytest.fixture(scope="session")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return tiny_foundation(tmp_path_factory.mktemp("foundation") / "tiny")


@pytest.fixture
def coordinator(tmp_path: Path, foundation: Foundation) -> Coordinator:
    return Coordinator(tmp_path, foundation)
