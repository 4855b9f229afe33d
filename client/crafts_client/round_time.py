"""How long a plan's rounds take here, before there was one: timed on public tiles.

Nobody is drawn, nothing is charged or written, and no coordinator is asked.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from crafts_client.answer_times import Pace, PublicStep, flush_subnormals, longest_round_s
from crafts_client.home import SiteHome
from crafts_client.mechanism import mechanism_of
from crafts_client.patients import PatientTiles
from crafts_client.speed import Speed
from crafts_client.trainer import Randomness, Trainer, TrainingTask
from crafts_core.foundation import load
from crafts_core.plan import Plan
from crafts_core.starting_point import initial_state
from crafts_core.threads import quickest_threads
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache


def seconds_of_rounds(
    home: SiteHome, plan: Plan, now: Callable[[], float] = time.monotonic
) -> dict[str, float]:
    """From a round's first draw to when its answer leaves, for each stage that trains.

    Timed on this machine as busy as it is now, on the first of the site's devices.

    Raises:
        CraftsError: the home has no tiles, or the plan does not fit its foundation or size.
    """
    config = home.config
    if config.answer_every_s != "auto" and config.answer_every_s > 0:
        return {stage.name: config.answer_every_s for stage in plan.trained}
    flush_subnormals()
    foundation = load(home.foundation_path, device=config.device)
    store = TileStore.open(home.tile_store_path, check_shards=False)
    # What the weights are changes no time, and the directions of a real start take a while.
    adapter = plan.adapter.model_copy(update={"first_factor": "random"})
    state = initial_state(foundation, adapter, plan.study.seed, plan.parts)
    trainer = Trainer(
        foundation,
        plan.adapter,
        PatientTiles(store, LatentCache.open(store, foundation.manifest.hash), foundation),
        parts=plan.parts,
        randomness=Randomness.from_os(exact_noise=config.exact_noise),
        speed=Speed.of(config),
    )
    seconds: dict[str, float] = {}
    for planned in plan.rounds():
        stage = planned.stage
        if stage not in plan.trained or stage.name in seconds:
            continue
        mechanism = mechanism_of(plan, stage, declared_patients=config.declared_patients)
        task = TrainingTask(
            stage=stage,
            factor=planned.factor,
            privacy=plan.privacy_of(stage),
            mechanism=mechanism,
            charged=mechanism.event(stage.local_steps),
            state=state,
            stage_start=state,
            captions=plan.captions_of(stage),
        )

        def timed(step: PublicStep, task: TrainingTask = task) -> None:
            seconds[task.stage.name] = longest_round_s(
                Pace.of(step, now),
                config,
                task.stage,
                sample_rate=task.mechanism.sample_rate,
                num_bytes=task.num_bytes,
            )

        with quickest_threads():
            trainer.time(replace(task, sum_grid_bits=plan.privacy.sum_grid_bits), timed)
    return seconds
