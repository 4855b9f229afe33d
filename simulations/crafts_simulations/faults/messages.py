"""A site that sends what it should not, and checkpoints that somebody changed.

Three real sites in one process; the third one's answers are changed on the way out. Every round
commits with the two honest ones, and its receipt names what was refused.
"""

import copy
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.home import SiteHome
from crafts_client.site import Site
from crafts_core.array_bytes import PACKED
from crafts_core.foundation import Foundation
from crafts_server.checkpoints import Checkpoint
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_server.errors import CheckpointError
from crafts_server.receipts import RoundReceipt
from crafts_simulations.faults.case import Case, Experiment, check_ledgers, expect
from crafts_simulations.local_grid import LocalGrid, LocalNode, TurnsHere
from crafts_simulations.small_study import SmallStudy, make_small_study

HOSTILE = "site-3"
Values = npt.NDArray[Any]
Spoil = Callable[[RecordDict, list[RecordDict]], RecordDict]
"""A good answer, and the ones of earlier rounds, to a bad answer."""


def hostile_site(spoil: Spoil) -> Experiment:
    """Two rounds; in the second the hostile site's answer is spoilt."""

    def experiment(folder: Path, foundation: Foundation) -> str:
        study = make_small_study(folder, foundation, num_sites=3)
        chain = federate(study, foundation, spoil)
        first, second = (checkpoint.receipt() for checkpoint in chain[1:])
        expect(len(first.sites) == 3, "the first, honest round did not use all three")
        used = {site.site for site in second.sites}
        expect(used == {"site-1", "site-2"}, f"the spoilt round used {sorted(used)}")
        expect([each.site for each in second.refused] == [HOSTILE], "the refusal names nobody")
        check_ledgers(chain, study.sites)
        return second.refused[0].reason

    return experiment


def replayed(_good: RecordDict, earlier: list[RecordDict]) -> RecordDict:
    """Last round's answer once more."""
    return earlier[-1]


def truncated(good: RecordDict, _earlier: list[RecordDict]) -> RecordDict:
    """An array that ends too soon."""
    array = good.array_records["delta"][PACKED]
    array.data = array.data[:-7]
    return good


def oversized(good: RecordDict, _earlier: list[RecordDict]) -> RecordDict:
    """Ten times the numbers."""
    return _with_values(good, lambda values: np.tile(values, 10))


def not_finite(good: RecordDict, _earlier: list[RecordDict]) -> RecordDict:
    """One NaN, and the norm that was declared before."""

    def spoil(values: Values) -> Values:
        values[0] = np.nan
        return values

    return _with_values(good, spoil)


def wrong_shape(good: RecordDict, _earlier: list[RecordDict]) -> RecordDict:
    """As many numbers, in another shape."""
    return _with_values(good, lambda values: values.reshape(2, -1))


def too_long(good: RecordDict, _earlier: list[RecordDict]) -> RecordDict:
    """A thousand times the declared update: an attempt to outweigh the others."""
    return _with_values(good, lambda values: values * values.dtype.type(1000))


def wrong_round(good: RecordDict, _earlier: list[RecordDict]) -> RecordDict:
    """An answer that says it is for another round."""
    return _with_reply(good, round=7)


def wrong_plan(good: RecordDict, _earlier: list[RecordDict]) -> RecordDict:
    """An answer to another plan."""
    return _with_reply(good, plan_hash="ab" * 32)


def less_noise(good: RecordDict, _earlier: list[RecordDict]) -> RecordDict:
    """A declared mechanism that the update's own norm gives the lie."""
    return _with_reply(good, noise_multiplier=1e-3)


def another_name(good: RecordDict, _earlier: list[RecordDict]) -> RecordDict:
    """An answer in another site's name."""
    return _with_reply(good, site="site-1")


def with_code(good: RecordDict, _earlier: list[RecordDict]) -> RecordDict:
    """A record more than there should be."""
    good["extra"] = ConfigRecord({"pickle": b"cos\nsystem\n"})
    return good


def _with_values(good: RecordDict, change: Callable[[Values], Values]) -> RecordDict:
    values = change(good.array_records["delta"][PACKED].numpy().copy())
    good["delta"] = ArrayRecord({PACKED: Array.from_numpy_ndarray(values)})
    return good


def _with_reply(good: RecordDict, **changes: str | int | float) -> RecordDict:
    good["reply"] = ConfigRecord({**good.config_records["reply"], **changes})
    return good


def federate(
    study: SmallStudy,
    foundation: Foundation,
    spoil: Spoil | None = None,
    on_round: Callable[[RoundReceipt], None] = lambda _: None,
) -> list[Checkpoint]:
    """All of a study's rounds in this process; ``spoil`` is what the hostile site does."""
    honest = make_client_app(lambda path: Site(SiteHome.open(path), foundation))
    apps = dict.fromkeys(study.sites, honest)
    if spoil is not None:
        apps[HOSTILE] = _hostile(honest, spoil)
    nodes = {
        name: LocalNode(app=apps[name], node_config={HOME_KEY: str(path)})
        for name, path in study.sites.items()
    }
    coordinator = Coordinator(
        *(study.coordinator, study.plan, foundation),
        patience=Patience(poll_s=0.0, join_wait_s=0.0),
        on_round=on_round,
    )
    coordinator.run(LocalGrid(TurnsHere(nodes)))
    return coordinator.chain()


