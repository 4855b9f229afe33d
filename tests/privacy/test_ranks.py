"""Several processes take one step together, as several devices of a site do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from crafts_privacy.errors import RankError
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import GridNoise
from crafts_privacy.optimizers import Momentum
from crafts_privacy.patient_sgd import PatientSGD
from crafts_privacy.ranks import Alone, ProcessRanks, Ranks
from support.noise import FixedSampler, SeededNoise

NUM_PATIENTS, STEPS = 5, 3
CASES = {
    "everybody": None,
    "an empty sample here and there": [0],
    "nobody": [],
}


def train(ranks: Ranks, own: list[int] | None, *, failing: int | None = None) -> list[float]:
    """A few steps on linear losses; ``failing`` is a patient whose loss raises.

    Patient p is dealt with by rank p modulo their number; ``own`` are places among a rank's.
    """
    mine = range(ranks.rank, NUM_PATIENTS, ranks.count)
    weights = nn.Parameter(torch.zeros(4))
    # Rank 0's noise is the same as alone; the others must not add any.
    noise = SeededNoise(3) if ranks.rank == 0 else GridNoise()
    mechanism = Mechanism(
        noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=1.0, expected_patients=2.0
    )
    sgd = PatientSGD(
        {"weights": weights},
        mechanism,
        learning_rate=0.1,
        optimizer=Momentum(0.5),
        noise=noise,
        sampler=FixedSampler(own),
        ranks=ranks,
    )

    def loss(place: int) -> torch.Tensor:
        patient = mine[place]
        if patient == failing:
            raise ValueError("this patient's tiles cannot be read")
        direction = torch.randn(4, generator=torch.Generator().manual_seed(patient))
        return (weights * direction).sum() * (patient + 0.1)

    for _ in range(STEPS):
        sgd.step(len(mine), loss)
    return [float(value) for value in weights.detach()]


def run_rank(folder: Path, rank: int, count: int) -> None:
    ranks = ProcessRanks(folder / "meeting", rank, count, timeout_s=60)
    found: dict[str, object] = {}
    for name, drawn in CASES.items():
        # The patients of rank r are r, r + count, ...: the drawn ones, by their place there.
        own = None if drawn is None else [p // count for p in drawn if p % count == rank]
        found[name] = train(ranks, own)
    found["least and most"] = [ranks.least(3 + rank), -ranks.least(-3 - rank)]
    try:
        train(ranks, None, failing=1)
    except (RankError, ValueError) as error:
        found["failure"] = type(error).__name__
    ranks.close()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_ranks_are_one_device(tmp_path: Path) -> None:
    """The same weights on each, to the last bit, as one process gives; none waits for ever."""
    roots = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": roots, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    for name, drawn in CASES.items():
        assert first[name] == second[name] == train(Alone(), drawn)
    assert first["least and most"] == second["least and most"] == [3, 4]
    # Patient 1 belongs to rank 1: it says what is wrong, and rank 0 stops with it.
    assert (first["failure"], second["failure"]) == ("RankError", "ValueError")


@pytest.mark.slow
def test_a_rank_that_never_comes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="not all devices"):
        ProcessRanks(tmp_path / "meeting", 0, 2, timeout_s=1)
    again = ProcessRanks(tmp_path / "again", 0, 1, timeout_s=5)
    # New processes count from 0: under another name they would not meet.
    assert distributed.group.WORLD.group_name == "0"
    again.close()


@pytest.mark.slow
def test_devices_meet_on_loopback_whatever_the_machine_is_called(tmp_path: Path, monkeypatch):
    """Sums without noise go between them, and Gloo listens where the machine's name leads."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "eth-of-the-hospital")
    ranks = ProcessRanks(tmp_path / "meeting", 0, 1, timeout_s=5)
    ranks.close()
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), int(sys.argv[2]), count=2)
