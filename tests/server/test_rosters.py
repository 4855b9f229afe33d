"""Which key signs for which site, fixed for each plan of sums."""

import math
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from crafts_core.plan import Plan
from crafts_core.roster import RosterError
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.secure_aggregation.fixed_point import sum_fits
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.enrolments import Enrolments
from crafts_server.errors import EnrolmentError, HomeError
from crafts_server.registry import PlanRecord, Registry
from crafts_server.rosters import Rosters
from support.certificates import identity_of
from support.studies import small_plan
from support.summing_sites import plan_of_updates, summed_plan

pytestmark = pytest.mark.slow

SITES = {"aachen": 40, "bern": 60, "coimbra": 80}
PLAN = summed_plan()


@pytest.fixture
def registry(tmp_path: Path):  # type: ignore[no-untyped-def]
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}")
    for number, (site, patients) in enumerate(SITES.items(), start=1):
        CohortSizes(registry).agree(site, patients)
        Rosters(registry).publish(site, identity_of(number))
    yield registry
    registry.close()


def fix(registry: Registry, plan: Plan) -> None:
    record = PlanRecord(
        hash=plan.hash, study="s", json=plan.to_json(), signature="s", public_key="k"
    )
    Rosters(registry).fix(plan, record)


def test_the_roster_names_every_site_its_number_and_its_key(registry: Registry) -> None:
    fix(registry, PLAN)
    roster = Rosters(registry).fixed(PLAN)
    assert roster.patients == SITES
    assert roster.identities == {
        "aachen": identity_of(1),
        "bern": identity_of(2),
        "coimbra": identity_of(3),
    }
    assert roster.plan_hash == PLAN.hash


def test_a_fixed_roster_stays_whatever_is_published_until_it_is_renewed(
    registry: Registry,
) -> None:
    rosters = Rosters(registry)
    fix(registry, PLAN)
    before = rosters.fixed(PLAN)
    rosters.publish("aachen", identity_of(9))
    CohortSizes(registry).agree("dresden", 20)
    rosters.publish("dresden", identity_of(4))
    fix(registry, PLAN)
    assert rosters.fixed(PLAN) == before
    renewed = rosters.renew(PLAN)
    assert rosters.fixed(PLAN) == renewed
    assert renewed.identities["aachen"] == identity_of(9)
    assert "dresden" in renewed.patients
    assert renewed.phrase != before.phrase


def test_who_has_published_no_key_is_named(registry: Registry) -> None:
    CohortSizes(registry).agree("dresden", 20)
    with pytest.raises(RosterError, match="no identity key of dresden"):
        fix(registry, PLAN)
    with pytest.raises(HomeError, match="has no roster; sign it again"):
        Rosters(registry).fixed(PLAN)
    aggregation = PLAN.aggregation.model_copy(update={"secure_aggregation": False})
    with pytest.raises(HomeError, match="so it needs no roster"):
        Rosters(registry).fixed(PLAN.model_copy(update={"aggregation": aggregation}))


@pytest.mark.parametrize(
    "key", ["", "short", identity_of(7)[:-1], identity_of(7) + "=", "*" * 43 + "="]
)
def test_what_is_no_key_is_refused(registry: Registry, key: str) -> None:
    with pytest.raises(EnrolmentError, match="must be an Ed25519 public key"):
        Rosters(registry).publish("aachen", key)


def test_nobody_takes_another_sites_key(registry: Registry) -> None:
    with pytest.raises(EnrolmentError, match="another site signs with this identity key"):
        Rosters(registry).publish("bern", identity_of(1))
    Rosters(registry).publish("aachen", identity_of(1))


def test_a_site_that_was_renamed_keeps_its_key_and_so_its_ledger(registry: Registry) -> None:
    """It was told to make a new home: a new salt and an empty ledger for the same patients."""
    enrolments = Enrolments(registry)
    for name, node in (("dresdn", "one"), ("dresden", "two")):
        token = enrolments.invite(name, patients=7, valid_for=timedelta(hours=1))
        enrol = partial(
            enrolments.enrol,
            token,
            fingerprint=node * 20,
            node_public_key=node,
            identity_public_key=identity_of(4),
            declared_patients=7,
        )
        if name == "dresden":
            with pytest.raises(EnrolmentError, match="under an older name, it must leave or be"):
                enrol()
            enrolments.revoke("dresdn")
        assert enrol() == name
    with pytest.raises(EnrolmentError, match="another site signs"):
        enrolments.rosters.publish("bern", identity_of(4))


