"""A site killed at any instruction never leaves its ledger below what was released.

Run as a script, this file is the driver: it forks sites that train and release rounds, kills each
with SIGKILL at a named point or at a random time, restarts, and compares the ledger with an outside
witness of what left. Every round is asked for with two adapters, by turns first with one and first
with the other, so that what was begun for one before a kill is asked for with the other after it.
The same goes for sums over sites, where every round is asked for in attempts.
The driver is its own process because forking pytest, with the threads of many libraries in it,
would not be safe.
"""

import argparse
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from sqlalchemy import event
from sqlalchemy.orm import Session

from crafts_client import sums
from crafts_client.errors import NotReadyError
from crafts_client.home import SiteHome
from crafts_client.mechanism import mechanism_of
from crafts_client.outbox import Outbox, Release
from crafts_client.policy import PolicyError
from crafts_client.site import Site
from crafts_client.sums import SiteSums
from crafts_core.exchange import Announcement, ReadyReply, RoundRequest
from crafts_core.foundation import Foundation, load
from crafts_core.plan import Plan
from crafts_core.state import State
from crafts_privacy import ledger_store
from crafts_privacy.held_sum import HeldSum
from crafts_privacy.ledger import EntryKind, Ledger, LedgerError, Reservation
from crafts_privacy.patient_sgd import PatientSum
from crafts_privacy.place import Place
from crafts_privacy.secure_aggregation.masking import MaskKey
from crafts_privacy.secure_aggregation.members import announce
from crafts_privacy.secure_aggregation.updates import HeldUpdate
from crafts_simulations.small_study import DECLARED_PATIENTS
from support import power_cut
from support.foundations import write_tiny_foundation
from support.sites import Coordinator, make_site_home, plan_values
from support.sum_study import SumStudy, distributed_values, values_of_updates

STEPS = ("reservation", "step", "seal", "database commit", "witness write", "sync", "rename")
OF_SUMS = ("word", "members", "masks", "ledger commit")
MOMENTS = ("before", "after")
POINTS = [f"{moment} {what}" for what in (*STEPS, "release") for moment in MOMENTS]
SUM_POINTS = [f"{moment} {what}" for what in (*STEPS, *OF_SUMS, "release") for moment in MOMENTS]


class Study:
    """One home, one coordinator, one plan of more rounds than any test needs, two adapters."""

    points = POINTS

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.foundation = load(write_tiny_foundation(folder / "foundation"))
        self.coordinator = Coordinator(folder, self.foundation)
        self.plan = study_plan(self.foundation)
        start = self.coordinator.start(self.plan)
        self.adapters = (start, {name: value + 0.001 for name, value in start.items()})

    def make_home(self) -> None:
        """Everything that a site needs to take part."""
        self.new_home()

    def new_home(self, **policy: object) -> SiteHome:
        signer = self.coordinator.public_key
        home = self.folder / "site"
        return make_site_home(home, self.foundation, signer, max_rounds=2000, **policy)

    def answers(self, site: Site, number: int, *, first: int) -> Iterator[tuple[str, Release]]:
        """Of a coordinator who asks with another adapter too: at most one is right."""
        for adapter in (self.adapters[first], self.adapters[1 - first]):
            # The round was answered, or what a kill left sealed for one is paid for by the other.
            with suppress(PolicyError, LedgerError):
                release = site.answer(self.request(number, adapter))
                assert isinstance(release, Release)
                yield str(number), release

    def request(self, number: int, adapter: State) -> Any:
        request = self.coordinator.request(self.plan, adapter, number=number)
        return self.coordinator.message(self.plan, adapter, request=request)


