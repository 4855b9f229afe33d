"""What sites and coordinator of a simulation have agreed on, as enrolment would have it."""

from collections.abc import Iterable
from pathlib import Path

from crafts_client.home import SiteHome
from crafts_client.site_key import site_key
from crafts_client.site_ledger import existing_ledger
from crafts_core.plan import Plan
from crafts_privacy.signing import public_key_of
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.home import CoordinatorHome
from crafts_server.rosters import Rosters


def agree_on_patients(coordinator: CoordinatorHome, sites: Iterable[Path]) -> None:
    """Every site counts as many patients as its own ``site.toml`` declares now. Again is fine.

    Each says, too, which key signs for it in sums.
    """
    with coordinator.registry() as registry:
        for path in sites:
            home = SiteHome.open(path)
            name = home.config.name
            CohortSizes(registry).agree(name, home.config.declared_patients)
            key = site_key(home, existing_ledger(home))
            Rosters(registry).publish(name, public_key_of(key))


def approve_roster(coordinator: CoordinatorHome, plan: Plan, sites: Iterable[Path]) -> None:
    """At every site somebody approves who the hospitals of the plan's sums are. Again is fine."""
    if not plan.aggregation.secure_aggregation:
        return
    coordinator.sign_plan(plan)
    with coordinator.registry() as registry:
        roster = Rosters(registry).fixed(plan)
    for path in sites:
        SiteHome.open(path).roster_approvals.approve(roster)
