"""Ledgers of sites that were charged, and whose rounds left, without training anything."""

from crafts_client.home import SiteHome
from crafts_client.mechanism import limit_of, mechanism_of
from crafts_client.site_ledger import open_ledger, take_place
from crafts_core.plan import Plan
from crafts_privacy.ledger import Reservation


def charge(home: SiteHome, plan: Plan, *, number: int = 1, run_id: str = "run-1") -> Reservation:
    """Reserve one round of a plan."""
    ledger = open_ledger(home)
    take_place(home, ledger)
    mechanism = mechanism_of(plan, declared_patients=home.config.declared_patients)
    planned = list(plan.rounds())[number - 1]
    return ledger.reserve(
        cohort=home.config.cohort,
        plan_hash=plan.hash,
        run_id=run_id,
        round=number,
        stage=planned.stage.name,
        event=mechanism.event(planned.stage.local_steps),
        request_hash=f"{number:064x}",
        lifetime=home.policy.lifetime,
        plan_limit=limit_of(plan, home.policy.lifetime),
    )


def commit(home: SiteHome, reservation: Reservation, release_hash: str) -> None:
    """Its result left."""
    open_ledger(home).commit(reservation, release_hash)
