"""Programs that are made to stop at a point, read another clock, or cheat: from outside.

A folder with a ``sitecustomize.py`` comes before all others on a program's import path, so Python
runs it first. The products know nothing of it.
"""

from dataclasses import dataclass
from pathlib import Path

_PAUSE = """
import importlib, pathlib, sys, time
if any("{program}.cli" in word for word in sys.orig_argv):
    *owners, name = {target!r}.split(":")[1].split(".")
    owner = importlib.import_module({target!r}.split(":")[0])
    for each in owners:
        owner = getattr(owner, each)
    real = getattr(owner, name)
    reached, stopped = pathlib.Path({reached!r}), []
    def stop():
        if stopped:
            return
        stopped.append(True)
        reached.touch()
        while reached.exists():
            time.sleep(0.1)
    def paused(*args, **kwargs):
        counts = {when}
        if counts and {before}:
            stop()
        result = real(*args, **kwargs)
        if counts:
            stop()
        return result
    setattr(owner, name, paused)
"""
_DATES = """
import datetime
seconds, real = {seconds!r}, datetime.datetime
class Kind(type):
    def __instancecheck__(cls, value):
        return isinstance(value, real)
    def __subclasscheck__(cls, other):
        return issubclass(other, real)
class Shifted(real, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(seconds=seconds)
    @classmethod
    def utcnow(cls):
        return real.utcnow() + datetime.timedelta(seconds=seconds)
datetime.datetime = Shifted
"""
_TIME = """
import time
real_time = time.time
time.time = lambda: real_time() + seconds
"""
_REPLIES = """
import sys
if any("crafts_client.cli" in word for word in sys.orig_argv):
    import crafts_client.messages as module
    from crafts_core.array_bytes import PACKED
    from flwr.app import Array, ArrayRecord
    real, earlier = module.write_reply, []
    def write_reply(release):
        good = real(release)
        {cheat}
        return good
    module.write_reply = write_reply
"""
_MULTIPLY = """values = good.array_records["delta"][PACKED].numpy() * 1000
        good["delta"] = ArrayRecord({PACKED: Array.from_numpy_ndarray(values)})"""
_DECLARE = """from flwr.app import ConfigRecord
        good["reply"] = ConfigRecord({**good.config_records["reply"], **CHANGES})"""
_MAKE_UP = """if "sum" in good:
            import numpy
            old = good.array_records["sum"][PACKED].numpy()
            words = numpy.random.default_rng().integers(0, 2**32, len(old), dtype=numpy.uint32)
            good["sum"] = ArrayRecord({PACKED: Array.from_numpy_ndarray(words)})"""
_GHOST = """
import sys
if any("crafts_server.cli" in word for word in sys.orig_argv):
    import pathlib
    import crafts_server.sums as module
    from crafts_privacy.secure_aggregation.masking import MaskKey
    from crafts_privacy.secure_aggregation.members import sign_ready
    from crafts_privacy.signing import load_signing_key
    real, identity = module.announce, load_signing_key(pathlib.Path({key!r}))
    def announce(members):
        values = {{**members[0].to_scalars(), "site": {name!r}, "declared_patients": {patients!r}}}
        del values["signature"]
        word = sign_ready(identity, **values | {{"key": MaskKey().public_key}})
        return real([*members, word])
    module.announce = announce
"""
_REPLAY = """earlier.append(real(release))
        good = earlier[0]"""


@dataclass(frozen=True, slots=True)
class Pause:
    """Where a program stops."""

    first_import_from: str
    reached: Path
    """Exists once it stands there; removed, the program goes on and does not stop again."""


def pause(
    folder: Path, program: str, target: str, *, before: bool = False, when: str = "True"
) -> Pause:
    """A program stops before or after a call.

    Args:
        folder: To make.
        program: ``crafts_server`` or ``crafts_client``.
        target: ``package.module:Class.method`` or ``package.module:function``.
        before: Rather than after.
        when: Of ``args`` and ``kwargs``: which calls count.
    """
    reached = folder / "reached"
    text = _PAUSE.format(
        program=program, target=target, reached=str(reached), before=before, when=when
    )
    return Pause(_planted(folder, text), reached)


def clock(folder: Path, seconds: float, *, dates_only: bool = False) -> str:
    """What Python reads from the clock is so much later; TLS libraries read the real one.

    Args:
        folder: To make.
        seconds: Negative is earlier.
        dates_only: Leave ``time.time``: a gRPC server compares it with the machine's own clock.
    """
    text = _DATES.format(seconds=seconds) + ("" if dates_only else _TIME)
    return _planted(folder, text)


def multiplied(folder: Path) -> str:
    """A site that sends a thousand times what it declares."""
    return _planted(folder, _REPLIES.replace("{cheat}", _MULTIPLY))


def garbage(folder: Path) -> str:
    """A site whose masked vectors are made up."""
    return _planted(folder, _REPLIES.replace("{cheat}", _MAKE_UP))


def announcing(folder: Path, *, ghost: str, key: Path, patients: int) -> str:
    """A coordinator that announces a site of its own making among the members of each sum.

    Args:
        folder: To make.
        ghost: Its name.
        key: Its identity, an Ed25519 key on disk.
        patients: What it declares.
    """
    return _planted(folder, _GHOST.format(name=ghost, key=str(key), patients=patients))


def replayed(folder: Path) -> str:
    """A site that answers every round with its first answer."""
    return _planted(folder, _REPLIES.replace("{cheat}", _REPLAY))


def declaring(folder: Path, **changes: int | float) -> str:
    """A site that declares something else than it did."""
    cheat = _DECLARE.replace("CHANGES", repr(changes))
    return _planted(folder, _REPLIES.replace("{cheat}", cheat))


def never_renewed(folder: Path) -> str:
    """A coordinator that does not renew certificates at its start, as one that runs for years."""
    return _planted(folder, "import crafts_server.pki as m\nm.Pki.renew = lambda *_: None\n")


def _planted(folder: Path, text: str) -> str:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
    return str(folder)
