"""The site's further devices: a process for each, that shares every step's patients.

A worker is this same package on this same home. It gets the round's task over a pipe from the
process that started it, trains in step with it (``crafts_privacy.ranks``), and gives nothing back:
every rank ends with the same weights, and only the first one's leave.
"""

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch.multiprocessing as multiprocessing

from crafts_client import unusable
from crafts_client.answer_times import Pace, PublicStep, flush_subnormals
from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_client.patients import PatientTiles
from crafts_client.register import PatientRegister
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, TrainingTask
from crafts_core.foundation import load
from crafts_core.plan_sections import AdapterConfig, Part
from crafts_privacy.errors import RankError
from crafts_privacy.ranks import ProcessRanks

_STEP_TIMEOUT_S = 1800.0


class DeviceWorkers:
    """Workers that wait for tasks until ``close``."""

    def __init__(self, home: Path, devices: Sequence[str]) -> None:
        """Start a worker for each device.

        Raises:
            RankError: one did not come up.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="crafts-ranks-")
        meeting, count = Path(self._folder.name) / "meeting", len(devices) + 1
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for rank, device in enumerate(devices, start=1):
            ours, theirs = context.Pipe()
            # Daemons end with this process, whatever ends it.
            context.Process(
                target=_work, args=(home, device, meeting, rank, count, theirs), daemon=True
            ).start()
            theirs.close()
            self._pipes.append(ours)
        self.ranks = ProcessRanks(meeting, 0, count, timeout_s=_STEP_TIMEOUT_S)

    def start(
        self, config: AdapterConfig, parts: tuple[Part, ...], task: TrainingTask, *, is_timed: bool
    ) -> None:
        """Let every worker train this round, and time public steps before it if the first does.

        Raises:
            RankError: a worker is gone.
        """
        try:
            for pipe in self._pipes:
                pipe.send((config, parts, task, is_timed))
        except OSError as error:
            raise RankError("a device of this site is gone; restart crafts-client") from error

    def close(self) -> None:
        """Send everybody home."""
        for pipe in self._pipes:
            pipe.close()
        self.ranks.close()
        self._folder.cleanup()


def check_devices(home: SiteHome) -> None:
    """Raises HomeError where a device is named twice, as two workers on one GPU would be."""
    devices = [home.config.device, *home.config.more_devices]
    twice = {device for device in devices if devices.count(device) > 1 and device != "cpu"}
    if twice:
        raise HomeError(f"site.toml: more_devices names {min(twice)} twice; name each GPU once")


def _unknown(home: SiteHome, pseudonyms: Iterable[str]) -> frozenset[str]:
    """Whom the site has not enrolled in its cohort.

    An ingest may have gone on since the first device opened the store: nobody trains these.
    """
    known = PatientRegister(home.register_path).cohorts()
    return frozenset(name for name in pseudonyms if known.get(name) != home.config.cohort)


def _take_timed_steps(step: PublicStep) -> None:
    """As many as the first device takes, which reads the clock."""
    Pace.of(step, time.monotonic)


def _work(path: Path, device: str, meeting: Path, rank: int, count: int, pipe: Connection) -> None:
    flush_subnormals()
    home = SiteHome.open(path)
    foundation = load(home.foundation_path, device=device)
    patients = PatientTiles.of(home, foundation)
    unknown = _unknown(home, patients.pseudonyms)
    ranks = ProcessRanks(meeting, rank, count, timeout_s=_STEP_TIMEOUT_S)
    made: tuple[tuple[AdapterConfig, tuple[Part, ...]], Trainer] | None = None
    while True:
        try:
            config, parts, task, is_timed = pipe.recv()
        except EOFError:
            return
        if made is None or made[0] != (config, parts):
            trainer = Trainer(
                foundation,
                config,
                patients,
                parts=parts,
                randomness=Randomness.from_os(exact_noise=home.config.exact_noise),
                speed=Speed.of(home.config),
                ranks=ranks,
            )
            made = ((config, parts), trainer)
        task = replace(task, withdrawn=task.withdrawn | unknown)
        before_draws = _take_timed_steps if is_timed else None
        if task.sum_grid_bits is None:
            made[1].train(task, before_draws)
        else:
            made[1].hold(task, before_draws).forget()  # the sum is the first device's to keep
        counted = unusable.Unusable(
            gradients=made[1].num_unusable_patients, tiles=patients.take_num_unusable()
        )
        unusable.note(home.unusable_path, counted, rank=rank)
