"""The one number that sites train with and the coordinator holds them to."""

from crafts_core.plan import Plan
from crafts_privacy.accounting import PrivacyEvent, epsilon
from crafts_privacy.plan_noise import plan_noise_multiplier
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
