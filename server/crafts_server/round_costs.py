"""What rounds cost a patient, by the mechanism that sites declared with their updates.

The coordinator's view: of updates that were used, at the plan's delta. A site's own ledger also has
what was charged and never used, and is what its promise rests on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from crafts_core.plan import Plan
from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.secure_aggregation.shares import total_noise_multiplier
from crafts_server.receipts import RoundReceipt, SiteReceipt

_MOST_KINDS = 4
"""Of a site's steps. A site may declare up to four times the plan's noise, another in each round:
thirty kinds take 1.1 s to compose and one 0.02 s, and a page composes them after every round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCost:
    """Epsilon after a round, over the sites whose updates it used; infinite without noise."""

    lowest: float
    highest: float

    @property
    def in_words(self) -> str:
        """For people."""
        if math.isinf(self.highest):
            return "no epsilon bounds it: there was no noise"
        if f"{self.lowest:.2f}" == f"{self.highest:.2f}":
            return f"epsilon {self.highest:.2f} after it"
        return f"epsilon {self.lowest:.2f} to {self.highest:.2f} after it, by hospital"


def round_costs(
    plan: Plan, receipts: Sequence[RoundReceipt], *, newest: int | None = None
) -> tuple[RoundCost, ...]:
    """One for each of the newest receipts of a run, or of all, in their order.

    ``receipts`` are all from the first round on, as what they cost adds up.

    Sites that declared the same so far are composed once; coarsely, which never understates. Nor
    does it to take all steps of a site that declared ever other noise as its least noisy ones.
    """
    delta = plan.privacy.delta
    spent: dict[str, tuple[PrivacyEvent, ...]] = {}
    histories: set[tuple[PrivacyEvent, ...]] = set()
    costs: list[RoundCost] = []
    first = 0 if newest is None else len(receipts) - newest
    for place, receipt in enumerate(receipts):
        for site in receipt.sites:
            event = PrivacyEvent(
                noise_multiplier=_noise_of(plan, receipt, site),
                sample_rate=site.sample_rate,
                steps=site.steps,
            )
            merged = accounting.merge([*spent.get(site.site, ()), event])
            spent[site.site] = merged if len(merged) <= _MOST_KINDS else _at_most(merged)
        if receipt.sites:  # else the coordinator trained alone, on public tiles
            histories = {spent[site.site] for site in receipt.sites}
        if place >= first:
            found = [math.inf if delta is None else _epsilon(each, delta) for each in histories]
            lowest, highest = min(found, default=0.0), max(found, default=0.0)
            costs.append(RoundCost(lowest=lowest, highest=highest))
    return tuple(costs)


def _at_most(events: Sequence[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """One kind of step, as many, of which each costs no less than any of these."""
    least = PrivacyEvent(
        noise_multiplier=min(event.noise_multiplier for event in events),
        sample_rate=max(event.sample_rate for event in events),
        steps=sum(event.steps for event in events),
    )
    return (least,)


def _noise_of(plan: Plan, receipt: RoundReceipt, site: SiteReceipt) -> float:
    """Of distributed trust what a sum has without its loudest ``colluding_sites`` members.

    That is what the promise counts on; a site declares its share, which alone would protect less.
    """
    if plan.privacy.trust == "distributed":
        for each in receipt.sums:
            if each.norm is not None and site.site in each.members:
                shares = sorted(x.noise_multiplier for x in receipt.sites if x.site in each.members)
                num_honest = max(1, len(shares) - (plan.privacy.colluding_sites or 0))
                return total_noise_multiplier(shares[:num_honest])
    return site.noise_multiplier


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[PrivacyEvent, ...], delta: float) -> float:
    return accounting.epsilon(events, delta, discretization=accounting.COARSE)
