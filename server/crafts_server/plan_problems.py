"""What keeps a plan from being signed: what sites would say of it, and what this home lacks."""

from collections.abc import Iterator

from crafts_core.plan import Plan, PlanError
from crafts_privacy.plan_check import noise_problems, plan_problems
from crafts_server.aggregation import rule_of
from crafts_server.home import CoordinatorHome
from crafts_server.rosters import Rosters


def problems_of(plan: Plan, home: CoordinatorHome) -> Iterator[str]:
    """What sites would say, what is not in this home, and who lacks for its sums."""
    yield from plan_problems(plan, home.foundation_path)
    yield from _rule_problems(plan)
    if plan.study.pool is not None and not (home.pools / plan.study.pool).is_dir():
        yield (
            f"study.pool: {plan.study.pool[:16]} is no pool in this home; make it of its table: "
            "crafts-server pool add TABLE"
        )
    if plan.aggregation.secure_aggregation:
        with home.registry() as registry:
            yield from Rosters(registry).problems(plan)


def problems_without_home(plan: Plan) -> Iterator[str]:
    """What can be said where there is no foundation and no site yet."""
    yield from noise_problems(plan)
    yield from _rule_problems(plan)


def refuse_problems(plan: Plan, home: CoordinatorHome) -> None:
    """Sign nothing that every site would fail at.

    Raises:
        PlanError: names the first thing that is wrong.
    """
    problems = list(problems_of(plan, home))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise PlanError(
            f"not signed: {problems[0]}{more}; see crafts-server plan check", problems=problems
        )


def _rule_problems(plan: Plan) -> Iterator[str]:
    try:
        rule_of(plan.aggregation)
    except PlanError as error:
        yield str(error)
