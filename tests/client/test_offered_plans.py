"""What a coordinator offers is shown with what this site would say to it, all of it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from crafts_client import enrolment
from crafts_client.cli import app
from crafts_client.home import SiteHome
from crafts_client.offered_plans import judge
from crafts_client.signed_plan import SignedPlan
from crafts_client.site import Site
from crafts_core.plan import Plan
from support.sites import Coordinator, make_site_home


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

    def offered(*plans: SignedPlan) -> None:
        class Registrar:
            def __init__(self, home: SiteHome) -> None: ...

            def __enter__(self):
                return SimpleNamespace(call=lambda _: SimpleNamespace(plans=plans))

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


def test_a_plan_is_approved_by_sixteen_digits_of_its_hash(home, coordinator, offer) -> None:
    plan = coordinator.plan()
    offer(signed(coordinator, plan))

    for short in (plan.hash[:15], "", plan.hash[:15] + "g", plan.hash + "0"):
        for command in ("show", "approve"):
            done = run("plan", command, short, "--home", home.path)
            assert (done.exit_code, "at least 16" in done.stderr) == (1, True), short
    assert home.approvals.all() == {}
    assert run("plan", "approve", plan.hash[:16], "--home", home.path).exit_code == 0
    assert home.approvals.all().keys() == {plan.hash}


def test_the_noise_floor_is_told_before_anybody_approves(
    tmp_path, foundation, coordinator, offer
) -> None:
    home = make_site_home(
        tmp_path / "strict", foundation, coordinator.public_key, min_noise_multiplier=50.0
    )
    plan = coordinator.plan()
    offer(signed(coordinator, plan))

    assert "the site's floor is 50" in run("plan", "list", "--home", home.path).stdout
    shown = run("plan", "show", plan.hash, "--home", home.path)
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


def test_approving_again_allows_one_run_more(home, foundation, coordinator, offer) -> None:
    plan = coordinator.plan()
    offer(signed(coordinator, plan))
    run("plan", "approve", plan.hash, "--home", home.path)
    Site(home, foundation).answer(coordinator.message(plan, coordinator.start(plan)))
    assert home.approvals.runs_of(plan.hash) == 1

    done = run("plan", "approve", plan.hash, "--home", home.path)

    assert "for one run more, after 1" in done.stdout
    assert home.approvals.runs_of(plan.hash) == 2
