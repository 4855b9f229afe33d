import copy
from collections.abc import Callable

import pytest

from crafts_client.errors import HomeError
from crafts_client.home import to_toml
from crafts_client.mechanism import mechanism_of
from crafts_client.policy import (
    Policy,
    PolicyError,
    Rule,
    check_not_replayed,
    check_request,
    check_run,
)
from crafts_client.signed_plan import MAX_PLAN_BYTES, SignedPlan, open_signed_plan
from crafts_core.exchange import RoundRequest
from crafts_core.plan import Plan, PlanError
from crafts_privacy import signing
from crafts_privacy.mechanism import Mechanism
from support.sites import plan_values, policy_of, without_privacy
from support.sum_study import distributed_values

HASH = "ab" * 32


def plan(change: Callable[[dict], None] = lambda values: None) -> Plan:
    values = copy.deepcopy(plan_values(HASH))
    change(values)
    return Plan.parse(values)


def request(of: Plan, **changes: object) -> RoundRequest:
    values = {
        "run_id": "run-1",
        "plan_hash": of.hash,
        "round": 1,
        "stage_index": 0,
        "factor": "second",
        "checkpoint_hash": HASH,
        "stage_start_hash": HASH,
    }
    return RoundRequest.model_validate(values | changes)


def refused_rules(policy: Policy, asked: Plan, *, declared_patients: int = 100) -> list[Rule]:
    return [e.rule for e in policy.violations(asked, declared_patients=declared_patients)]


def set_privacy(**values: object) -> Callable[[dict], None]:
    return lambda plan: plan["privacy"].update(values)


def set_stage(**values: object) -> Callable[[dict], None]:
    return lambda plan: plan["stage"][0].update(values)


def test_an_allowed_plan_passes_every_rule() -> None:
    policy_of("key").check_plan(plan(), declared_patients=100)


@pytest.mark.parametrize(
    ("rule", "limit", "change"),
    [
        (Rule.EPSILON, {"max_epsilon": 7.9}, set_privacy()),
        (Rule.DELTA, {"max_delta": 1e-4}, set_privacy()),
        (Rule.SAMPLE_RATE, {"max_sample_rate": 0.4}, set_privacy()),
        (Rule.TILES, {"max_tiles_per_patient": 16}, set_privacy(tiles_per_patient=17)),
        (Rule.DRAWS, {"max_draws_per_tile": 16}, set_privacy(draws_per_tile=17)),
        (Rule.STAGE, {"allowed_stages": ("pretraining",)}, set_privacy()),
        (Rule.STEPS, {"max_local_steps": 4}, set_stage(local_steps=5)),
        (Rule.ROUNDS, {"max_rounds": 3}, set_privacy()),
        (Rule.PATIENTS, {"min_patients": 101}, set_privacy()),
        (Rule.SECURE_AGGREGATION, {"require_secure_aggregation": True}, set_privacy()),
    ],
)
def test_each_limit_refuses_the_plan_that_passes_it(
    rule: Rule, limit: dict[str, object], change: Callable[[dict], None]
) -> None:
    assert refused_rules(policy_of("key", **limit), plan(change)) == [rule]


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        (Rule.TRUST, {"allowed_trust": ("site",)}),
        (Rule.COLLUDING, {"min_colluding_sites": 2}),
        (Rule.MEMBERS, {"min_members": 4}),
    ],
)
def test_each_limit_on_sums_refuses_the_plan_that_passes_it(
    rule: Rule, limit: dict[str, object]
) -> None:
    generous = {"allowed_trust": ("distributed",), "max_epsilon_alone": 10.0}
    asked = Plan.parse(distributed_values(HASH))
    assert refused_rules(policy_of("key", **generous), asked) == []
    assert refused_rules(policy_of("key", **(generous | limit)), asked) == [rule]


