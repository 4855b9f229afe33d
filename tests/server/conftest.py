"""One tiny foundation for the tests that need a real generator; it is frozen."""

import pytest

from crafts_core.foundation import Foundation
from support.foundations import tiny_foundation
from support.postgres import database_url, postgres

__all__ = ["database_url", "postgres"]


@pytest.fixture(scope="session")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return tiny_foundation(tmp_path_factory.mktemp("foundation") / "tiny")
