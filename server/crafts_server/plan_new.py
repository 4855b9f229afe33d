"""A first plan for the sites of a home: careful defaults, and what follows from them."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from crafts_core.delta_text import delta_text
from crafts_core.foundation_manifest import read_manifest
from crafts_core.plan import Plan
from crafts_core.plan_targets import suggested_adapter
from crafts_privacy.errors import CalibrationError
from crafts_privacy.plan_check import noise_problems
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.errors import HomeError
from crafts_server.home import CoordinatorHome

_STEP_PATIENTS = 16
"""Drawn on average at the smallest site: fewer give a step that is mostly noise."""
_FEW_PLANS = 5
_MOST_RATE = 0.5
_LEAST_RATE = 0.01


def sizes_of(home: Path) -> tuple[int, ...]:
    """The agreed patients of the sites that are enrolled.

    Raises:
        HomeError: nobody is.
    """
    with CoordinatorHome.open(home).registry() as registry:
        agreed = CohortSizes(registry).agreed()
    if not agreed:
        raise HomeError("no site has enrolled yet; give --patients N for each that will")
    return tuple(agreed.values())


def new_plan(
    home: Path,
    *,
    name: str,
    target_epsilon: float,
    rounds: int,
    local_steps: int,
    patients: Sequence[int],
) -> Plan:
    """Pretraining, then alignment, on the home's foundation; constants of the shipped study.

    Delta is a tenth of one in the patients of the largest site, so that it suits them all.

    Raises:
        PlanError: a value is impossible.
    """
    foundation = CoordinatorHome.open(home).foundation_path
    stage = {"rounds": rounds, "local_steps": local_steps}
    alignment = {"learning_rate": 0.05, "lambda_align": 0.05, "lambda_drift": 1.0}
    least = min(len(patients), max(2, (len(patients) + 1) // 2))  # one alone would share nothing
    rate = min(_MOST_RATE, max(_LEAST_RATE, _STEP_PATIENTS / min(patients)))
    return Plan.parse(
        {
            "study": {
                "name": name,
                "foundation": read_manifest(foundation).hash,
                "seed": 0,
            },
            "adapter": suggested_adapter(foundation),
            "stage": [
                {"name": "pretraining", **stage, "learning_rate": 0.15},
                {"name": "alignment", **stage, **alignment},
            ],
            "privacy": {
                "mechanism": "patient_dp",
                "target_epsilon": target_epsilon,
                "delta": min(1e-3, 10.0 ** math.floor(math.log10(1 / (10 * max(patients))))),
                "max_grad_norm": 0.3,
                "sample_rate": float(f"{rate:.2g}"),
                "tiles_per_patient": 4,
                "draws_per_tile": 2,
            },
            "aggregation": {
                "rule": "alignment_regularized",
                "server_momentum": 0.7,
                "ema_decay": 0.7,
                "min_sites": least,
            },
        }
    )


def told(plan: Plan, patients: Sequence[int]) -> list[str]:
    """What follows from a plan for sites of these sizes.

    Raises:
        CalibrationError: no noise keeps its epsilon.
    """
    if problems := list(noise_problems(plan)):
        raise CalibrationError(problems[0])
    privacy, noise = plan.privacy, plan_noise_multiplier(plan)
    smallest = min(patients)
    drawn = privacy.sample_rate * smallest
    return [
        f"Study {plan.study.name}: {plan.total_steps} private steps a site in {plan.num_rounds} "
        f"rounds, epsilon {privacy.target_epsilon:g} at delta {delta_text(privacy.delta or 0)}.",
        f"Sized for {len(patients)} sites of {smallest} to {max(patients)} patients; a round needs "
        f"{plan.aggregation.min_sites} of them.",
        f"Noise by calibration: {noise:.3g} times max_grad_norm in each sum of a step; at the "
        f"smallest site, with {drawn:.3g} patients drawn, {noise / drawn:.2g} times it in a mean.",
        *_how_often(privacy.delta or 0, max(patients)),
    ]


def _how_often(delta: float, largest: int) -> Iterator[str]:
    """That deltas add up, too: by what ``crafts-client init`` writes few such plans fit."""
    number = math.floor(min(1e-3, 1 / (10 * largest)) / delta + 1e-9)
    if number < _FEW_PLANS:
        yield (
            f"Deltas add up: the life of a cohort of {largest} has room for {number} of such "
            "plans, whatever their epsilon, under a policy as crafts-client init writes it. If "
            "more are to come, write a smaller delta (a tenth, say) before the first is trained."
        )
