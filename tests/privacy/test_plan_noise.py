"""The one number that sites train with and the coordinator holds them to."""

import pytest

from crafts_core.plan import Plan
from crafts_privacy.accounting import PrivacyEvent, epsilon
from crafts_privacy.plan_noise import (
    plan_noise_multiplier,
    release_events,
    stage_noise_multiplier,
)
from support.sites import plan_values, without_privacy

HASH = "0" * 64


def test_it_is_the_least_that_keeps_the_target_over_all_steps_of_the_plan() -> None:
    plan = Plan.parse(plan_values(HASH))
    multiplier = plan_noise_multiplier(plan)
    assert plan.total_steps == 2 * 2 * 2

    def spent(noise_multiplier: float) -> float:
        event = PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=0.5, steps=8)
        return epsilon([event], 1e-3)

    assert spent(multiplier) <= 8.0 < spent(0.995 * multiplier)


def test_a_plan_without_privacy_asks_for_none() -> None:
    assert plan_noise_multiplier(Plan.parse(without_privacy(plan_values(HASH)))) == 0.0


@pytest.mark.slow
def test_releases_are_paid_from_the_same_target() -> None:
    values = plan_values(HASH)
    told = [
        {"name": "anchors", "noise_multiplier": 1.5},
        {"name": "colour", "noise_multiplier": 3.0},
    ]
    study = {**values["study"], "captions": ["one", "two"]}  # type: ignore[dict-item]
    plan = Plan.parse(values | {"study": study, "stage": [*told, *values["stage"]]})  # type: ignore[misc]
    multiplier = plan_noise_multiplier(plan)
    assert multiplier > 1.02 * plan_noise_multiplier(Plan.parse(values))
    releases = [PrivacyEvent(noise_multiplier=n, sample_rate=1.0, steps=1) for n in (1.5, 3.0)]
    assert list(release_events(plan)) == releases

    def spent(noise_multiplier: float) -> float:
        training = PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=0.5, steps=8)
        return epsilon([*releases, training], 1e-3)

    assert spent(multiplier) <= 8.0 < spent(0.99 * multiplier)
    noise = [stage_noise_multiplier(plan, stage) for stage in plan.stage]
    assert noise == [1.5, 3.0, multiplier, multiplier]
