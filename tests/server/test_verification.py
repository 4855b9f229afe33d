"""Every lie that a reply can tell is refused by name; the honest one passes."""

import math
from dataclasses import replace

import pytest
import torch

from crafts_core.exchange import RoundReply, RoundRequest, global_norm, schema_hash
from crafts_core.plan_sections import PrivacyConfig, StageConfig
from crafts_core.state import State
from crafts_privacy.declared_noise import noise_variance
from crafts_server.errors import UpdateRefusedError
from crafts_server.verification import Expectation, verify_update

HASH, OTHER = "0" * 64, "1" * 64
STAGE = StageConfig(name="pretraining", rounds=1, local_steps=4, learning_rate=0.1)
PRIVACY = PrivacyConfig(
    mechanism="patient_dp",
    target_epsilon=8.0,
    delta=1e-4,
    max_grad_norm=0.5,
    sample_rate=0.5,
    tiles_per_patient=4,
    draws_per_tile=1,
)
REQUEST = RoundRequest(
    run_id="run",
    plan_hash=HASH,
    round=3,
    stage_index=0,
    factor="second",
    checkpoint_hash=HASH,
    stage_start_hash=HASH,
)
EXPECTED = Expectation(
    request=REQUEST,
    stage=STAGE,
    privacy=PRIVACY,
    schema={"layer.second": torch.zeros(100, 20)},
    noise_multiplier=1.5,
    patients={"aachen": 50, "bern": 20},
)


def delta() -> State:
    """Noise as declared: n = 25 patients expected, so 0.1 * 2 * 0.5 / 25 * sqrt(4) each."""
    generator = torch.Generator().manual_seed(1)
    return {"layer.second": 0.008 * torch.randn(100, 20, generator=generator)}


def reply(tensors: State, **changes: object) -> RoundReply:
    values = {
        "site": "aachen",
        "run_id": "run",
        "plan_hash": HASH,
        "round": 3,
        "checkpoint_hash": HASH,
        "schema_hash": schema_hash(EXPECTED.schema),
        "noise_multiplier": 2.0,
        "max_grad_norm": 0.5,
        "steps": 4,
        "sample_rate": 0.5,
        "declared_patients": 50,
        "update_norm": global_norm(tensors) if tensors else 0.0,
    }
    return RoundReply.model_validate(values | changes)


def test_an_honest_update_passes_and_yields_its_declared_variance() -> None:
    variance = verify_update(reply(delta()), delta(), EXPECTED)
    assert variance == pytest.approx(0.008**2)
    assert variance == noise_variance(reply(delta()), STAGE)


@pytest.mark.parametrize("noise_multiplier", [1.4999, 1.5, 6.0])
def test_the_plans_noise_or_more_passes(noise_multiplier: float) -> None:
    """The accountant's fourth digit is nobody's lie; a stricter policy adds up to four times."""
    drawn = {name: noise_multiplier / 2.0 * tensor for name, tensor in delta().items()}
    verify_update(reply(drawn, noise_multiplier=noise_multiplier), drawn, EXPECTED)


def test_half_precision_on_the_wire_passes() -> None:
    rounded = {name: tensor.half().float() for name, tensor in delta().items()}
    verify_update(reply(delta()), rounded, EXPECTED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run_id", "another"),
        ("plan_hash", OTHER),
        ("round", 2),
        ("checkpoint_hash", OTHER),
        ("max_grad_norm", 0.6),
        ("sample_rate", 0.4),
        ("steps", 5),
        ("steps", 3),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", 1e-9),
        ("noise_multiplier", 1.48),
        ("noise_multiplier", 6.01),
        ("declared_patients", 4000),
        ("declared_patients", 49),
        ("update_norm", 0.5),
    ],
)
def test_a_wrong_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UpdateRefusedError, match=field):
        verify_update(reply(delta(), **{field: value}), delta(), EXPECTED)


def test_who_is_not_on_the_roster_is_told_how_to_get_there() -> None:
    with pytest.raises(UpdateRefusedError, match="declared_patients: nothing was agreed"):
        verify_update(reply(delta(), site="coimbra"), delta(), EXPECTED)


def test_another_schema_hash_is_refused() -> None:
    with pytest.raises(UpdateRefusedError, match="schema hash"):
        verify_update(reply(delta(), schema_hash=OTHER), delta(), EXPECTED)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_refused(value: float) -> None:
    poisoned = delta()
    poisoned["layer.second"][7, 7] = value
    with pytest.raises(UpdateRefusedError, match="NaN or infinity"):
        verify_update(reply(delta()), poisoned, EXPECTED)


def test_another_shape_and_an_unknown_or_missing_tensor_are_refused() -> None:
    with pytest.raises(UpdateRefusedError, match="expected shape"):
        verify_update(reply(delta()), {"layer.second": torch.zeros(20, 100)}, EXPECTED)
    with pytest.raises(UpdateRefusedError, match="not part of the adapter"):
        verify_update(reply(delta()), {**delta(), "other": torch.zeros(1)}, EXPECTED)
    with pytest.raises(UpdateRefusedError, match="missing"):
        verify_update(reply(delta()), {}, EXPECTED)


def test_noise_that_was_declared_but_not_added_is_refused() -> None:
    quiet = {name: tensor / 10 for name, tensor in delta().items()}
    expected = replace(EXPECTED, noise_multiplier=50.0)
    loud = reply(quiet, noise_multiplier=50.0)
    with pytest.raises(UpdateRefusedError, match="the least that the declared noise gives"):
        verify_update(loud, quiet, expected)


def test_an_update_longer_than_clipping_and_noise_allow_is_refused() -> None:
    poison = {name: 100 * tensor for name, tensor in delta().items()}
    with pytest.raises(UpdateRefusedError, match="the most that the declared clipping"):
        verify_update(reply(poison), poison, EXPECTED)


def test_without_privacy_no_noise_is_expected_and_no_norm_is_implausible() -> None:
    privacy = PRIVACY.model_copy(
        update={"mechanism": "none", "target_epsilon": None, "delta": None}
    )
    far = {name: 100 * tensor for name, tensor in delta().items()}
    expected = replace(EXPECTED, privacy=privacy, noise_multiplier=0.0)
    assert verify_update(reply(far, noise_multiplier=0.0), far, expected) == 0.0
    with pytest.raises(UpdateRefusedError, match="noise_multiplier"):
        verify_update(reply(far, noise_multiplier=0.1), far, expected)
