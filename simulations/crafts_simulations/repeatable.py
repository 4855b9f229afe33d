"""A simulation that its seed repeats exactly. NOT PRIVATE: whoever has the seed can redo the noise.

What a site draws at random in secret (which patients, which tiles, all noise) comes from a key
stream under a key that seed, site and round decide, and so do its pseudonyms. A round that was
interrupted begins anew and is the same, in whatever process the site trains. Only a simulation can
make such a site: nothing in ``crafts_client`` imports this or has a setting for it, and every
release of one is sealed with the name of ``SeededNoise``, which the site's privacy report refuses
to stand for.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crafts_client.home import SiteHome
from crafts_client.ingest.deidentify import SALT_BYTES
from crafts_client.messages import RoundMessage
from crafts_client.outbox import Release
from crafts_client.site import Site
from crafts_client.training_task import Randomness
from crafts_core.durable import create_secret
from crafts_core.exchange import ReadyReply
from crafts_core.foundation import Foundation
from crafts_privacy.keystream import CpuStream
from crafts_privacy.noise import add_gaussian_integers_
from crafts_privacy.sampling import poisson_sample

NOT_PRIVATE = (
    "NOT PRIVATE: a repeatable simulation draws its noise from a seed, so anybody can draw it "
    "again and take it off; epsilon is what the same run would spend with noise from entropy"
)


class Draws:
    """Everything random at one site in one round, in the order in which it is asked for."""

    def __init__(self, seed: int, site: str) -> None:
        """Before the first round."""
        self._seed, self._site = seed, site
        self.begin(0)

    def begin(self, round_number: int) -> None:
        """A round starts, or starts again."""
        self._round, self._num_drawn = round_number, 0

    def next_key(self) -> bytes:
        """32 bytes that nobody else's draw has."""
        self._num_drawn += 1
        return self.key("draw", str(self._num_drawn))

    def key(self, *parts: str) -> bytes:
        """32 bytes for one purpose within the round."""
        words = (str(self._seed), self._site, str(self._round), *parts)
        return hashlib.sha256("\n".join(words).encode()).digest()


class SeededNoise:
    """Noise that can be drawn again."""

    def __init__(self, draws: Draws) -> None:
        """Noise of one site."""
        self._draws = draws

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        """See ``crafts_privacy.noise.NoiseSource``."""
        stream = CpuStream(self._draws.next_key(), grid_sum_D.device)
        add_gaussian_integers_(grid_sum_D, std, stream)


class SeededSampler:
    """Patients that can be drawn again."""

    def __init__(self, draws: Draws) -> None:
        """Patients of one site."""
        self._draws = draws

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        """See ``crafts_privacy.sampling.PatientSampler``."""
        key = self._draws.next_key()
        return poisson_sample(num_patients, sample_rate, hashlib.shake_256(key).digest)


def seeded_randomness(draws: Draws) -> Randomness:
    """What a site of a repeatable simulation trains with."""

    def generator(step: int, patient: str) -> torch.Generator:
        key = draws.key("patient", str(step), patient)
        return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))

    return Randomness(noise=SeededNoise(draws), sampler=SeededSampler(draws), generator=generator)


class RepeatableSite(Site):
    """A simulated site whose rounds the seed repeats."""

    def __init__(self, home: SiteHome, foundation: Foundation, seed: int) -> None:
        """Open it as any other."""
        self._draws = Draws(seed, home.config.name)
        super().__init__(home, foundation, randomness=seeded_randomness(self._draws))

    def answer(self, message: RoundMessage) -> Release | ReadyReply:
        """See ``Site.answer``. On one thread: sums are rounded otherwise on more."""
        self._draws.begin(message.request.round)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super().answer(message)
        finally:
            torch.set_num_threads(threads)


def write_salt(path: Path, *, seed: int, name: str) -> None:
    """Pseudonyms that the seed repeats, in place of any salt that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    create_secret(path, Draws(seed, name).key("salt")[:SALT_BYTES])
