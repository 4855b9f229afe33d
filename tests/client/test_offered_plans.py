"""What a coordinator offers is shown with what this site would say to it, all of it."""

import json
from collections.abc import Collection
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from crafts_client import enrolment, round_time
from crafts_client.cli import app
from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_client.mechanism import mechanism_of
from crafts_client.offered_plans import judge
from crafts_client.plan_words import seconds_per_step
from crafts_client.round_time import RoundTime
from crafts_client.site import Site
from crafts_core.exchange import SignedPlan
from crafts_core.plan import Plan
from crafts_core.registrar import registrar_pb2 as messages
from crafts_privacy import signing
from crafts_privacy.ledger_rows import EntryKind, LedgerEntry
from support.charges import charge
from support.sites import Coordinator, make_site_home

pytestmark = pytest.mark.slow

STAGE = {"rounds": 2, "local_steps": 2, "learning_rate": 0.05}


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator) -> SiteHome:
    return make_site_home(tmp_path / "site", foundation, coordinator.public_key)


def signed(coordinator: Coordinator, plan: Plan) -> SignedPlan:
    return coordinator.message(plan, coordinator.start(plan)).plan


def by_nobody(text: str) -> SignedPlan:
    return SignedPlan(json=text, signature="", public_key="")


@pytest.fixture
def offer(monkeypatch):
    """Puts plans on the far side of the wire."""

    def offered(*plans: SignedPlan, finished: Collection[SignedPlan] = ()) -> None:
        sent = [
            messages.SignedPlan(**asdict(each), has_finished=each in finished) for each in plans
        ]

        class Registrar:
            def __init__(self, home: SiteHome) -> None: ...

            def __enter__(self):
                return SimpleNamespace(call=lambda _: SimpleNamespace(plans=sent))

            def __exit__(self, *_: object) -> None: ...

        monkeypatch.setattr(enrolment, "Registrar", Registrar)

    return offered


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"study": 1}', "[]", "null", "9" * 5000])
def test_a_plan_that_cannot_be_read_hides_no_other(home, coordinator, offer, text: str) -> None:
    plan = coordinator.plan()
    offer(by_nobody(text), signed(coordinator, plan))

    shown = run("plan", "list", "--home", home.path)
    listed = json.loads(run("plan", "list", "--json", "--home", home.path).stdout)

    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[0].startswith("unreadable")
    assert [each["hash"] for each in listed] == [None, plan.hash]
    assert listed[1]["refused"] == []
    assert listed[1]["epsilon_after"] == pytest.approx(8.0, abs=0.1)


def test_a_plan_is_shown_by_sixteen_digits_of_its_hash_and_approved_by_all(
    home, coordinator, offer
) -> None:
    plan = coordinator.plan()
    offer(signed(coordinator, plan))

    for short in (plan.hash[:15], "", plan.hash[:15] + "g", plan.hash + "0"):
        for command in ("show", "approve"):
            done = run("plan", command, short, "--home", home.path)
            assert (done.exit_code, "at least 16" in done.stderr) == (1, True), short
    assert run("plan", "show", plan.hash[:16], "--home", home.path).exit_code == 0
    refused = run("plan", "approve", plan.hash[:63], "--home", home.path)
    assert (refused.exit_code, "expected all 64 digits" in refused.stderr) == (1, True)
    assert home.approvals.all() == {}
    assert run("plan", "approve", plan.hash, "--home", home.path).exit_code == 0
    assert home.approvals.all().keys() == {plan.hash}


def test_of_two_plans_that_begin_alike_neither_is_taken_for_the_other(
    home, coordinator, offer, monkeypatch
) -> None:
    """Two that share 16 digits are made in minutes; the first that came was shown and approved."""
    values = coordinator.plan().study.model_dump()
    harmless, other = (coordinator.plan(study=values | {"seed": seed}) for seed in (1, 2))
    offer(signed(coordinator, harmless), signed(coordinator, other))
    own = Plan.hash.fget
    monkeypatch.setattr(Plan, "hash", property(lambda plan: "ab" * 8 + own(plan)[:48]))
    for command in ("show", "approve"):
        assert run("plan", command, "ab" * 8, "--home", home.path).exit_code == 1
    shown = run("plan", "show", "ab" * 8, "--home", home.path)
    assert harmless.hash in shown.stderr
    assert other.hash in shown.stderr
    assert run("plan", "approve", harmless.hash, "--home", home.path).exit_code == 0
    assert home.approvals.all().keys() == {harmless.hash}


