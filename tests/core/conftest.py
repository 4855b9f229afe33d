"""One tiny foundation for all tests of the core; it is frozen, so sharing it is safe."""

import pytest

from crafts_core.foundation import Foundation
from support.foundations import tiny_foundation


@pytest.fixture(scope="session")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return tiny_foundation(tmp_path_factory.mktemp("foundation") / "tiny")
