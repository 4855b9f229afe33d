"""What sites and coordinator of a simulation have agreed on, as enrolment would have it."""

from collections.abc import Iterable
from pathlib import Path

from crafts_client.home import SiteHome
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.home import CoordinatorHome


def agree_on_patients(coordinator: CoordinatorHome, sites: Iterable[Path]) -> None:
    """Every site counts as many patients as its own ``site.toml`` declares now. Again is fine."""
    registry = coordinator.registry()
    try:
        for path in sites:
            config = SiteHome.open(path).config
            CohortSizes(registry).agree(config.name, config.declared_patients)
    finally:
        registry.close()