def _hostile(honest: ClientApp, spoil: Spoil) -> ClientApp:
    """The honest app; from its second answer on, spoilt."""
    app, earlier = ClientApp(), list[RecordDict]()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        answer = honest(message, context)
        if not answer.has_content():
            return answer
        good = copy.deepcopy(answer.content)
        content = spoil(answer.content, earlier) if earlier else answer.content
        earlier.append(good)
        return Message(content, reply_to=message)

    return app


# ---- checkpoints and databases ----------------------------------------------------------------


def checkpoint_changed(change: Callable[[Path, Path], None]) -> Experiment:
    """Two of three rounds run, somebody changes the checkpoints; then they are put back."""

    def experiment(folder: Path, foundation: Foundation) -> str:
        study = make_small_study(folder, foundation, rounds=3)
        with suppress(_Interrupted):
            federate(study, foundation, on_round=_stop_after(2))
        (checkpoints,) = (study.coordinator.path / "checkpoints").iterdir()
        copied = folder / "copy"
        shutil.copytree(checkpoints, copied)
        change(checkpoints, copied)
        try:
            federate(study, foundation)
        except CheckpointError as error:
            refused = str(error).replace(f"{folder}/", "")
        else:
            expect(False, "it went on with changed checkpoints")
        shutil.rmtree(checkpoints)
        shutil.copytree(copied, checkpoints)
        chain = federate(study, foundation)
        expect(len(chain) == 4, "it did not go on once they were put back")
        check_ledgers(chain, study.sites)
        return f"refused: {refused}; went on with the copy"

    return experiment


def one_byte(checkpoints: Path, _copy: Path) -> None:
    """Of the newest adapter."""
    path = _newest(checkpoints) / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def rolled_back(checkpoints: Path, _copy: Path) -> None:
    """The newest round is gone, as after a restore from an old backup."""
    shutil.rmtree(_newest(checkpoints))


def another_history(checkpoints: Path, _copy: Path) -> None:
    """The newest round is replaced by the one before it."""
    rounds = sorted(path for path in checkpoints.iterdir() if path.is_dir())
    shutil.rmtree(rounds[-1])
    shutil.copytree(rounds[-2], rounds[-1])


def _newest(checkpoints: Path) -> Path:
    return max(path for path in checkpoints.iterdir() if path.is_dir())


class _Interrupted(Exception):  # noqa: N818  # nobody's mistake
    """Ends a run between two rounds."""


def _stop_after(rounds: int) -> Callable[[RoundReceipt], None]:
    def stop(receipt: RoundReceipt) -> None:
        if receipt.round == rounds:
            raise _Interrupted

    return stop


def ledger_locked(folder: Path, foundation: Foundation) -> str:
    """Somebody reads a site's ledger with a tool that locks it, for a few seconds."""
    study = make_small_study(folder, foundation)
    path = SiteHome.open(study.sites["site-1"]).ledger_path

    def hold() -> None:
        while not path.exists():
            time.sleep(0.05)
        connection = sqlite3.connect(path, timeout=30)
        connection.execute("BEGIN EXCLUSIVE")
        time.sleep(3)
        connection.rollback()
        connection.close()

    holder = threading.Thread(target=hold)
    holder.start()
    chain = federate(study, foundation)
    holder.join()
    check_ledgers(chain, study.sites)
    refused = {each.reason for c in chain[1:] for each in c.receipt().refused}
    return "; ".join(sorted(refused)) or "the site waited"


NAMED = "refused and named in the receipt; the others' round is committed"
STOPS = "training stops with one line that says what to restore; then goes on"

CASES: tuple[Case, ...] = (
    *(
        Case(group="update", fault=fault, must_hold=NAMED, experiment=hostile_site(spoil))
        for fault, spoil in (
            ("replayed", replayed),
            ("truncated", truncated),
            ("oversized", oversized),
            ("NaN", not_finite),
            ("wrong shape", wrong_shape),
            ("a thousand times as long", too_long),
            ("wrong round", wrong_round),
            ("wrong plan", wrong_plan),
            ("less noise declared than it holds", less_noise),
            ("in another site's name", another_name),
            ("with a record more", with_code),
        )
    ),
    *(
        Case(
            group="checkpoint", fault=fault, must_hold=STOPS, experiment=checkpoint_changed(change)
        )
        for fault, change in (
            ("one byte changed", one_byte),
            ("rolled back", rolled_back),
            ("replaced by an older one", another_history),
        )
    ),
    Case(
        group="database",
        fault="a site's ledger locked for 3 s",
        must_hold="the site waits; nothing is under-counted",
        experiment=ledger_locked,
    ),
)
