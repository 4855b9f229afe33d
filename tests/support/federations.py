"""A federation of real sites and the real coordinator over a grid in this process."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.home import SiteHome
from crafts_client.site import Site
from crafts_client.training_task import Randomness
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_privacy.noise import NoiseSource
from crafts_server.checkpoints import Checkpoint
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_simulations.agreement import agree_on_patients, approve_roster
from crafts_simulations.local_grid import LocalGrid, LocalNode, TurnsHere
from support.noise import FixedSampler, draws_of
from support.sites import make_site_home

SEED = 40


class Noted:
    """Rounded Gaussian noise of its own seed, kept step by step."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.drawn: list[Tensor] = []

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        noise_D = torch.randn(grid_sum_D.shape, dtype=torch.float64, generator=self._generator)
        self.drawn.append((noise_D * std).round())
        grid_sum_D += self.drawn[-1]


class Federation:
    """Everybody's patients are all drawn, with draws that their names decide; noise is noted."""

    def __init__(
        self,
        folder: Path,
        foundation: Foundation,
        num_sites: int,
        *,
        also_signs: str | None = None,
        **home: object,
    ) -> None:
        self.foundation = foundation
        self.coordinator = CoordinatorHome.create(
            folder / "coordinator", HomeConfig(foundation=str(foundation.path))
        )
        self.homes: list[SiteHome] = [
            make_site_home(
                *(folder / f"site-{number:02d}", foundation, self.coordinator.public_key),
                name=f"site-{number:02d}",
                num_patients=2 + number % 3,
                declared_patients=5 + number % 4,
                seed=number,
                allowed_signers=(
                    self.coordinator.public_key,
                    *([also_signs] if also_signs else []),
                ),
                allowed_stages=("anchors", "colour", "pretraining", "alignment", "control"),
                **home,  # type: ignore[arg-type]
            )
            for number in range(1, num_sites + 1)
        ]
        self.noise = {each.config.name: Noted(place) for place, each in enumerate(self.homes)}

    def run(self, plan: Plan) -> list[Checkpoint]:
        """The whole study, as its programs would; every checkpoint."""
        paths = [each.path for each in self.homes]
        agree_on_patients(self.coordinator, paths)
        sites = {
            each.config.name: Site(
                each, self.foundation, randomness=randomness(self.noise[each.config.name])
            )
            for each in self.homes
        }
        app = make_client_app(lambda path: sites[path.name])
        nodes = {path.name: LocalNode(app=app, node_config={HOME_KEY: str(path)}) for path in paths}
        now = Patience(poll_s=0.0, join_wait_s=0.0)
        ours = Coordinator(self.coordinator, plan, self.foundation, patience=now)
        approve_roster(self.coordinator, plan, paths)
        last = ours.run(LocalGrid(TurnsHere(nodes)))
        return self.coordinator.checkpoints(last.manifest.run_id).chain()


def randomness(noise: NoiseSource) -> Randomness:
    """All patients, with draws that follow from who they are."""
    return Randomness(noise=noise, sampler=FixedSampler(), generator=partial(draws_of, SEED))
