"""A site that counts for more than it did is named; sites that are away name nobody."""

import pytest

from crafts_server.weight_watch import WeightWatch
from support.receipts import receipt as round_of
from support.receipts import site_receipts as sites

AS_PATIENTS_SAY = {"aachen": 0.6, "bern": 0.2, "coimbra": 0.2}


def test_a_site_that_counts_twice_its_share_at_once_is_named() -> None:
    watch = WeightWatch([round_of(0, **AS_PATIENTS_SAY)])
    now = sites(aachen=0.45, bern=0.4, coimbra=0.15)
    (rise,) = watch.rises(0, now, max_rise=0.5)
    assert (rise.site, rise.before, rise.now) == ("bern", pytest.approx(1.0), pytest.approx(2.0))
    assert watch.rises(0, now, max_rise=1.01) == ()


def test_a_site_that_is_away_lets_nobody_rise() -> None:
    """Aachen's weight goes from 0.6 to 0.75, and is still what its patients say."""
    watch = WeightWatch([round_of(0, **AS_PATIENTS_SAY)])
    assert watch.rises(0, sites(aachen=0.75, bern=0.25), max_rise=0.01) == ()


def test_what_is_compared_is_the_sites_own_last_round() -> None:
    """Bern was away for a round and comes back with more."""
    watch = WeightWatch([round_of(0, **AS_PATIENTS_SAY), round_of(0, aachen=0.75, coimbra=0.25)])
    (rise,) = watch.rises(0, sites(aachen=0.4, bern=0.4, coimbra=0.2), max_rise=0.5)
    assert rise.site == "bern"


def test_a_new_site_and_a_new_stage_have_nothing_to_be_compared_with() -> None:
    watch = WeightWatch([round_of(0, aachen=0.9, coimbra=0.1)])
    assert watch.rises(0, sites(aachen=0.5, bern=0.5), max_rise=0.5) == ()
    late = sites(aachen=0.2, coimbra=0.8)
    assert [rise.site for rise in watch.rises(0, late, max_rise=0.5)] == ["coimbra"]
    assert watch.rises(1, late, max_rise=0.5) == ()
    watch.note(round_of(1, aachen=0.9, coimbra=0.1))
    assert [rise.site for rise in watch.rises(1, late, max_rise=0.5)] == ["coimbra"]