class StudyOfSums(Study):
    """The same as steps over three sites; the other two have keys and no patients."""

    points = SUM_POINTS
    policy: ClassVar[dict[str, object]] = {
        "allowed_trust": ("distributed",),
        "max_epsilon_alone": 1e3,
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.plan = Plan.parse(self.values())

    def values(self) -> dict[str, object]:
        return distributed_values(self.foundation.manifest.hash, rounds=2000)

    def make_home(self) -> None:
        home = self.new_home(**self.policy)
        SumStudy(self.coordinator, self.foundation, home, self.plan)  # approves the roster

    def answers(self, site: Site, number: int, *, first: int) -> Iterator[tuple[str, Release]]:
        """Of a coordinator who begins an attempt at every start, and asks both ways for it.

        Before that it announces what it announced last once more, and other members too.
        """
        home = SiteHome.open(self.folder / "site")
        study = SumStudy(self.coordinator, self.foundation, home, self.plan)
        yield from self.answers_again(site, study, first=first)
        attempt = self.next_attempt()
        for adapter in (self.adapters[first], self.adapters[1 - first]):
            request = study.request(number, attempt, adapter)
            with suppress(PolicyError, LedgerError):
                ready = site.answer(study.ask(request, adapter))
                assert isinstance(ready, ReadyReply)
                announcement = study.announcement(request, ready)
                self.announced.write_text(f"{request.model_dump_json()}\n{announcement.to_json()}")
                told = study.tell(request, announcement)
                yield f"{number}.{attempt}", site.add_to_sum(told)

    def answers_again(
        self, site: Site, study: SumStudy, *, first: int
    ) -> Iterator[tuple[str, Release]]:
        """The sealed bytes for the same members, if any; for others nothing."""
        if not self.announced.exists():
            return
        texts = self.announced.read_text().splitlines()
        request = RoundRequest.model_validate_json(texts[0])
        same = Announcement.parse(texts[1])
        peers = study.peers(request.hash)
        fresh = peers["south"].word(request.hash, MaskKey().public_key)
        (own,) = (each for each in same.members if each.site not in peers)
        other = announce([own, peers["east"].ready, fresh])
        for announcement in (same, other) if first else (other, same):
            # What a kill left unsealed is gone; a key and a seal are for one announcement.
            with suppress(NotReadyError, PolicyError, LedgerError):
                which = f"{request.round}.{request.attempt}"
                yield which, site.add_to_sum(study.tell(request, announcement))

    @property
    def announced(self) -> Path:
        """The coordinator's note of what it announced last, made before it is sent."""
        return self.folder / "announced"

    def next_attempt(self) -> int:
        """On the coordinator's disk before it is asked for."""
        path = self.folder / "attempts"
        attempt = 1 + (int(path.read_text()) if path.exists() else 0)
        path.write_text(str(attempt))
        return attempt


class StudyOfUpdates(StudyOfSums):
    """Each site adds an update of its own, with all its noise."""

    policy: ClassVar[dict[str, object]] = {"allowed_trust": ("site",)}

    def values(self) -> dict[str, object]:
        return values_of_updates(self.foundation.manifest.hash, rounds=2000, local_steps=1)


STUDIES = {"plain": Study, "sums": StudyOfSums, "updates": StudyOfUpdates}


def study_plan(foundation: Foundation) -> Plan:
    """As little training as there can be: what is killed is everything around it."""
    values = plan_values(foundation.manifest.hash)
    values["adapter"] |= {"targets": ["to_q"]}  # type: ignore[operator]
    values["privacy"] |= {"tiles_per_patient": 1, "draws_per_tile": 1}  # type: ignore[operator]
    values["stage"] = [
        {"name": "pretraining", "rounds": 2000, "local_steps": 1, "learning_rate": 0.01}
    ]
    return Plan.parse(values)


def released(outside: Path) -> list[tuple[str, str]]:
    """The outside witness: what left, in order, by round (and attempt)."""
    if not outside.exists():
        return []
    lines = [line.split() for line in outside.read_text().splitlines()]
    return [(number, digest) for number, digest in lines]


def release(outside: Path, number: str, digest: str) -> None:
    with outside.open("a") as file:
        file.write(f"{number} {digest}\n")
        file.flush()
        os.fsync(file.fileno())


def rounds_released(folder: Path) -> list[int]:
    return sorted({round_of(number) for number, _ in released(folder / "outside")})


def round_of(number: str) -> int:
    return int(number.partition(".")[0])


def run_site(study: Study, rounds: int, attempt: int, broken: str = "") -> None:
    """Answer the coordinator until so many rounds have left."""
    outside = study.folder / "outside"
    site = Site(SiteHome.open(study.folder / "site"), study.foundation)
    for number in range(len(rounds_released(study.folder)) + 1, rounds + 1):
        if broken == "early":
            release(outside, str(number), "0")
        for which, answer in study.answers(site, number, first=attempt % 2):
            if broken != "early":
                release(outside, which, answer.hash)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing(call: Callable[..., Any], point: str, target: str, occurrence: int) -> Any:
    """``call``, but the process dies before or after its nth time if that is the point."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += target in point
        if point == f"before {target}" and count == occurrence:
            die()
        result = call(*args, **kwargs)
        if point == f"after {target}" and count == occurrence:
            die()
        return result

    return wrapped


def arm(point: str, occurrence: int) -> None:
    """Patch this process (a fork that will die) so that it is killed at the point."""
    for owner, name, what in (
        (Ledger, "reserve", "reservation"),
        (PatientSum, "step_in_groups", "step"),
        (SiteSums, "hold", "word"),
        (sums, "verify_members", "members"),
        (HeldSum, "release", "masks"),
        (HeldUpdate, "release", "masks"),
        (Ledger, "commit", "ledger commit"),
        (Outbox, "seal", "seal"),
        (Session, "commit", "database commit"),
        (ledger_store, "write_head", "witness write"),
        (os, "fsync", "sync"),
        (Path, "replace", "rename"),
    ):
        setattr(owner, name, killing(getattr(owner, name), point, what, occurrence))
    globals()["release"] = killing(release, point, "release", occurrence)


def forget_to_sync(what: str) -> None:
    """Patch this process: controls, which the power cut must show."""
    if what == "files":
        os.fsync = lambda _descriptor: None  # type: ignore[assignment]
    if what == "ledger":
        made = ledger_store._engine

        def careless(path: Path, timeout_s: float) -> Any:
            engine = made(path, timeout_s)
            event.listen(engine, "connect", lambda c, _: c.execute("PRAGMA synchronous = OFF"))
            return engine

        ledger_store._engine = careless


def run_and_kill(study: Study, attempt: int, kill: tuple[str, int] | float, broken: str) -> bool:
    """Fork a site and kill it; whether it died of that."""
    rounds = len(rounds_released(study.folder)) + 3
    child = os.fork()
    if child == 0:
        forget_to_sync(broken)
        if isinstance(kill, tuple):
            arm(*kill)
        try:
            run_site(study, rounds, attempt, broken)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the site failed by itself"
    return os.WIFSIGNALED(status)


def violations(folder: Path) -> list[str]:
    """What the ledger on disk fails to cover, and what it charges twice."""
    try:
        entries = Ledger(folder / "site" / "ledger.db").entries()
    except LedgerError as error:
        return [f"the ledger does not open: {error}"]
    left = released(folder / "outside")
    charged = [Reservation.of(e) for e in entries if e.kind is EntryKind.RESERVED]
    reserved = [e.round for e in entries if e.kind in ("reserved", "carried")]
    asked = [(each.round, each.request_hash) for each in charged]  # another adapter costs anew
    committed = {e.release_hash: e for e in entries if e.kind is EntryKind.COMMITTED}
    paid = {e.reservation: h for h, e in committed.items()}
    rounds = [(round_of(r), r, h) for r, h in left]
    found = [f"round {r} left without a charge" for n, r, _ in rounds if n not in reserved]
    found += [
        f"round {r} left without a commit of it"
        for n, r, h in rounds
        if h not in committed or committed[h].round != n or paid[committed[h].reservation] != h
    ]
    found += [f"round {r[0]} charged twice" for r in set(asked) if asked.count(r) > 1]
    answers_of = [number for number, _ in set(left)]
    found += [f"round {r} answered twice" for r in set(left) if answers_of.count(r[0]) > 1]
    return found


def kills_of(generator: random.Random, points: list[str]) -> Iterator[tuple[str, int] | float]:
    """Every named point, then the same in turn with random times."""
    named = ((point, generator.randint(1, 3)) for point in itertools.cycle(points))
    yield from itertools.islice(named, len(points))
    while True:
        yield generator.uniform(0.0, 0.4)
        yield next(named)


def drive(folder: Path, kills: int, seed: int, broken: str, kind: str) -> dict[str, Any]:
    folder.mkdir()
    study = STUDIES[kind](folder)
    child = os.fork()  # what writing tiles starts, no later fork inherits
    if child == 0:
        study.make_home()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    mechanism_of(study.plan, declared_patients=DECLARED_PATIENTS)  # once for all forks
    gc.freeze()  # a collection in a fork would copy every page of the libraries
    home, kept = folder / "site", os.environ.get("DISK_KEPT")
    if kept:
        power_cut.settle(home, Path(kept))
        # A disk that comes back has the files that it had; here they are written anew.
        Place.of = lambda *_: Place(folder="0", files="0", machine="-")  # type: ignore[assignment]
    reached: list[str] = []
    for kill in itertools.islice(kills_of(random.Random(seed), study.points), kills):
        while not run_and_kill(study, len(reached), kill, broken):
            pass  # it was done before its time came
        reached.append(kill[0] if isinstance(kill, tuple) else "some time")
        if kept:
            power_cut.cut(home, Path(kept))
        if found := violations(folder):
            break
    else:
        run_site(study, len(rounds_released(folder)) + 1, kills)
        found = violations(folder)
    return {"reached": reached, "released": rounds_released(folder), "violations": found}


def driven(
    folder: Path, *options: str, environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """What the driver found in each of its runs."""
    roots = os.pathsep.join(path for path in sys.path if path)
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, __file__, str(folder), *options],
        env=os.environ | {"PYTHONPATH": roots} | one_thread | (environment or {}),
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    result: list[dict[str, Any]] = json.loads(finished.stdout)
    return result


def assert_nothing_was_lost(result: dict[str, Any], kills: int) -> None:
    assert result["violations"] == []
    assert len(result["reached"]) == kills
    assert result["released"] == list(range(1, len(result["released"]) + 1))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute of work, ten where many share two cores
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        pytest.param("plain", 16, id="16"),
        pytest.param("plain", 200, id="200", marks=pytest.mark.exhaustive),
        pytest.param("sums", 24, id="sums-24"),
        pytest.param("sums", 200, id="sums-200", marks=pytest.mark.exhaustive),
        pytest.param("updates", 200, id="updates-200", marks=pytest.mark.exhaustive),
    ],
)
def test_no_kill_leaves_the_ledger_below_what_was_released(
    tmp_path: Path, kind: str, kills: int
) -> None:
    """Of sums: no vector is uncharged, and for each attempt at most one ever leaves.

    Control: the outside witness does see a site that releases before it charges.
    """
    broken = ("--broken", "", "--broken", "early") if kind == "plain" else ("--broken", "")
    options = ("--kills", str(kills), "--seed", str(kills), "--kind", kind)
    result, *controls = driven(tmp_path, *options, *broken)
    assert_nothing_was_lost(result, kills)
    assert set(result["reached"]) >= set(STUDIES[kind].points), "every named point"
    assert len(controls) == (kind == "plain")
    for control in controls:
        assert any("without a charge" in violation for violation in control["violations"])


@pytest.mark.slow
@pytest.mark.skipif(power_cut.compiler() is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    "kills", [pytest.param(16, id="16"), pytest.param(100, id="100", marks=pytest.mark.exhaustive)]
)
def test_no_power_cut_leaves_the_ledger_below_what_was_released(tmp_path: Path, kills: int) -> None:
    """With each kill all that was not synced is gone. Controls: a site that forgets to sync."""
    environment = power_cut.environment(tmp_path, tmp_path)
    broken = ("--broken", "files", "--broken", "ledger")
    result, *controls = driven(
        *(tmp_path, "--kills", str(kills), "--broken", ""), *broken, environment=environment
    )
    assert_nothing_was_lost(result, kills)
    assert [bool(control["violations"]) for control in controls] == [True, True]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(STUDIES), default="plain")
    parser.add_argument("--broken", action="append", choices=["", "early", "files", "ledger"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    runs = enumerate(chosen.broken or [""])
    print(
        json.dumps(
            [
                drive(chosen.folder / str(run), chosen.kills, chosen.seed, broken, chosen.kind)
                for run, broken in runs
            ]
        )
    )
