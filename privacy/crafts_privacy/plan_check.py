"""What is wrong with a plan beyond its own words: asked by coordinator and sites alike.

A plan that parses may still fit no foundation, or have a noise that nobody can compute. Whoever
signs it and whoever approves it asks the same function, so that neither is surprised by the other.
"""

from collections.abc import Iterator
from pathlib import Path

from crafts_core.foundation_manifest import read_manifest
from crafts_core.plan import Plan
from crafts_core.plan_targets import target_problems
from crafts_privacy.errors import CalibrationError
from crafts_privacy.plan_noise import plan_noise_multiplier


def plan_problems(plan: Plan, foundation: Path) -> Iterator[str]:
    """Everything that would make every site fail at this plan; none if it can be run.

    Args:
        plan: Of any source.
        foundation: The folder of the foundation here; targets are compared where it is the plan's.

    Raises:
        FoundationError: the foundation here cannot be read.
    """
    here = read_manifest(foundation)
    if here.hash == plan.study.foundation:
        yield from target_problems(plan, foundation)
    else:
        yield (
            f"study.foundation: {plan.study.foundation[:16]} is not the foundation here, which is "
            f"{here.hash[:16]} ({here.name})"
        )
    yield from noise_problems(plan)


def noise_problems(plan: Plan) -> Iterator[str]:
    """Why nobody can compute the noise that the plan asks for."""
    try:
        plan_noise_multiplier(plan)
    except CalibrationError as error:
        yield f"privacy: {error}"
    except (ArithmeticError, ValueError, MemoryError) as error:
        # dp-accounting gives up on extremes, such as a sample_rate of 1e-9, each in its own way.
        yield (
            f"privacy: its noise cannot be computed ({type(error).__name__}); take another "
            "sample_rate, delta or target_epsilon"
        )
