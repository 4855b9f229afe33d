"""Dealing patients of a folder of tiles to hospitals that differ, as hospitals do.

Patients move whole: no patient is at two sites, and none of the test set is at any.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crafts_client.ingest.table import TableRow
from crafts_simulations.errors import ScenarioError
from crafts_simulations.scenario import TilesSplit

_MIN_SHARE = 0.25
"""No site gets less than this part of an equal share of the patients."""
_MAX_DEALS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealt:
    """Rows of each site and of the test set."""

    sites: Mapping[str, tuple[TableRow, ...]]
    heldout: tuple[TableRow, ...]


def deal(rows: Sequence[TableRow], names: Sequence[str], split: TilesSplit) -> Dealt:
    """Hold patients out of every class, then give each class to sites by Dirichlet weights.

    The test set depends on the seed and ``heldout_fraction`` only, so studies with other numbers
    of sites are measured on the same tiles.

    Raises:
        ScenarioError: there are too few patients for that.
    """
    classes = _patients_by_class(rows)
    heldout_rng = np.random.default_rng([split.seed, 0])
    heldout: set[str] = set()
    rest: dict[str, list[str]] = {}
    for label, patients in classes.items():
        shuffled = [patients[place] for place in heldout_rng.permutation(len(patients))]
        num_heldout = round(split.heldout_fraction * len(shuffled))
        heldout.update(shuffled[:num_heldout])
        rest[label] = shuffled[num_heldout:]
    sized = split.patients is not None
    site_of = _deal_by_size(rest, names, split) if sized else _deal_patients(rest, names, split)
    if len(heldout) < 2 or len(site_of) < 2 * len(names):
        raise ScenarioError(
            f"{sum(map(len, classes.values()))} patients are too few for {len(names)} sites and a "
            "test set; lower tiles.num_sites or change tiles.heldout_fraction"
        )
    return Dealt(
        sites={
            name: tuple(row for row in rows if site_of.get(row.patient) == name) for name in names
        },
        heldout=tuple(row for row in rows if row.patient in heldout),
    )


def sizes_of(num_sites: int, smallest: int, largest: int) -> list[int]:
    """Numbers of patients from smallest to largest, by one factor from site to site."""
    return [round(size) for size in np.geomspace(smallest, largest, num_sites)]


def _patients_by_class(rows: Sequence[TableRow]) -> dict[str, list[str]]:
    """Patients of each label, sorted; a patient belongs to the label most of its tiles have."""
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        labels[row.patient][row.label or row.caption] += 1
    classes: dict[str, list[str]] = defaultdict(list)
    for patient in sorted(labels):
        label, _ = min(labels[patient].items(), key=lambda item: (-item[1], item[0]))
        classes[label].append(patient)
    return {label: classes[label] for label in sorted(classes)}


def _deal_patients(
    classes: Mapping[str, Sequence[str]], names: Sequence[str], split: TilesSplit
) -> dict[str, str]:
    """Patient to site. Deals again until no site is nearly empty."""
    rng = np.random.default_rng([split.seed, 1])
    total = sum(map(len, classes.values()))
    for _ in range(_MAX_DEALS):
        site_of: dict[str, str] = {}
        for patients in classes.values():
            weights = rng.dirichlet([split.alpha] * len(names))
            chosen = rng.choice(len(names), size=len(patients), p=weights)
            site_of |= {
                patient: names[place] for patient, place in zip(patients, chosen, strict=True)
            }
        sizes = Counter(site_of.values())
        if min(sizes[name] for name in names) >= _MIN_SHARE * total / len(names):
            return site_of
    raise ScenarioError(
        f"alpha {split.alpha:g} is so unequal that {len(names)} sites cannot all get patients; "
        "raise tiles.alpha or lower tiles.num_sites"
    )


def _deal_by_size(
    classes: Mapping[str, Sequence[str]], names: Sequence[str], split: TilesSplit
) -> dict[str, str]:
    """Patient to site: each site takes its number from its own mix of classes, while they last."""
    assert split.patients is not None
    sizes = sizes_of(len(names), *split.patients)
    left = {label: list(patients) for label, patients in classes.items()}
    if sum(sizes) > sum(map(len, left.values())):
        raise ScenarioError(
            f"{len(names)} sites of {sizes[0]} to {sizes[-1]} patients need {sum(sizes)}, there "
            f"are {sum(map(len, left.values()))} beside the test set; lower tiles.patients"
        )
    rng = np.random.default_rng([split.seed, 2])
    site_of: dict[str, str] = {}
    # The largest chooses last: whatever is left over decides least of its mix.
    for name, size in zip(names, sizes, strict=True):
        mix = dict(zip(left, rng.dirichlet([split.alpha] * len(left)), strict=True))
        for _ in range(size):
            there = [label for label, patients in left.items() if patients]
            weights = np.array([mix[label] + 1e-9 for label in there])
            label = there[rng.choice(len(there), p=weights / weights.sum())]
            site_of[left[label].pop()] = name
    return site_of
