"""Whether one site suddenly counts for more: compared from round to round, and told.

What is compared is the weight per share, 1 for a site that counts as its agreed patients say: a
site that is away makes all others weigh more, and none of them more than its share. Stages are not
compared with each other: another loss or optimizer weighs anew.
"""

from collections.abc import Iterable, Sequence

from crafts_server.receipts import RoundReceipt, SiteReceipt, WeightRise


class WeightWatch:
    """The weight per share of each site, as of its newest round in the stage that runs."""

    def __init__(self, receipts: Iterable[RoundReceipt] = ()) -> None:
        """Go on after the rounds that were committed, in order."""
        self._stage_index = -1
        self._newest: dict[str, float] = {}
        for receipt in receipts:
            self.note(receipt)

    def note(self, receipt: RoundReceipt) -> None:
        """A round was committed."""
        if receipt.stage_index != self._stage_index:
            self._stage_index, self._newest = receipt.stage_index, {}
        self._newest |= _per_share(receipt.sites)

    def rises(
        self, stage_index: int, sites: Sequence[SiteReceipt], *, max_rise: float
    ) -> tuple[WeightRise, ...]:
        """Who rose by more than ``max_rise`` since its last round of this stage, by name."""
        before = self._newest if stage_index == self._stage_index else {}
        now = _per_share(sites)
        return tuple(
            WeightRise(site=site, before=before[site], now=now[site])
            for site in sorted(now.keys() & before.keys())
            if now[site] - before[site] > max_rise
        )


def _per_share(sites: Sequence[SiteReceipt]) -> dict[str, float]:
    total = sum(site.declared_patients for site in sites)
    return {site.site: site.weight * total / site.declared_patients for site in sites}
