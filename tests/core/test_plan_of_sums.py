"""Keys of sums: who does not use them keeps the bytes, and who does must use them whole."""

import hashlib
import json

import pytest

from crafts_core.exchange import RoundRequest
from crafts_core.plan import Plan, PlanError
from crafts_core.roster import Roster, RosterError
from support.sums import roster_of, sum_sites

PLAIN = {
    "study": {"name": "s", "foundation": "f" * 64, "seed": 1},
    "adapter": {"kind": "lora"},
    "stage": [{"name": "pretraining", "rounds": 4, "local_steps": 1, "learning_rate": 0.1}],
    "privacy": {
        "mechanism": "patient_dp",
        "target_epsilon": 1.0,
        "delta": 1e-3,
        "max_grad_norm": 1.0,
        "sample_rate": 0.4,
        "tiles_per_patient": 2,
        "draws_per_tile": 1,
    },
    "aggregation": {"rule": "uniform", "min_sites": 3},
}
OF_SUMS = {
    "privacy": {"trust": "distributed", "colluding_sites": 1, "sum_grid_bits": 18},
    "aggregation": {"secure_aggregation": True},
}


def plan_of(**sections: dict[str, object]) -> Plan:
    values = json.loads(json.dumps(PLAIN))
    for name, changes in sections.items():
        target = values[name][0] if name == "stage" else values[name]
        target.update(changes)
    return Plan.parse(values)


def distributed(**sections: dict[str, object]) -> Plan:
    merged = {
        name: OF_SUMS.get(name, {}) | sections.get(name, {}) for name in {*OF_SUMS, *sections}
    }
    return plan_of(**merged)


def test_a_plain_plan_has_the_hash_that_it_always_had() -> None:
    assert plan_of().hash == ("cad22f3bf59e41db351898a1ce74a01f333bd5fea82c3d0651226921705a2f3f")
    text = plan_of().to_json()
    for key in ("colluding", "grid_bits", "spare", "masked", "attempts", "diagnose"):
        assert key not in text


def test_a_plan_of_sums_keeps_its_keys_on_the_way() -> None:
    plan = distributed(privacy={"spare_steps": 3}, aggregation={"max_attempts": 2})
    assert Plan.parse(json.loads(plan.to_json())) == plan
    assert (plan.privacy.colluding_sites, plan.privacy.sum_grid_bits) == (1, 18)
    assert (plan.total_steps, plan.charged_steps) == (4, 7)
    others = [
        distributed(privacy={"colluding_sites": 1, "spare_steps": 4}),
        distributed(privacy={"sum_grid_bits": 19}),
        distributed(aggregation={"masked_deadline_s": 60.0}),
    ]
    assert len({each.hash for each in (*others, plan, distributed())}) == 5


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"privacy": {"trust": "distributed"}}, "colluding_sites"),
        ({"privacy": {"colluding_sites": 1}}, "no other trust"),
        ({"aggregation": {"secure_aggregation": True, "min_sites": 2}}, "min_sites of 3"),
        (
            {
                "privacy": {"mechanism": "none", "target_epsilon": None, "delta": None},
                "aggregation": {"secure_aggregation": True},
            },
            "secure_aggregation = true needs mechanism patient_dp",
        ),
        ({"aggregation": {"max_attempts": 2}}, "belongs to secure_aggregation"),
        (
            {
                "privacy": {
                    "mechanism": "none",
                    "target_epsilon": None,
                    "delta": None,
                    "spare_steps": 1,
                }
            },
            "need mechanism",
        ),
    ],
)
def test_keys_of_sums_come_whole_or_not_at_all(
    sections: dict[str, dict[str, object]], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        plan_of(**sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"stage": {"local_steps": 2}}, "local_steps = 1"),
        ({"aggregation": {"min_sites": 2}}, "min_sites"),
        ({"aggregation": {"min_sites": 4}, "privacy": {"colluding_sites": 3}}, "min_sites"),
        ({"aggregation": {"secure_aggregation": False}}, "needs secure_aggregation = true"),
        ({"privacy": {"sum_grid_bits": 23}}, "sum_grid_bits"),
        ({"privacy": {"colluding_sites": 0}}, "colluding_sites"),
    ],
)
def test_a_plan_of_sums_that_protects_nobody_is_refused(
    sections: dict[str, dict[str, object]], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        distributed(**sections)


def test_updates_with_all_their_noise_go_into_sums_by_one_key() -> None:
    """Any number of local steps; nothing that belongs to shares of noise."""
    plan = plan_of(
        stage={"local_steps": 12}, aggregation={"secure_aggregation": True, "max_attempts": 2}
    )
    assert Plan.parse(json.loads(plan.to_json())) == plan
    assert plan.hash != plan_of(stage={"local_steps": 12}).hash
    assert (plan.privacy.trust, plan.privacy.colluding_sites) == ("site", None)


def test_a_first_attempt_has_the_bytes_and_hash_that_rounds_always_had() -> None:
    values = {
        "run_id": "r",
        "plan_hash": "a" * 64,
        "round": 2,
        "stage_index": 0,
        "factor": "second",
        "checkpoint_hash": "b" * 64,
        "stage_start_hash": "c" * 64,
    }
    first, second = RoundRequest.from_scalars(values), RoundRequest(**values, attempt=2)
    assert first.to_scalars() == values
    assert first.model_dump(include={"round"}) == {"round": 2}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert first.hash == hashlib.sha256(canonical.encode()).hexdigest()
    assert RoundRequest.from_scalars(second.to_scalars()) == second
    assert second.hash != first.hash


def test_a_roster_with_identities_has_another_hash_and_one_phrase() -> None:
    sites = sum_sites(3)
    roster = roster_of(sites)
    plain = Roster.of(roster.plan_hash, roster.patients)
    assert "identity" not in plain.to_json()
    assert plain.identities == {}
    assert Roster.parse(roster.to_json()) == roster
    other = sum_sites(4)
    assert len({plain.phrase, roster.phrase, roster_of(other).phrase}) == 3
    groups = roster.phrase.split()
    assert [len(group) for group in groups] == [5] * 12
    assert int("".join(groups)) == int(roster.hash[:50], 16) % 10**60


def test_a_roster_names_every_identity_once_or_none() -> None:
    roster = roster_of(sum_sites(3))
    one, two, three = sorted(roster.identities)
    keys = roster.identities
    with pytest.raises(RosterError, match=f"no identity key of {three}"):
        Roster.of(roster.plan_hash, roster.patients, {one: keys[one], two: keys[two]})
    with pytest.raises(RosterError, match="identity of its own"):
        Roster.of(roster.plan_hash, roster.patients, dict.fromkeys(keys, keys[one]))
    values = json.loads(roster.to_json())
    del values["sites"][0]["identity"]
    with pytest.raises(RosterError, match="identity of its own"):
        Roster.parse(json.dumps(values))