def test_what_was_approved_is_taken_back_whatever_is_offered(home, coordinator, offer) -> None:
    plan = coordinator.plan()
    offer(signed(coordinator, plan))
    assert run("plan", "approve", plan.hash, "--home", home.path).exit_code == 0
    offer()
    unknown = run("plan", "approve", "0" * 64, "--take-back", "--home", home.path)
    assert (unknown.exit_code, plan.hash in unknown.stderr) == (1, True)
    assert run("plan", "approve", plan.hash[:16], "--take-back", "--home", home.path).exit_code == 0
    assert home.approvals.all() == {}


def test_the_noise_floor_is_told_before_anybody_approves(
    tmp_path, foundation, coordinator, offer
) -> None:
    home = make_site_home(
        tmp_path / "strict", foundation, coordinator.public_key, min_noise_multiplier=50.0
    )
    plan = coordinator.plan()
    offer(signed(coordinator, plan))

    assert "the site's floor is 50" in run("plan", "list", "--home", home.path).stdout
    shown = run("plan", "show", plan.hash, "--json", "--home", home.path)
    assert Plan.parse(json.loads(shown.stdout)) == plan
    assert "the site's floor is 50" in shown.stderr
    assert run("plan", "approve", plan.hash, "--home", home.path).exit_code == 1


def test_the_budget_is_told_as_what_was_spent_leaves_it(tmp_path, foundation, coordinator) -> None:
    """A Rényi filter: all of one plan fits; of a second a part does, then nothing."""
    home = make_site_home(
        *(tmp_path / "site", foundation, coordinator.public_key),
        max_epsilon=10.3,
        lifetime_filters=("renyi:2",),
    )
    values = coordinator.plan().study.model_dump()
    first, second = (coordinator.plan(study=values | {"seed": seed}) for seed in (1, 2))
    state, site = coordinator.start(first), Site(home, foundation)

    def after_rounds(*numbers: int):
        for number in numbers:
            request = coordinator.request(first, state, number=number)
            site.answer(coordinator.message(first, state, request=request))
        return judge(home, signed(coordinator, first)), judge(home, signed(coordinator, second))

    own, other = after_rounds(1)
    assert (own.refused, own.remark, other.refused) == ((), "", ())
    assert own.epsilon_after == pytest.approx(9.60, abs=0.01), "what it spent counts once"
    assert "ends before its last round" in other.remark
    _, other = after_rounds(2, 3, 4)
    (refused,) = other.refused
    assert refused.startswith("lifetime budget: not one more round fits: with it renyi:2 counts")


def test_a_second_plan_is_judged_by_the_sum_of_targets(tmp_path, foundation, coordinator) -> None:
    home = make_site_home(tmp_path / "site", foundation, coordinator.public_key, max_epsilon=9.0)
    values = coordinator.plan().study.model_dump()
    first, second = (coordinator.plan(study=values | {"seed": seed}) for seed in (1, 2))
    Site(home, foundation).answer(coordinator.message(first, coordinator.start(first)))

    own, other = (judge(home, signed(coordinator, plan)) for plan in (first, second))

    assert (own.refused, own.remark, own.epsilon_after) == ((), "", 8.0)
    assert other.refused == (
        "lifetime budget: not one more round fits: with it sums counts epsilon 16.000 of 9 at "
        "delta 0.002 of 0.001",
    )
    changed = home.policy.model_copy(update={"lifetime_filters": ("renyi:3",)})
    (refused,) = judge(replace(home, policy=changed), signed(coordinator, first)).refused
    assert "set it back" in refused


def test_a_kept_figure_approves_nothing(tmp_path, foundation, coordinator, offer) -> None:
    """What is kept was forged, to refuse nothing: who approves has the plan judged anew."""
    home = make_site_home(tmp_path / "site", foundation, coordinator.public_key, max_epsilon=9.0)
    plan = coordinator.plan()
    other = coordinator.plan(study=plan.study.model_dump() | {"seed": 2})
    charge(home, plan)
    offer(signed(coordinator, other))
    shown = run("plan", "show", other.hash[:16], "--home", home.path).stdout
    assert "not one more round fits" in shown
    assert f"to compare: {other.hash}\n" in shown, "of a refused plan, too"
    kept = home.path / "figures.json"
    forged = {question: {"refused": []} for question in json.loads(kept.read_text())}
    kept.write_text(json.dumps(forged))
    assert "Refused" not in run("plan", "show", other.hash, "--home", home.path).stdout

    done = run("plan", "approve", other.hash, "--home", home.path)

    assert (done.exit_code, "not one more round fits" in done.stderr) == (1, True)
    assert not home.approvals.all()


