"""The noise that a plan asks of every site: one number, the same for whoever computes it.

A site calibrates it to train, the coordinator to know below which declared noise an update is none
of this plan's. Both get it from here.
"""

from crafts_core.plan import Plan
from crafts_privacy.accounting import calibrate_noise_multiplier


def plan_noise_multiplier(plan: Plan) -> float:
    """Calibrated once for all steps that the plan may charge, so that a run ends below its target.

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
    )
