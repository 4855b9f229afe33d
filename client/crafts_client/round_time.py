"""How long a plan's rounds take here, before there was one: timed on public tiles.

Nobody is drawn, nothing is charged or written, and no coordinator is asked.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from crafts_client.answer_times import Pace, PublicStep, flush_subnormals, longest_round_s
from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_client.mechanism import mechanism_of
from crafts_client.patients import PatientTiles
from crafts_client.running import is_running
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, TrainingTask
from crafts_core.foundation import load
from crafts_core.plan import Plan
from crafts_core.plan_sections import Factor, StageConfig
from crafts_core.starting_point import initial_state
from crafts_core.threads import quickest_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTime:
    """Of a stage that trains."""

    stage: StageConfig
    seconds: float
    """From a round's first draw to its sealed answer, at most; of the slowest factor."""


def time_rounds(
    home: SiteHome, plan: Plan, now: Callable[[], float] = time.monotonic
) -> tuple[RoundTime, ...]:
    """Time each stage that trains, on this machine as busy as it is now, on the first device.

    Raises:
        HomeError: the home trains another foundation, or a round may be running, which it would
            slow down.
        CraftsError: the home has no tiles, or the plan does not fit it.
    """
    if is_running(home):
        raise HomeError("crafts-client join runs here, and its round would be late")
    flush_subnormals()
    foundation = load(home.foundation_path, device=home.config.device)
    if foundation.manifest.hash != plan.study.foundation:
        raise HomeError("the plan is for another foundation than this home's")
    trainer = Trainer(
        foundation,
        plan.adapter,
        PatientTiles.of(home, foundation),
        parts=plan.parts,
        randomness=Randomness.from_os(exact_noise=home.config.exact_noise),
        speed=Speed.of(home.config),
    )
    # What the weights are changes no time, and the directions of a real start take a while.
    adapter = plan.adapter.model_copy(update={"first_factor": "random"})
    state = initial_state(foundation, adapter, plan.study.seed, plan.parts)
    seconds: dict[tuple[int, Factor], float] = {}
    for planned in plan.rounds():
        stage, key = planned.stage, (planned.stage_index, planned.factor)
        if stage not in plan.trained or key in seconds:
            continue
        mechanism = mechanism_of(plan, stage, declared_patients=home.config.declared_patients)
        task = TrainingTask.of_plan(
            plan, stage, planned.factor, mechanism, state=state, stage_start=state
        )
        with quickest_threads():
            seconds[key] = _seconds(trainer, task, home, now)
    return tuple(
        RoundTime(stage=stage, seconds=max(of.values()))
        for index, stage in enumerate(plan.stage)
        if (of := {key: taken for key, taken in seconds.items() if key[0] == index})
    )


def _seconds(
    trainer: Trainer, task: TrainingTask, home: SiteHome, now: Callable[[], float]
) -> float:
    taken: list[float] = []

    def timed(step: PublicStep) -> None:
        longest_s = longest_round_s(
            Pace.of(step, now),
            home.config,
            task.stage,
            sample_rate=task.mechanism.sample_rate,
            num_bytes=task.num_bytes,
        )
        taken.append(longest_s)

    trainer.time(task, timed)
    return taken[0]
