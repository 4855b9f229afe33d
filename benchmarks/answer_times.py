"""How much longer a round takes because its answer leaves at a time that no patient decides.

A site's trainer on the embedded foundation and a store of random tiles. For each case, over some
rounds: seconds of training (median, largest), how long the answer waits in units of training, the
cost of timing public steps, and how many answers were late. Seconds are the processor's, so that
other programs on the machine do not show; one thread.

    OMP_NUM_THREADS=1 python benchmarks/answer_times.py --rounds 8 --out results/answer-times.json
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crafts_client.answer_times import Pace, PublicStep, longest_round_s
from crafts_client.home import SiteConfig
from crafts_client.mechanism import mechanism_of
from crafts_client.patients import PatientTiles
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, TrainingTask
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.plan import Plan
from crafts_core.starting_point import initial_state
from crafts_core.tiles.latents import LatentCache
from crafts_simulations.small_study import write_random_store


class Case(NamedTuple):
    """A site and a plan."""

    patients: int
    declared: int
    sample_rate: float
    steps: int


CASES = (Case(127, 120, 0.4, 4), Case(290, 300, 0.1, 12))
_TILES_EACH = 4


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    foundation = load(embedded_path())
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "cases": [measure(foundation, case, arguments.rounds) for case in CASES],
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(foundation: Foundation, case: Case, rounds: int) -> dict[str, Any]:
    """Rounds of one case."""
    plan, config = _plan(foundation, case), _config(case)
    with tempfile.TemporaryDirectory() as folder:
        store = write_random_store(
            Path(folder) / "tiles", foundation, num_patients=case.patients, tiles_each=_TILES_EACH
        )
        patients = PatientTiles(
            store, LatentCache.open(store, foundation.manifest.hash), foundation
        )
        trainer = Trainer(
            foundation,
            plan.adapter,
            patients,
            randomness=Randomness.from_os(),
            speed=Speed.of(config),
        )
        times = [_round(trainer, foundation, plan, config) for _ in range(rounds)]
    waited = [wait_s - training_s for _, wait_s, training_s in times]
    training = [training_s for _, _, training_s in times]
    return {
        **case._asdict(),
        "training_s": round(statistics.median(training), 2),
        "longest_training_s": round(max(training), 2),
        "answer_every_s": round(statistics.median(wait_s for _, wait_s, _ in times), 2),
        "waits_in_trainings": round(statistics.mean(waited) / statistics.mean(training), 2),
        "timing_in_trainings": round(
            statistics.median(timing_s for timing_s, _, _ in times) / statistics.median(training), 3
        ),
        "late": sum(each < 0 for each in waited),
    }


def _round(
    trainer: Trainer, foundation: Foundation, plan: Plan, config: SiteConfig
) -> tuple[float, float, float]:
    """Seconds that public steps took, that the answer waits, and that training took."""
    stage, mechanism = plan.stage[0], mechanism_of(plan, declared_patients=config.declared_patients)
    state = initial_state(foundation, plan.adapter, plan.study.seed)
    moments: list[float] = []
    waits: list[float] = []

    def begin(step: PublicStep) -> None:
        moments.append(time.process_time())
        pace = Pace.of(step, time.process_time)
        wait_s = longest_round_s(
            pace, config, stage, sample_rate=mechanism.sample_rate, num_bytes=0
        )
        waits.append(wait_s)
        moments.append(time.process_time())

    task = TrainingTask(
        stage=stage,
        factor="second",
        privacy=plan.privacy,
        mechanism=mechanism,
        charged=mechanism.event(stage.local_steps),
        state=state,
        stage_start=None,
    )
    trainer.train(task, begin)
    asked, began = moments
    return began - asked, waits[0], time.process_time() - began


def _config(case: Case) -> SiteConfig:
    return SiteConfig(
        name="site",
        cohort="main",
        declared_patients=case.declared,
        device="cpu",
        foundation="embedded",
        tile_store="tiles",
        microbatch_tiles=64,
    )


def _plan(foundation: Foundation, case: Case) -> Plan:
    stage = {"name": "pretraining", "rounds": 10, "local_steps": case.steps, "learning_rate": 0.01}
    privacy = {
        "mechanism": "patient_dp",
        "target_epsilon": 8.0,
        "delta": 1e-3,
        "max_grad_norm": 1.0,
        "sample_rate": case.sample_rate,
        "tiles_per_patient": 2,
        "draws_per_tile": 2,
    }
    return Plan.parse(
        {
            "study": {"name": "clock", "foundation": foundation.manifest.hash, "seed": 3},
            "adapter": {"kind": "lora", "rank": 8, "first_factor": "random"},
            "stage": [stage],
            "privacy": privacy,
            "aggregation": {"rule": "uniform", "min_sites": 1},
        }
    )


if __name__ == "__main__":
    main()