def test_a_later_attempt_at_the_last_round_is_no_replay() -> None:
    """And the same or an earlier one is, as is an earlier round at any attempt."""
    asked = request(plan(), round=2)
    for last, attempt, again in ((2, 1, 2), (2, 3, 4), (1, 5, 1)):
        check_not_replayed(asked.model_copy(update={"attempt": again}), last, attempt)
    for last, attempt, again in ((2, 1, 1), (2, 3, 3), (2, 3, 2), (3, 1, 9)):
        with pytest.raises(PolicyError):
            check_not_replayed(asked.model_copy(update={"attempt": again}), last, attempt)


def test_only_sums_are_attempted_again() -> None:
    """Else a coordinator could have one round of a plain study released again and again."""
    plain, summed = plan(), Plan.parse(distributed_values(HASH))
    with pytest.raises(PolicyError) as refused:
        check_request(plain, request(plain, attempt=2), foundation_hash=HASH)
    assert refused.value.rule == Rule.REPLAY
    check_request(summed, request(summed, attempt=2), foundation_hash=HASH)


def test_a_limit_is_inclusive() -> None:
    policy = policy_of("key", max_epsilon=8.0, max_delta=1e-3, max_rounds=4, max_local_steps=2)

    policy.check_plan(plan(), declared_patients=100)


def test_training_without_privacy_needs_the_sites_word() -> None:
    asked = Plan.parse(without_privacy(plan_values(HASH)))

    assert refused_rules(policy_of("key"), asked) == [Rule.PRIVATE]
    assert refused_rules(policy_of("key", allow_non_private=True), asked) == []


def test_every_violation_is_named() -> None:
    policy = policy_of("key", max_epsilon=1.0, max_rounds=1)

    assert refused_rules(policy, plan()) == [Rule.EPSILON, Rule.ROUNDS]


def test_noise_below_the_floor_is_refused() -> None:
    policy = policy_of("key", min_noise_multiplier=0.5)
    weak = Mechanism(noise_multiplier=0.49, max_grad_norm=1, sample_rate=0.5, expected_patients=5)

    with pytest.raises(PolicyError, match="floor") as caught:
        policy.check_noise(plan(), weak)
    assert caught.value.rule is Rule.NOISE


def test_a_floor_for_shares_is_of_sums_alone() -> None:
    policy = policy_of("key", min_own_noise_multiplier=2.0)
    mechanism = Mechanism(
        noise_multiplier=0.5, max_grad_norm=1, sample_rate=0.5, expected_patients=5
    )
    policy.check_noise(plan(), mechanism)
    with pytest.raises(PolicyError, match=r"at most 1\.99, .* is 2;") as caught:
        policy.check_noise(Plan.parse(distributed_values(HASH)), mechanism)
    assert caught.value.rule is Rule.NOISE


@pytest.mark.parametrize("norm", [2.0001, float("inf"), float("nan")])
def test_an_update_that_is_too_long_is_refused(norm: float) -> None:
    with pytest.raises(PolicyError) as caught:
        policy_of("key", max_update_norm=2.0).check_update_norm(norm)
    assert caught.value.rule is Rule.UPDATE_NORM


@pytest.mark.parametrize("norm", [2.0001, float("inf"), float("nan")])
def test_an_adapter_that_is_too_long_is_refused(norm: float) -> None:
    with pytest.raises(PolicyError) as caught:
        policy_of("key", max_adapter_norm=2.0).check_adapter_norm(norm)
    assert caught.value.rule is Rule.ADAPTER_NORM


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        (Rule.PLAN_HASH, {"plan_hash": "cd" * 32}),
        (Rule.ROUND, {"round": 5}),
        (Rule.ROUND, {"stage_index": 1}),
        (Rule.FACTOR, {"factor": "first"}),
        (Rule.FACTOR, {"factor": "both"}),
    ],
)
def test_a_request_that_is_not_in_the_plan_is_refused(
    rule: Rule, changes: dict[str, object]
) -> None:
    asked = plan()
    with pytest.raises(PolicyError) as caught:
        check_request(asked, request(asked, **changes), foundation_hash=HASH)
    assert caught.value.rule is rule


def test_a_plan_of_another_foundation_is_refused() -> None:
    asked = plan()
    with pytest.raises(PolicyError) as caught:
        check_request(asked, request(asked), foundation_hash="cd" * 32)
    assert caught.value.rule is Rule.FOUNDATION