def test_a_plan_whose_sums_could_wrap_is_refused_with_the_grid_that_fits(
    registry: Registry,
) -> None:
    fine = PLAN.model_dump(mode="json")
    # So much noise that it is what decides: without floors 21 bits would fit.
    fine["privacy"] |= {"sum_grid_bits": 20, "target_epsilon": 0.1}
    plan = Plan.parse(fine)
    with pytest.raises(HomeError, match=r"sum_grid_bits of 19 or less.*set it to 19"):
        fix(registry, plan)
    noise = plan_noise_multiplier(plan) * 4.0 * math.sqrt(3)  # each may have a floor of its own
    assert sum_fits(19, expected_patients=90, total_noise_multiplier=noise)
    assert not sum_fits(20, expected_patients=90, total_noise_multiplier=noise)


def test_everybody_is_in_a_release_and_its_sum_must_fit_too(registry: Registry) -> None:
    CohortSizes(registry).agree("dresden", 900)
    Rosters(registry).publish("dresden", identity_of(4))
    values = PLAN.model_dump(mode="json")
    values["privacy"] |= {"sum_grid_bits": 20, "sample_rate": 0.1}
    fix(registry, Plan.parse(values))
    values["study"]["captions"] = ["H&E, normal colon", "H&E, normal lung"]
    values["stage"] = [{"name": "anchors", "noise_multiplier": 4.0}, *values["stage"]]
    with pytest.raises(HomeError, match=r"sum_grid_bits of 18 or less.*set it to 18"):
        fix(registry, Plan.parse(values))
    patients = 900 + sum(SITES.values())
    noise = 4.0 * 4.0 * math.sqrt(4)
    assert sum_fits(18, expected_patients=patients, total_noise_multiplier=noise)
    assert not sum_fits(19, expected_patients=patients, total_noise_multiplier=noise)


def test_a_plan_of_updates_in_whose_sums_one_site_is_most_is_not_signed(
    registry: Registry,
) -> None:
    """By patients 0.69 of a sum; with the caps that plans have 0.6, which every site takes."""
    CohortSizes(registry).agree("dresden", 400)
    Rosters(registry).publish("dresden", identity_of(4))
    heavy, capped = (plan_of_updates(rule=r) for r in ("by_patients", "alignment_regularized"))
    with pytest.raises(HomeError, match=r"dresden would be 0\.69 .* max_weight 0\.6"):
        fix(registry, heavy)
    fix(registry, capped)


def test_too_few_sites_are_said_when_the_plan_is_signed(registry: Registry) -> None:
    plan = summed_plan(min_sites=4)
    with pytest.raises(HomeError, match="needs 4 sites, 3 are enrolled"):
        fix(registry, plan)


def test_a_plan_that_was_refused_is_not_offered(registry: Registry) -> None:
    """Nor one that an older program kept without its roster."""
    plan = summed_plan(min_sites=4)
    with pytest.raises(HomeError):
        fix(registry, plan)
    assert registry.plans() == []
    registry.add_plan(
        PlanRecord(hash=plan.hash, study="s", json=plan.to_json(), signature="s", public_key="k")
    )
    fix(registry, PLAN)
    assert [each.hash for each in registry.offered_plans()] == [PLAN.hash]


def test_all_that_keeps_a_plan_from_being_fixed_is_named_at_once(registry: Registry) -> None:
    CohortSizes(registry).agree("dresden", 400)
    plan = plan_of_updates(rule="by_patients")
    assert [problem[:40] for problem in Rosters(registry).problems(plan)] == [
        "roster: no identity key of dresden; ask ",
        "dresden would be 0.69 of the plan's sums",
    ]
    few = summed_plan(min_sites=5)
    assert "the plan needs 5 sites, 4 are enrolled" in list(Rosters(registry).problems(few))


def test_a_fixed_plan_has_no_problem_whoever_enrols(registry: Registry) -> None:
    """To sign it again, or to train it, fixes nothing anew."""
    fix(registry, PLAN)
    CohortSizes(registry).agree("dresden", 20)
    assert list(Rosters(registry).problems(PLAN)) == []
    fix(registry, PLAN)


def test_a_plan_without_sums_needs_no_roster(registry: Registry) -> None:
    with pytest.raises(HomeError, match="has no secure_aggregation"):
        Rosters(registry).renew(small_plan())