def test_approving_again_allows_one_run_more(home, foundation, coordinator, offer) -> None:
    plan = coordinator.plan()
    offer(signed(coordinator, plan))
    run("plan", "approve", plan.hash, "--home", home.path)
    Site(home, foundation).answer(coordinator.message(plan, coordinator.start(plan)))
    assert home.approvals.runs_of(plan) == 1

    done = run("plan", "approve", plan.hash, "--home", home.path)

    assert "for one run more, after 1" in done.stdout
    assert home.approvals.runs_of(plan) == 2


def test_a_plan_whose_cost_nobody_can_compute_hides_no_other(home, coordinator, offer) -> None:
    privacy = coordinator.plan().privacy.model_dump()
    extreme = coordinator.plan(privacy=privacy | {"sample_rate": 1e-9})
    good = coordinator.plan()
    offer(signed(coordinator, extreme), signed(coordinator, good))
    listed = json.loads(run("plan", "list", "--json", "--home", home.path).stdout)
    assert len(listed) == 2
    assert (listed[1]["hash"], listed[1]["refused"]) == (good.hash, [])
    assert run("plan", "show", good.hash[:16], "--home", home.path).exit_code == 0


@pytest.mark.parametrize("error", [OverflowError, ZeroDivisionError, ValueError, MemoryError])
def test_whatever_breaks_in_the_arithmetic_of_a_plan_refuses_it(
    home, coordinator, offer, monkeypatch, error
) -> None:
    plan = coordinator.plan()
    offer(signed(coordinator, plan), by_nobody("{"))

    def breaks(*_: object) -> None:
        raise error

    monkeypatch.setattr("crafts_privacy.plan_check.plan_noise_multiplier", breaks)
    first, second = json.loads(run("plan", "list", "--json", "--home", home.path).stdout)
    assert "cannot be computed" in first["refused"][0]
    assert second["hash"] is None
    assert run("plan", "approve", plan.hash, "--home", home.path).exit_code == 1


def test_what_a_budget_cannot_be_computed_for_is_refused(home, coordinator, offer, monkeypatch):
    plan = coordinator.plan()
    offer(signed(coordinator, plan))

    def breaks(*_: object, anew: bool) -> None:
        raise OverflowError

    monkeypatch.setattr("crafts_client.offered_plans._with_budget", breaks)
    (told,) = json.loads(run("plan", "list", "--json", "--home", home.path).stdout)
    assert told["refused"] == ["what it costs cannot be computed here (OverflowError)"]


def test_targets_that_match_no_layer_are_refused_before_approval(home, coordinator, offer) -> None:
    plan = coordinator.plan(adapter={"kind": "lora", "rank": 2, "targets": ["to_q", "nowhere"]})
    text = plan.to_json()
    signature = signing.sign(coordinator._key, text.encode())
    offer(SignedPlan(json=text, signature=signature, public_key=coordinator.public_key))
    refused = run("plan", "approve", plan.hash, "--home", home.path)
    assert (refused.exit_code, "'nowhere' matches no Linear" in refused.stderr) == (1, True)


def test_a_plan_is_shown_in_words_before_its_json(home, coordinator, offer) -> None:
    plan = coordinator.plan()
    offer(signed(coordinator, plan))
    shown = run("plan", "show", plan.hash[:16], "--home", home.path).stdout
    words, _, text = shown.partition("\n{")
    assert Plan.parse(json.loads("{" + text)) == plan
    for said in (
        "asks for 2 rounds of 2 steps of pretraining, then 2 rounds of 2 steps of alignment",
        f"All digits of its hash, to compare: {plan.hash}\n",
        "What leaves: in each round one update of the adapter",
        "epsilon 8 at delta 0.001 for all rounds together",
        "the cohort's life stands at epsilon ",
        f"adds noise of {mechanism_of(plan, declared_patients=1).noise_multiplier:.3g} times that",
        "How long a round takes here is known once a first one ran",
        f"Next: crafts-client plan approve {plan.hash}",
    ):
        assert said in words, said


