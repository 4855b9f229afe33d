"""The noise that a plan asks of every site: one number, the same for whoever computes it.

A site calibrates it to train, the coordinator to know below which declared noise an update is none
of this plan's. Both get it from here.
"""

from crafts_core.plan import Plan
from crafts_core.plan_sections import StageConfig
from crafts_privacy.accounting import PrivacyEvent, calibrate_noise_multiplier


def plan_noise_multiplier(plan: Plan) -> float:
    """Calibrated once for all steps that the plan may charge, so that a run ends below its target.

    What the plan releases before training is charged to the same target and counts beside them.

    Returns:
        Zero for a plan without privacy.

    Raises:
        CalibrationError: no noise keeps the target.
    """
    privacy = plan.privacy
    if privacy.target_epsilon is None or privacy.delta is None:
        return 0.0
    return calibrate_noise_multiplier(
        target_epsilon=privacy.target_epsilon,
        delta=privacy.delta,
        sample_rate=privacy.sample_rate,
        steps=plan.charged_steps,
        spent=release_events(plan),
    )


def stage_noise_multiplier(plan: Plan, stage: StageConfig) -> float:
    """Of the rounds of one stage: a release names its own.

    Raises:
        CalibrationError: no noise keeps the target.
    """
    return plan_noise_multiplier(plan) if not stage.is_release else stage.noise_multiplier or 0.0


def release_events(plan: Plan) -> tuple[PrivacyEvent, ...]:
    """What a plan may charge before training: each release as often as it may be asked for."""
    return plan.release_attempts * tuple(
        PrivacyEvent(
            noise_multiplier=stage.noise_multiplier or 0.0,
            sample_rate=plan.privacy_of(stage).sample_rate,
            steps=stage.local_steps,
        )
        for stage in plan.releases
    )
