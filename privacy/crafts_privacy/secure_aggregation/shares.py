"""How much noise each member of a sum adds.

The promise is that the noise of the members who are honest is enough: with up to
``colluding_sites`` members who add none and tell theirs to the coordinator, the rest make up the
plan's whole noise between them. As shares are sized once the members are known, whoever was not
ready costs nothing, and a sum that lacks a member cannot be read.
"""

import math
from collections.abc import Iterable

NOISE_TOLERANCE = 0.005
"""How far two members' calibrations of one plan may be apart. Each searches the smallest noise to
0.05 % and writes four digits, so two versions of an accountant that are both right differ by less
than that; more is another plan, or an accountant that is wrong. The tolerance costs no privacy, as
every share is sized by the largest of them."""
MOST_OWN_NOISE = 4.0
"""Times the plan's noise that one member may add: for a floor of its own. More would only be leave
for a longer vector, and its bits are not counted on (``fixed_point``)."""


def num_honest(num_members: int, colluding_sites: int) -> int:
    """h: members who must add their share.

    Raises:
        ValueError: fewer than one is left.
    """
    honest = num_members - colluding_sites
    if colluding_sites < 0 or honest < 1:
        raise ValueError(
            f"expected more members than colluding sites, got {num_members} and {colluding_sites}"
        )
    return honest


def own_noise_multiplier(
    noise_multiplier: float, *, num_members: int, colluding_sites: int, floor: float = 0.0
) -> float:
    """The standard deviation of one member's share, over max_grad_norm.

    Shares of the honest have variances that add up: ``sigma / sqrt(h)`` each make sigma together.

    Args:
        noise_multiplier: sigma, what the accountant is told.
        num_members: Of the announcement.
        colluding_sites: Of the plan.
        floor: Of a site that adds more than its share, for the case that nobody else adds any.
    """
    share = noise_multiplier / math.sqrt(num_honest(num_members, colluding_sites))
    return max(share, floor)


def is_same_noise(one: float, other: float, tolerance: float) -> bool:
    """Whether two calibrations may be of one plan; tolerances add up over a third one."""
    return min(one, other) > 0 and abs(math.log(one / other)) <= tolerance


def total_noise_multiplier(own_noise_multipliers: Iterable[float]) -> float:
    """The standard deviation of the noise in the whole sum, over max_grad_norm."""
    return math.sqrt(math.fsum(own**2 for own in own_noise_multipliers))
