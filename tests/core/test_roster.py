"""A roster is one list in one order; what is not one is not read."""

import json

import pytest

from crafts_core.roster import Roster, RosterError

HASH = "a" * 64
AGREED = {"south": 40, "north": 120}


def test_the_same_agreement_gives_the_same_bytes() -> None:
    roster = Roster.of(HASH, AGREED)
    again = Roster.of(HASH, dict(reversed(AGREED.items())))
    assert (roster.to_json(), roster.hash) == (again.to_json(), again.hash)
    assert Roster.parse(roster.to_json()) == roster
    assert roster.patients == AGREED


def test_another_number_site_or_plan_is_another_roster() -> None:
    others = [
        Roster.of(HASH, AGREED | {"south": 41}),
        Roster.of(HASH, AGREED | {"east": 40}),
        Roster.of("b" * 64, AGREED),
    ]
    assert len({each.hash for each in (*others, Roster.of(HASH, AGREED))}) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"format": "crafts-roster-v2"},
        {"plan_hash": "short"},
        {"extra": 1},
        {"sites": [{"site": "b", "declared_patients": 1}, {"site": "a", "declared_patients": 1}]},
        {"sites": [{"site": "a", "declared_patients": 1}, {"site": "a", "declared_patients": 9}]},
        {"sites": [{"site": "a", "declared_patients": 0}]},
        {"sites": [{"site": "a/../b", "declared_patients": 1}]},
    ],
)
def test_what_is_no_roster_is_not_read(change: dict[str, object]) -> None:
    values = json.loads(Roster.of(HASH, AGREED).to_json()) | change
    with pytest.raises(RosterError, match="roster"):
        Roster.parse(json.dumps(values))
    with pytest.raises(RosterError, match="roster"):
        Roster.parse("{")
