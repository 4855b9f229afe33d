"""From a plan to the mechanism that one site runs, the same in every round.

The noise is calibrated once for all the steps of the plan, so that a site that takes part in every
round of one run ends just below the plan's target epsilon. That it never ends above, whatever a
coordinator asks for and in however many runs, is the ledger's doing: it refuses a round with which
the plan's charges would pass the target (``Ledger.reserve``). Lost rounds are charges too, so a
round that cost twice leaves the plan's last one refused. What the cohort spent in other studies
does not weaken or strengthen this noise: the ledger holds it against the site's lifetime limit.
"""

import math
from collections import Counter
from collections.abc import Sequence

from crafts_core.plan import Plan
from crafts_core.plan_sections import StageConfig
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.lifetime import Lifetime, PlanLimit
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.plan_noise import (
    plan_noise_multiplier,
    release_events,
    stage_noise_multiplier,
)


def mechanism_of(
    plan: Plan, stage: StageConfig | None = None, *, declared_patients: int
) -> Mechanism:
    """Sampling, clipping, noise and divisor for every step of ``plan`` at one site.

    Of a ``stage``, which may be a release; without one, of those that train.

    Without privacy the same steps run with the same clip and no noise, so that a baseline differs
    in nothing else.

    Raises:
        CalibrationError: no noise keeps the target.
    """
    privacy = plan.privacy if stage is None else plan.privacy_of(stage)
    expected_patients = privacy.sample_rate * declared_patients
    stability = privacy.clipping_stability if privacy.clipping == "automatic" else None
    if privacy.target_epsilon is None or privacy.delta is None:
        return Mechanism.without_privacy(
            sample_rate=privacy.sample_rate,
            expected_patients=expected_patients,
            max_grad_norm=privacy.max_grad_norm,
            stability=stability,
        )
    return Mechanism(
        noise_multiplier=(
            plan_noise_multiplier(plan) if stage is None else stage_noise_multiplier(plan, stage)
        ),
        max_grad_norm=privacy.max_grad_norm,
        sample_rate=privacy.sample_rate,
        expected_patients=expected_patients,
        stability=stability,
    )


def mechanisms_of(plan: Plan, *, declared_patients: int) -> list[Mechanism]:
    """Of all that a plan asks for: its training, then each of its releases.

    Raises:
        CalibrationError: no noise keeps the target.
    """
    return [
        mechanism_of(plan, stage, declared_patients=declared_patients)
        for stage in (None, *plan.releases)
    ]


def releases_to_come(plan: Plan, charged: Sequence[PrivacyEvent]) -> list[PrivacyEvent]:
    """What a plan may still release before training: the ledger keeps room for it."""
    return list((Counter(release_events(plan)) - Counter(charged)).elements())


def limit_of(plan: Plan, lifetime: Lifetime) -> PlanLimit:
    """What the plan may spend of a cohort. Steps without noise have no finite epsilon."""
    privacy = plan.privacy
    if privacy.target_epsilon is None or privacy.delta is None:
        return PlanLimit(max_epsilon=math.inf, delta=lifetime.delta)
    return PlanLimit(max_epsilon=privacy.target_epsilon, delta=privacy.delta)
