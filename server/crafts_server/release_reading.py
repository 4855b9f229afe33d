"""From the sites' mean to what it says: anchors or colour, which travel from here on."""

from dataclasses import replace

from crafts_core.state import release_name
from crafts_server.aggregation import ServerStep
from crafts_server.open_round import OpenRound
from crafts_server.receipts import ReleaseReceipt


def read_release(
    opened: OpenRound, step: ServerStep, noise_std: float
) -> tuple[ServerStep, ReleaseReceipt]:
    """The step with what the mean says in its place; post-processing of a noised sum.

    Args:
        opened: The round of a release.
        step: From zero to the mean.
        noise_std: Of each of its numbers.
    """
    name = release_name(opened.planned.factor)
    told = opened.study.decode(opened.planned.factor, step.state[name], noise_std)
    receipt = ReleaseReceipt(
        values=tuple(map(tuple, told.values.tolist())),
        signal=told.signal,
        is_public=told.is_public,
    )
    return replace(step, state=step.state | {name: told.values}), receipt
