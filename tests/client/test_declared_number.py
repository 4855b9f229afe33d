"""What leaves depends on the number of patients that a site declares, never on the true one."""

from dataclasses import replace

import pytest
import torch

from crafts_client.patients import PatientTiles
from crafts_client.site import Site
from crafts_client.training_task import Randomness
from crafts_core.stages.batch import TileBatch
from support.noise import FixedSampler, NoNoise
from support.sites import make_site_home


@pytest.mark.slow
def test_a_reply_is_the_same_whoever_the_patients_are(
    tmp_path, foundation, coordinator, monkeypatch
) -> None:
    """Six patients, or nine of whom one is damaged: nothing that is said differs but the norm."""
    batch = PatientTiles.batch

    def damaged(self: PatientTiles, patient: int, **options: object) -> TileBatch:
        tiles = batch(self, patient, **options)  # type: ignore[arg-type]
        return replace(tiles, latents_BCHW=tiles.latents_BCHW * (torch.nan if patient == 8 else 1))

    monkeypatch.setattr(PatientTiles, "batch", damaged)
    plan = coordinator.plan(privacy=coordinator.plan().privacy.model_dump() | {"sample_rate": 1.0})
    message = coordinator.message(plan, coordinator.start(plan))
    said = []
    for number in (6, 9):
        home = make_site_home(
            tmp_path / str(number), foundation, coordinator.public_key, num_patients=number
        )
        release = Site(home, foundation).answer(message)
        said.append(release.reply.model_dump(exclude={"update_norm"}))
    assert said[0] == said[1]
    assert said[0]["declared_patients"] == 10


@pytest.mark.slow
def test_the_declared_number_alone_scales_an_update(tmp_path, foundation, coordinator) -> None:
    """Of 6 patients and of 9 the same one is drawn: the same update, half as long if 20 are
    declared. So its length and that of its noise tell nothing of the true number.
    """
    randomness = Randomness(
        noise=NoNoise(),
        sampler=FixedSampler([2]),
        generator=lambda _step, _patient: torch.Generator().manual_seed(0),
    )
    slow = {"learning_rate": 1e-4}  # so that the second step's gradient is the first one's
    plan = coordinator.plan(stage=[each.model_dump() | slow for each in coordinator.plan().stage])
    message = coordinator.message(plan, coordinator.start(plan))
    deltas = []
    for number, declared in ((6, 10), (9, 10), (6, 20)):
        home = make_site_home(
            *(tmp_path / f"{number} {declared}", foundation, coordinator.public_key),
            num_patients=number,
            declared_patients=declared,
        )
        deltas.append(Site(home, foundation, randomness=randomness).answer(message).delta)
    for name, value in deltas[0].items():
        assert value.any()
        assert torch.equal(deltas[1][name], value)
        torch.testing.assert_close(2 * deltas[2][name], value, rtol=1e-3, atol=1e-9)
