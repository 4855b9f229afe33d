"""Which site spoils sums, found by taking them over parts of the members.

Nobody sees a single site's vector, so a bad one shows in a sum's norm and not whose it is. Once
several steps in a row were refused, each step's members are split into two announced sets, suspects
and others evenly, so that the good half still counts and every step halves the suspects. Where the
members are too few for halves, one suspect stands aside instead. Whoever is found is left out from
then on; people should talk to that hospital.

This finds one site that spoils every sum. Several, or one that does so only now and then, can cast
suspicion on others; the receipts show every set and its norm.

All of it is a function of receipts, so a coordinator that starts again goes on where it was.
"""

import secrets
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass

from crafts_server.receipts import SumReceipt

Shuffle = Callable[[MutableSequence[str]], None]
_shuffle: Shuffle = secrets.SystemRandom().shuffle


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """How far the search is."""

    suspects: frozenset[str] = frozenset()
    """One of them spoils sums; empty while nobody is looked for."""
    found: frozenset[str] = frozenset()
    """Left out until somebody starts another run."""


def suspicion(rounds: Iterable[Sequence[SumReceipt]], *, diagnose_after: int) -> Suspicion:
    """What the committed rounds of a run tell, oldest first.

    Args:
        rounds: The sums of each round.
        diagnose_after: Refused steps in a row before anybody is looked for; 0 is never.
    """
    suspects: frozenset[str] = frozenset()
    found: frozenset[str] = frozenset()
    refused = 0
    for sums in rounds if diagnose_after else ():
        good = _members(each for each in sums if each.is_plausible is True)
        bad_sums = [each for each in sums if each.is_plausible is False]
        bad = _members(bad_sums)
        if not suspects:
            refused = refused + 1 if bad and not good else 0
            suspects = bad if refused >= diagnose_after else suspects
            continue
        suspects = (suspects & bad if bad else suspects) - good
        alone = [suspects & frozenset(each.members) for each in bad_sums]
        culprits = suspects if len(suspects) == 1 else _members_of(alone)
        if culprits or not suspects:
            found, suspects, refused = found | culprits, frozenset(), 0
    return Suspicion(suspects=suspects, found=found)


def parts_of(
    members: Iterable[str],
    suspects: frozenset[str],
    *,
    smallest: int,
    shuffle: Shuffle = _shuffle,
) -> list[list[str]]:
    """The sets to announce: all members together, unless somebody is looked for.

    Args:
        members: Who is ready.
        suspects: Of the search.
        smallest: A set of fewer is never announced.
        shuffle: Tests choose.
    """
    everybody = sorted(members)
    wanted = [site for site in everybody if site in suspects]
    others = [site for site in everybody if site not in suspects]
    shuffle(wanted)
    shuffle(others)
    if not wanted or len(everybody) <= smallest:
        return [everybody]
    if len(everybody) < 2 * smallest:
        return [sorted(set(everybody) - {wanted[0]})]
    half = (len(wanted) + 1) // 2
    first = wanted[:half]
    first += others[: max(len(everybody) // 2 - half, 0)]
    return [sorted(first), sorted(set(everybody) - set(first))]


def _members(sums: Iterable[SumReceipt]) -> frozenset[str]:
    return frozenset(site for each in sums for site in each.members)


def _members_of(groups: Iterable[frozenset[str]]) -> frozenset[str]:
    """Those who stand alone in their group."""
    return frozenset(site for group in groups if len(group) == 1 for site in group)
