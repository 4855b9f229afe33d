"""What is released before training, of public patients, for an audit: few numbers, of everybody.

As ``training_bench``: the installed trainer with its noise and its samples in sight. Nobody is
sampled, and no network runs; what a release rests on is how far one patient moves the sum, the
noise, and that the declared number divides. Letters: D coordinates.
"""

from collections.abc import Collection

import numpy as np

from crafts_client.public_patients import TILES_EACH, PublicPatients
from crafts_client.speed import Speed
from crafts_client.training_bench import DELTA, NOISE, Bench
from crafts_client.training_task import Randomness, TrainingTask
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.plan_sections import GENERATOR_ONLY, ReleaseName
from crafts_core.releases import release_schema
from crafts_privacy.audit_statistics import Vector
from crafts_privacy.mechanism import Mechanism


class ReleaseBench(Bench):
    """One kind of release. The steps of a round are as many releases, each from zero."""

    def __init__(
        self,
        foundation: Foundation,
        patients: PublicPatients,
        stage: ReleaseName,
        speed: Speed,
        own: Randomness,
    ) -> None:
        super().__init__(foundation, patients, GENERATOR_ONLY, stage, speed, own)
        self._plan = _plan(stage, tuple(dict.fromkeys(foundation.probe.captions)))
        self._nothing = release_schema(self._plan, foundation)
        self._privacy = self._plan.privacy_of(self._plan.stage[0])
        self._factor = stage
        self.ways = {"one by one": speed}
        self.bound = self._privacy.max_grad_norm
        self.deviations = (0.0,)  # from zero, whatever was received
        self.least_share = 0.5  # colours of public tiles are shorter than the bound

    @property
    def num_values(self) -> int:
        """D."""
        return sum(tensor.numel() for tensor in self._nothing.values())

    @property
    def move(self) -> float:
        """Standard deviation of the noise in a released mean."""
        return self.noise * self.bound / self.declared

    @property
    def per_sum(self) -> float:
        """What one grid step of a sum adds to the mean."""
        return self.grid / self.declared

    def train(
        self,
        way: str,
        *,
        steps: int,
        without: Collection[int] = (),
        noise_multiplier: float = NOISE,
        **_: float,
    ) -> Vector:
        """So many releases of the public patients but those ``without``, summed; see ``Bench``."""
        mechanism = Mechanism(
            noise_multiplier=noise_multiplier,
            max_grad_norm=self.bound,
            sample_rate=self._privacy.sample_rate,
            expected_patients=self._privacy.sample_rate * self.declared,
        )
        task = TrainingTask(
            stage=self._plan.stage[0],
            factor=self._factor,
            privacy=self._privacy,
            mechanism=mechanism,
            charged=mechanism.event(1),
            state=self._nothing,
            stage_start=None,
            withdrawn=frozenset(self.patients.names[place] for place in without),
            captions=self._plan.captions_of(self._plan.stage[0]),
        )
        total_D: Vector = np.sum([self.released(way, task, 1) for _ in range(steps)], axis=0)
        return total_D


def _plan(stage: ReleaseName, captions: tuple[str, ...]) -> Plan:
    return Plan.parse(
        {
            "study": {"name": "audit", "foundation": "0" * 64, "seed": 0, "captions": captions},
            "adapter": {"kind": "lora"},
            "stage": [
                {"name": stage, "noise_multiplier": NOISE},
                {"name": "pretraining", "rounds": 1, "local_steps": 1, "learning_rate": 1.0},
            ],
            "privacy": {
                "mechanism": "patient_dp",
                "target_epsilon": 100.0,
                "delta": DELTA,
                "max_grad_norm": 1.0,
                "sample_rate": 0.5,
                "tiles_per_patient": TILES_EACH,
                "draws_per_tile": 1,
            },
            "aggregation": {"rule": "uniform", "min_sites": 1},
        }
    )
