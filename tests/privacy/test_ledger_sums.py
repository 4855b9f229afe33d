"""Charges for sums: carried where nothing left, and counted alone by the site's own share."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.ledger import (
    AloneBudgetExceededError,
    AloneLimit,
    EntryKind,
    Ledger,
    LedgerError,
    LedgerTamperedError,
    Lifetime,
    PlanBudgetExceededError,
    PlanLimit,
    Reservation,
    Share,
)
from crafts_privacy.ledger_export import parse_export, write_export
from crafts_privacy.signed_head import SignedHead
from crafts_privacy.signing import create_signing_key, fingerprint, load_signing_key

EVENT = PrivacyEvent(noise_multiplier=4.0, sample_rate=0.2, steps=1)
OWN = 1.5
LIFETIME = Lifetime(max_epsilon=8.0, delta=1e-3, filters=("sums",))
RELEASE = "e" * 64
SHARE = Share(own_noise_multiplier=2.0, members=7, colluding_sites=1)


def reserve(ledger: Ledger, round: int = 1, attempt: int = 1, **changes: object) -> Reservation:
    values: dict[str, object] = {
        "cohort": "main",
        "plan_hash": "a" * 64,
        "run_id": "run-1",
        "round": round,
        "stage": "pretraining",
        "event": EVENT,
        "request_hash": f"{round:032x}{attempt:032x}",
        "lifetime": LIFETIME,
        "plan_limit": PlanLimit(max_epsilon=8.0, delta=1e-3),
        "attempt": attempt,
        "alone": AloneLimit(own_noise_multiplier=OWN, max_epsilon=20.0),
    }
    return ledger.reserve(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def kinds(ledger: Ledger) -> list[str]:
    return [str(entry.kind) for entry in ledger.entries()]


def test_a_sum_that_a_site_was_left_out_of_costs_once_however_often(ledger: Ledger) -> None:
    """Attempts of a round, then rounds: one charge until a vector leaves."""
    held = reserve(ledger)
    for round, attempt in ((1, 2), (1, 3), (2, 1), (3, 1)):
        held = reserve(ledger, round, attempt, unused=held)
        assert len(ledger.events("main")) == 1
    ledger.commit(held, RELEASE, SHARE)
    assert kinds(ledger) == ["reserved", *["carried"] * 4, "committed"]
    assert ledger.open_reservations() == ()
    assert ledger.last_released("a" * 64, "run-1") == (3, 1)


def test_a_charge_pays_once(ledger: Ledger) -> None:
    """Carried twice, or committed where it was carried from, it would pay for two vectors."""
    first = reserve(ledger)
    second = reserve(ledger, 2, unused=first)
    with pytest.raises(LedgerError, match="pays for nothing"):
        reserve(ledger, 3, unused=first)
    with pytest.raises(LedgerError, match="already carried"):
        ledger.commit(first, RELEASE)
    ledger.commit(second, RELEASE)
    with pytest.raises(LedgerError, match="pays for nothing"):
        reserve(ledger, 3, unused=second)
    assert len(ledger.events("main")) == 1


def test_a_vector_that_left_is_not_carried_and_the_next_attempt_is_charged(ledger: Ledger) -> None:
    ledger.commit(reserve(ledger), RELEASE)
    reserve(ledger, 1, 2)
    assert len(ledger.events("main")) == 2
    assert ledger.last_released("a" * 64, "run-1") == (1, 1)


def test_a_later_attempt_counts_as_later(ledger: Ledger) -> None:
    ledger.commit(reserve(ledger, 2, 3), RELEASE)
    ledger.commit(reserve(ledger, 1, 9), RELEASE)
    assert ledger.last_released("a" * 64, "run-1") == (2, 3)
    assert ledger.last_released("a" * 64, "run-2") == (0, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort": "other"},
        {"plan_hash": "b" * 64},
        {"run_id": "run-2"},
        {"event": replace(EVENT, noise_multiplier=3.9)},
        {"event": replace(EVENT, sample_rate=0.3)},
    ],
)
def test_a_charge_is_carried_only_to_the_same_event_of_the_same_run(
    ledger: Ledger, changes: dict[str, object]
) -> None:
    held = reserve(ledger)
    with pytest.raises(LedgerError, match="made for another"):
        reserve(ledger, 2, unused=held, **changes)
    assert kinds(ledger) == ["reserved"]


def test_a_charge_is_carried_so_often_and_no_more(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crafts_privacy.ledger.MAX_CARRIED", 3)
    held = reserve(ledger)
    for round in range(2, 6):
        held = reserve(ledger, round, unused=held)
    assert kinds(ledger) == ["reserved", *["carried"] * 3, "reserved"]
    reserve(ledger, 6, unused=held)
    assert kinds(ledger)[-1] == "carried", "of the new charge"


def test_the_same_request_again_needs_no_carrying(ledger: Ledger) -> None:
    held = reserve(ledger)
    assert reserve(ledger, unused=held) == held
    assert kinds(ledger) == ["reserved"]


def test_a_charge_of_another_ledger_is_not_carried(ledger: Ledger, tmp_path: Path) -> None:
    foreign = reserve(Ledger(tmp_path / "other.db"))
    reserve(ledger)
    with pytest.raises(LedgerError, match="not open in this ledger"):
        reserve(ledger, 2, unused=foreign)


def test_carrying_keeps_the_plan_within_its_target(ledger: Ledger) -> None:
    """What is carried costs nothing more, and gives no allowance either."""
    limit = PlanLimit(max_epsilon=accounting.epsilon([EVENT], 1e-3) * 1.001, delta=1e-3)
    held = reserve(ledger, plan_limit=limit)
    held = reserve(ledger, 2, unused=held, plan_limit=limit)
    ledger.commit(held, RELEASE)
    with pytest.raises(PlanBudgetExceededError):
        reserve(ledger, 3, plan_limit=limit)


@pytest.mark.slow
def test_alone_a_site_counts_what_it_added_itself(ledger: Ledger) -> None:
    """Reserved by the smallest share, committed by the one that was added, closed by the first."""
    reserve(ledger, 1)
    ledger.commit(
        reserve(ledger, 2), RELEASE, Share(own_noise_multiplier=2.5, members=4, colluding_sites=1)
    )
    ledger.commit(reserve(ledger, 3), RELEASE)
    reserve(
        ledger,
        4,
        unused=reserve(ledger, 5, alone=AloneLimit(own_noise_multiplier=1.0, max_epsilon=50.0)),
    )
    reserve(ledger, 6, alone=None)
    owns = [event.noise_multiplier for event in ledger.events_alone("main")]
    assert owns == [OWN, 2.5, OWN, OWN, 4.0]
    assert [event.noise_multiplier for event in ledger.events("main")] == [4.0] * 5
    assert ledger.events_alone("other") == ()


def test_the_limit_alone_is_kept_and_nothing_is_recorded(ledger: Ledger) -> None:
    own = replace(EVENT, noise_multiplier=OWN)
    most = accounting.epsilon([own, own], 1e-3)
    alone = AloneLimit(own_noise_multiplier=OWN, max_epsilon=most)
    first = reserve(ledger, 1, alone=alone)
    reserve(ledger, 2, alone=alone)
    with pytest.raises(AloneBudgetExceededError, match="max_epsilon_alone"):
        reserve(ledger, 3, alone=alone)
    assert len(ledger.events("main")) == 2
    reserve(ledger, 3, alone=alone, unused=first)  # carrying adds nothing
    assert kinds(ledger) == ["reserved", "reserved", "carried"]


@pytest.mark.slow
def test_a_charge_that_is_carried_counts_with_the_share_that_it_may_now_pay_for(
    ledger: Ledger,
) -> None:
    """A larger roster, or a lower floor: a smaller share than the one that was admitted."""
    most = accounting.epsilon([replace(EVENT, noise_multiplier=OWN)], 1e-3)
    held = reserve(ledger, alone=AloneLimit(own_noise_multiplier=OWN, max_epsilon=most))
    smaller = AloneLimit(own_noise_multiplier=0.9 * OWN, max_epsilon=most)
    with pytest.raises(AloneBudgetExceededError):
        reserve(ledger, 2, alone=smaller, unused=held)
    with pytest.raises(AloneBudgetExceededError):
        reserve(ledger, alone=smaller)
    assert kinds(ledger) == ["reserved"]
    larger = AloneLimit(own_noise_multiplier=1.1 * OWN, max_epsilon=most)
    reserve(ledger, 2, alone=larger, unused=held)
    assert [event.noise_multiplier for event in ledger.events_alone("main")] == [1.1 * OWN]


def test_the_limit_alone_holds_for_steps_with_all_their_noise(ledger: Ledger) -> None:
    """They are in what it bounds. No share is written down, so none may be committed."""
    most = accounting.epsilon([replace(EVENT, noise_multiplier=OWN), EVENT], 1e-3)
    reserve(ledger, 1, alone=AloneLimit(own_noise_multiplier=OWN, max_epsilon=most))
    whole = AloneLimit(own_noise_multiplier=None, max_epsilon=most)
    held = reserve(ledger, 2, alone=whole)
    with pytest.raises(AloneBudgetExceededError):
        reserve(ledger, 3, alone=whole)
    assert reserve(ledger, 2, alone=whole) == held
    assert held.own_noise_multiplier is None
    with pytest.raises(LedgerError, match="all of the noise"):
        ledger.commit(held, RELEASE, SHARE)
    assert kinds(ledger) == ["reserved", "reserved"]


def test_a_limit_alone_that_was_lowered_holds_for_a_charge_that_is_open(ledger: Ledger) -> None:
    held = reserve(ledger)
    with pytest.raises(AloneBudgetExceededError):
        reserve(ledger, alone=AloneLimit(own_noise_multiplier=OWN, max_epsilon=0.01))
    assert reserve(ledger) == held


def test_a_charge_is_for_a_share_too(ledger: Ledger) -> None:
    """After a crash the same request with another share is another charge."""
    reserve(ledger)
    reserve(ledger, alone=AloneLimit(own_noise_multiplier=0.9 * OWN, max_epsilon=20.0))
    assert kinds(ledger) == ["reserved", "reserved"]


def test_a_share_smaller_than_what_was_charged_for_is_not_committed(ledger: Ledger) -> None:
    held = reserve(ledger)
    with pytest.raises(LedgerError, match="must not leave"):
        ledger.commit(held, RELEASE, replace(SHARE, own_noise_multiplier=0.999 * OWN))
    plain = reserve(ledger, 2, alone=None)
    with pytest.raises(LedgerError, match="all of the noise"):
        ledger.commit(plain, RELEASE, SHARE)
    ledger.commit(held, RELEASE, replace(SHARE, own_noise_multiplier=OWN))
    assert kinds(ledger) == ["reserved", "reserved", "committed"]


def test_a_share_is_read_as_it_was_written(ledger: Ledger) -> None:
    held = reserve(ledger)
    ledger.commit(held, RELEASE, SHARE)
    ledger.commit(held, RELEASE, SHARE)
    entry = ledger.entries()[-1]
    assert (entry.kind, entry.release_hash, entry.share) == (EntryKind.COMMITTED, RELEASE, SHARE)
    with pytest.raises(LedgerError, match="already committed"):
        ledger.commit(held, RELEASE, replace(SHARE, own_noise_multiplier=9.0))
    with pytest.raises(LedgerTamperedError, match="ledger entry 2"):
        _ = replace(entry, detail=f"{RELEASE} {{}}").share


def test_entries_without_sums_are_written_as_they_always_were(ledger: Ledger) -> None:
    ledger.commit(reserve(ledger, alone=None), RELEASE)
    reserved, committed = ledger.entries()
    assert set(json.loads(reserved.detail)) == {"target_epsilon", "delta", "filters", "request"}
    assert (committed.detail, committed.release_hash, committed.share) == (RELEASE, RELEASE, None)


def test_a_ledger_with_sums_is_exported_whole(ledger: Ledger, tmp_path: Path) -> None:
    ledger.commit(
        reserve(ledger, 2, unused=reserve(ledger)),
        RELEASE,
        SHARE,
    )
    key_path = tmp_path / "key.pem"
    public_key = create_signing_key(key_path)
    head = SignedHead.sign(
        load_signing_key(key_path), ledger.verify(), site="north", ledger="f" * 32
    )
    write_export(ledger.entries(), head, tmp_path / "export.csv")
    content = (tmp_path / "export.csv").read_bytes()
    export = parse_export(content, name="export.csv", trusted=[fingerprint(public_key)])
    assert export.charged == ledger.events("main")
    assert asdict(ledger.entries()[1])["kind"] == "carried"