@pytest.mark.parametrize("number", [1, 2])
def test_a_released_round_is_not_trained_again(number: int) -> None:
    with pytest.raises(PolicyError) as caught:
        check_not_replayed(request(plan(), round=number), last_released_round=2)
    assert caught.value.rule is Rule.REPLAY


def test_the_next_round_is_not_a_replay() -> None:
    check_not_replayed(request(plan(), round=3), last_released_round=2)


def test_a_run_that_goes_on_needs_no_new_word() -> None:
    check_run(plan(), request(plan(), run_id="run-1"), known_runs={"run-1"}, allowed_runs=1)


@pytest.mark.parametrize(("known_runs", "allowed_runs"), [((), 1), (("run-1",), 2)])
def test_a_run_that_somebody_allowed_may_begin(known_runs, allowed_runs: int) -> None:
    check_run(plan(), request(plan(), run_id="run-2"), known_runs, allowed_runs)


@pytest.mark.parametrize(("known_runs", "allowed_runs"), [(("1",), 1), (("1", "2"), 2)])
def test_another_run_than_was_allowed_is_refused(known_runs, allowed_runs: int) -> None:
    with pytest.raises(PolicyError, match="plan approve") as caught:
        check_run(plan(), request(plan(), run_id="run-3"), known_runs, allowed_runs)
    assert caught.value.rule is Rule.RUN


class TestSignedPlan:
    @pytest.fixture
    def key(self, tmp_path):
        signing.create_signing_key(tmp_path / "key.pem")
        return signing.load_signing_key(tmp_path / "key.pem")

    def signed(self, key, text: str) -> SignedPlan:
        return SignedPlan(
            json=text,
            signature=signing.sign(key, text.encode()),
            public_key=signing.public_key_of(key),
        )

    def test_a_signed_plan_comes_back_as_it_was_signed(self, key) -> None:
        signed = self.signed(key, plan().to_json())

        assert open_signed_plan(signed, policy_of(signed.public_key)) == plan()

    def test_an_unknown_signer_is_refused(self, key) -> None:
        signed = self.signed(key, plan().to_json())

        with pytest.raises(PolicyError) as caught:
            open_signed_plan(signed, policy_of("somebody else"))
        assert caught.value.rule is Rule.SIGNER

    def test_nobody_is_trusted_by_default(self, key) -> None:
        signed = self.signed(key, plan().to_json())

        with pytest.raises(PolicyError):
            open_signed_plan(signed, policy_of("x", allowed_signers=()))

    def test_one_changed_byte_is_refused(self, key) -> None:
        good = self.signed(key, plan().to_json())
        weaker = good.json.replace('"target_epsilon":8.0', '"target_epsilon":9.0')
        assert weaker != good.json
        bad = SignedPlan(json=weaker, signature=good.signature, public_key=good.public_key)

        with pytest.raises(PolicyError) as caught:
            open_signed_plan(bad, policy_of(good.public_key))
        assert caught.value.rule is Rule.SIGNATURE

    @pytest.mark.parametrize("signature", ["", "not base64!", "AAAA"])
    def test_a_malformed_signature_is_refused(self, key, signature: str) -> None:
        good = self.signed(key, plan().to_json())
        bad = SignedPlan(json=good.json, signature=signature, public_key=good.public_key)

        with pytest.raises(PolicyError):
            open_signed_plan(bad, policy_of(good.public_key))

    @pytest.mark.parametrize("text", ["", "[]", "{", "[" * 5000, '{"study": 1}'])
    def test_signed_nonsense_is_not_a_plan(self, key, text: str) -> None:
        signed = self.signed(key, text)

        with pytest.raises(PlanError):
            open_signed_plan(signed, policy_of(signed.public_key))

    def test_an_oversized_plan_is_refused_before_its_signature_is_looked_at(self) -> None:
        huge = SignedPlan(json=" " * (MAX_PLAN_BYTES + 1), signature="", public_key="")

        with pytest.raises(PlanError, match="bytes"):
            open_signed_plan(huge, policy_of("key"))