@pytest.mark.parametrize(
    ("waits_s", "every", "leaves"),
    [
        (3600.0, "auto", "then, whoever was drawn"),
        (60.0, "auto", "then, whoever was drawn"),
        (240.0, 150.0, "after 2.5 minutes, by answer_every_s"),
        (170.0, 90.0, "after 3 minutes, by answer_every_s"),
        (3600.0, 0.0, None),
    ],
)
def test_a_plan_is_shown_with_what_a_round_will_take_here(
    tmp_path, foundation, coordinator, offer, monkeypatch, waits_s: float, every, leaves
) -> None:
    home = make_site_home(
        tmp_path / "timed", foundation, coordinator.public_key, answer_every_s=every
    )
    aggregation = coordinator.plan().aggregation.model_dump() | {"deadline_s": waits_s}
    plan = coordinator.plan(aggregation=aggregation)
    offer(signed(coordinator, plan))
    taken = [
        RoundTime(stage=stage, seconds=seconds)
        for stage, seconds in zip(plan.stage, (90, 120), strict=True)
    ]
    monkeypatch.setattr(round_time, "time_rounds", lambda home, plan: taken)
    words = run("plan", "show", plan.hash[:16], "--time", "--home", home.path).stdout
    assert "at most: 1.5 minutes of pretraining, 2 minutes of alignment." in words
    assert ("Its answer leaves" in words) is (leaves is not None)
    assert leaves is None or f"Its answer leaves {leaves}" in words
    assert ("for an answer: one of this site could come too late" in words) is (waits_s < 200)


def test_a_plan_is_shown_where_its_rounds_cannot_be_timed(
    home, coordinator, offer, monkeypatch
) -> None:
    plan = coordinator.plan()
    offer(signed(coordinator, plan))

    def nothing(home, plan):
        raise HomeError("there are no tiles")

    monkeypatch.setattr(round_time, "time_rounds", nothing)
    shown = run("plan", "show", plan.hash[:16], "--time", "--home", home.path)
    assert shown.exit_code == 0
    assert "was not timed: there are no tiles." in shown.stdout
    assert "asks for 2 rounds" in shown.stdout


def test_a_list_of_plans_ends_with_what_to_do_next(home, coordinator, offer) -> None:
    def last_line(*plans: Plan) -> str:
        offer(*(signed(coordinator, plan) for plan in plans))
        return run("plan", "list", "--home", home.path).stdout.splitlines()[-1]

    study = coordinator.plan().study.model_dump()
    first, second = (coordinator.plan(study=study | {"seed": seed}) for seed in (1, 2))
    control = coordinator.plan(stage=[STAGE | {"name": "control", "modality": "nuclei"}])
    assert "no plan yet; ask again" in last_line()
    assert last_line(first, second) == f"next: crafts-client plan show {first.hash[:16]}"
    home.approvals.approve(first, runs_so_far=0)
    assert last_line(first, second) == f"next: crafts-client plan show {second.hash[:16]}"
    assert last_line(first) == "next: crafts-client join, if it does not run"
    assert last_line(control) == "this site takes part in none of them"


def test_a_plan_that_has_finished_is_no_next_step(home, coordinator, offer) -> None:
    study = coordinator.plan().study.model_dump()
    plans = [coordinator.plan(study=study | {"seed": seed}) for seed in (1, 2)]
    first, second = (signed(coordinator, plan) for plan in plans)
    offer(first, second, finished=[first])
    *told, last = run("plan", "list", "--home", home.path).stdout.splitlines()
    assert told[0].endswith("has finished")
    assert last == f"next: crafts-client plan show {plans[1].hash[:16]}"
    listed = json.loads(run("plan", "list", "--json", "--home", home.path).stdout)
    assert [each["finished"] for each in listed] == [True, False]
    offer(first, finished=[first])
    assert "all of them have finished" in run("plan", "list", "--home", home.path).stdout


def test_how_long_a_round_takes_is_taken_from_the_newest_one_that_ran() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    facts = {"hash": "", "previous_hash": "", "plan_hash": "", "run_id": "", "stage": ""}
    facts |= {"cohort": "", "detail": "", "round": 1, "noise_multiplier": 1.0, "sample_rate": 1.0}

    def entry(number: int, kind: EntryKind, reservation: int, seconds: int) -> LedgerEntry:
        when = at + timedelta(seconds=seconds)
        own = {"sequence": number, "kind": kind, "reservation": reservation, "recorded_at": when}
        return LedgerEntry(steps=4, **own, **facts)

    entries = [
        entry(1, EntryKind.RESERVED, 1, 0),
        entry(2, EntryKind.COMMITTED, 1, 400),
        entry(3, EntryKind.RESERVED, 3, 1000),
        entry(4, EntryKind.COMMITTED, 3, 1200),
        entry(5, EntryKind.RESERVED, 5, 9000),
    ]
    assert seconds_per_step(entries) == 50.0
    assert seconds_per_step(entries[:1]) is None
