from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crafts_client.ingest.table import TableRow
from crafts_simulations.errors import ScenarioError
from crafts_simulations.hospital import round_size
from crafts_simulations.scenario import TilesSplit
from crafts_simulations.tile_split import deal

LABELS = ("lung_aca", "lung_n", "colon_aca")


def table(patients_per_class: int = 40, tiles_each: int = 2) -> list[TableRow]:
    return [
        TableRow(
            line=2,
            name=f"{label}-{patient}-{tile}.jpeg",
            path=Path("x"),
            patient=f"{label}-{patient}",
            case="",
            label=label,
            caption="",
            mpp=None,
        )
        for label in LABELS
        for patient in range(patients_per_class)
        for tile in range(tiles_each)
    ]


def split(**changes: object) -> TilesSplit:
    values = {"num_sites": 3, "alpha": 1.0, "heldout_fraction": 0.2, "seed": 5}
    return TilesSplit.model_validate(values | changes)


def names(count: int = 3) -> list[str]:
    return [f"site-{number}" for number in range(count)]


def patients(rows) -> set[str]:
    return {row.patient for row in rows}


@given(seed=st.integers(0, 50), alpha=st.floats(0.5, 20))
def test_every_patient_is_in_exactly_one_place(seed: int, alpha: float) -> None:
    rows = table()
    dealt = deal(rows, names(), split(seed=seed, alpha=alpha))

    parts = [patients(dealt.heldout), *(patients(site) for site in dealt.sites.values())]
    assert set.union(*parts) == patients(rows)
    assert sum(map(len, parts)) == len(patients(rows))
    assert len(dealt.heldout) + sum(map(len, dealt.sites.values())) == len(rows)


def test_the_test_set_has_its_share_of_every_class() -> None:
    dealt = deal(table(), names(), split())

    assert Counter(row.label for row in dealt.heldout) == dict.fromkeys(LABELS, 16)


def test_the_test_set_does_not_depend_on_the_number_of_sites() -> None:
    few, many = deal(table(), names(1), split()), deal(table(), names(4), split())

    assert few.heldout == many.heldout


def test_sites_are_not_alike_at_small_alpha_and_are_at_large() -> None:
    def spread(alpha: float) -> float:
        sites = deal(table(200), names(), split(alpha=alpha)).sites.values()
        shares = [sum(row.label == LABELS[0] for row in site) / len(site) for site in sites]
        return max(shares) - min(shares)

    assert spread(0.3) > 0.3
    assert spread(1000.0) < 0.15


def test_no_site_is_nearly_empty() -> None:
    dealt = deal(table(), names(), split(alpha=0.3))

    assert min(len(patients(rows)) for rows in dealt.sites.values()) >= 0.25 * 96 / 3


def test_the_same_seed_deals_the_same() -> None:
    assert deal(table(), names(), split()) == deal(table(), names(), split())


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(ScenarioError, match="too few"):
        deal(table(2), names(), split())


@pytest.mark.parametrize(
    ("exact", "told"), [(1, 1), (9, 9), (42, 42), (123, 120), (4567, 4600), (99_999, 100_000)]
)
def test_a_size_is_told_to_two_digits(exact: int, told: int) -> None:
    assert round_size(exact) == told


def test_sites_are_as_large_as_the_scenario_says_and_differ_in_their_mix() -> None:
    sized = split(num_sites=5, patients=(8, 40), alpha=0.5)
    sites = deal(table(60), names(5), sized).sites

    assert [len(patients(site)) for site in sites.values()] == [8, 12, 18, 27, 40]
    shares = [sum(row.label == LABELS[0] for row in site) / len(site) for site in sites.values()]
    assert max(shares) - min(shares) > 0.2


def test_no_patient_is_at_two_sites_of_named_sizes() -> None:
    dealt = deal(table(60), names(5), split(num_sites=5, patients=(8, 40)))
    parts = [patients(dealt.heldout), *(patients(site) for site in dealt.sites.values())]

    assert sum(map(len, parts)) == len(set.union(*parts))


def test_sites_of_more_patients_than_there_are_are_refused() -> None:
    with pytest.raises(ScenarioError, match="need 105, there are 96 beside the test set"):
        deal(table(40), names(5), split(num_sites=5, patients=(8, 40)))


def test_sizes_are_named_from_small_to_large() -> None:
    with pytest.raises(ValueError, match="smallest site first"):
        split(patients=(40, 8))