def test_a_policy_survives_its_own_toml(tmp_path) -> None:
    policy = policy_of("key", max_epsilon=3.5)
    (tmp_path / "policy.toml").write_text(to_toml(policy))

    assert Policy.load(tmp_path / "policy.toml") == policy


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_epsilom = 3\n", "max_epsilom: unknown key"),
        ("max_epsilon = inf\n", "max_epsilon"),
        ("max_epsilon = [\n", "cannot read"),
        ("lifetime_filters = []\n", "lifetime_filters"),
        ('lifetime_filters = ["pld"]\n', "lifetime_filters"),
        ('lifetime_filters = ["renyi:1"]\n', "lifetime_filters"),
        ('lifetime_filters = ["sums", "sums"]\n', "expected every filter once"),
    ],
)
def test_a_bad_policy_file_says_which_key(tmp_path, line: str, message: str) -> None:
    lines = to_toml(policy_of("key")).splitlines(keepends=True)
    kept = [old for old in lines if old.split(" =")[0] != line.split(" =")[0]]
    (tmp_path / "policy.toml").write_text("".join(kept) + line)

    with pytest.raises(HomeError, match=message):
        Policy.load(tmp_path / "policy.toml")


def test_an_order_that_leaves_no_room_is_refused_with_one_that_does(tmp_path) -> None:
    text = to_toml(policy_of("key", max_epsilon=1.0))
    (tmp_path / "policy.toml").write_text(text.replace('"sums"', '"renyi:2"'))
    with pytest.raises(HomeError, match="leaves no room in epsilon 1; declare renyi:10"):
        Policy.load(tmp_path / "policy.toml")


def test_a_policy_has_no_default_for_any_limit(tmp_path) -> None:
    """But those on sums, which a policy from before them does not allow."""
    lines = to_toml(policy_of("key")).splitlines(keepends=True)
    of_sums = ("allowed_trust", "min_colluding_sites", "min_members", "min_own_noise_multiplier")
    for index, line in enumerate(lines):
        if line.startswith(of_sums):
            continue
        (tmp_path / "policy.toml").write_text("".join(lines[:index] + lines[index + 1 :]))
        with pytest.raises(HomeError, match="required"):
            Policy.load(tmp_path / "policy.toml")
    before = "".join(line for line in lines if not line.startswith(of_sums))
    (tmp_path / "policy.toml").write_text(before)
    assert Policy.load(tmp_path / "policy.toml") == policy_of("key")
    assert Policy.load(tmp_path / "policy.toml").allowed_trust == ("site",)


@pytest.mark.parametrize(
    ("privacy", "named"),
    [
        ({"delta": 1e-300}, "privacy.delta"),
        ({"max_grad_norm": 1e-30}, "privacy.max_grad_norm"),
        ({"max_grad_norm": 1e30}, "privacy.max_grad_norm"),
    ],
)
def test_what_no_accountant_or_float_can_hold_is_refused_with_its_key(
    privacy: dict[str, float], named: str
) -> None:
    values = plan_values("ab" * 32)
    values["privacy"] |= privacy
    with pytest.raises(PlanError, match=named):
        Plan.parse(values)


def test_more_steps_than_can_be_accounted_for_are_refused() -> None:
    values = plan_values("ab" * 32)
    values["stage"][0] |= {"rounds": 10_000, "local_steps": 10_000}
    with pytest.raises(PlanError, match="at most 100000 can"):
        Plan.parse(values)


@pytest.mark.slow
@pytest.mark.parametrize("sample_rate", [1e-6, 1e-9])
def test_a_plan_that_hardly_samples_anybody_still_has_noise(sample_rate: float) -> None:
    """Delta alone would carry it; the mechanism keeps its least noise and is a mechanism."""
    values = plan_values("ab" * 32)
    values["privacy"] |= {"sample_rate": sample_rate}
    mechanism = mechanism_of(Plan.parse(values), declared_patients=50)
    assert 1e-3 <= mechanism.noise_multiplier < 2e-3
