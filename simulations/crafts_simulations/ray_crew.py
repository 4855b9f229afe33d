"""Turns on Ray: an actor for each place, on this machine's cores or on a cluster's.

Why not Flower's own engine on Ray: docs/adr/0015. Every machine of a cluster has to see the
simulation's folder and the foundation under the same paths, and this version installed.
"""

import logging
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message

from crafts_core.installing import how_to_install
from crafts_privacy import place as ledger_place
from crafts_simulations.errors import ProcessError, ScenarioError
from crafts_simulations.site_bench import SiteWork
from crafts_simulations.turn_pool import Died

log = logging.getLogger(__name__)

LOCAL = "local"
_KNOCK_S = 10.0
_SAYS_AFTER_S = 30.0
"""So long nobody is told that Ray has not begun a process: on a free machine it takes a few."""
_MISSING = f"--ray needs Ray: {how_to_install('ray')}"


class TurnActor:
    """What runs on Ray: one process that answers turns."""

    def __init__(self, make_answer: Callable[[], Callable[[str, Message], Message]]) -> None:
        """Nothing yet: what fails here would look to Ray like a process that died."""
        self._make_answer = make_answer
        self._answer: Callable[[str, Message], Message] | None = None

    def is_here(self) -> bool:
        """Said before any turn: until then Ray has not found room for it."""
        return True

    def answer(self, site: str, message: Message) -> Message:
        """One turn; before the first one, all that turns need is made."""
        if self._answer is None:
            # Ledgers are bound to their machine. On a cluster the next turn may be on another that
            # sees the same folder, and the patients are nobody's.
            ledger_place.MACHINE_ID = Path(os.devnull)
            self._answer = self._make_answer()
        return self._answer(site, message)


class RayCrew:
    """An actor for each place, see ``turn_pool.Crew``."""

    def __init__(self, work: SiteWork, address: str, *, num_places: int | None) -> None:
        """Connect to Ray, or start one.

        Args:
            work: What actors do. On GPUs each actor has one, which Ray deals out.
            address: ``local`` starts Ray here; else as ``ray.init`` takes it.
            num_places: Actors, at most one for each site; as many as Ray has room for if None.
                Where others use it now, as many as are free, and one at least, which waits.

        Raises:
            ScenarioError: Ray is not installed or not there, or too small.
        """
        try:
            import ray
        except ImportError as error:
            raise ScenarioError(_MISSING) from error
        self._ray: Any = ray
        self._work, self._address = work, address
        units = ("CPU", "GPU") if work.device.startswith("cuda") else ("CPU",)
        _connect(ray, address, num_cpus=None if "GPU" in units else num_places, work=work)
        room = _room(ray.cluster_resources(), units)
        wanted = min(num_places or room, len(work.homes))
        if not 0 < wanted <= room:
            ray.shutdown()
            raise ScenarioError(
                f"Ray at {address} has room for {room} processes of one {' and one '.join(units)} "
                f"each, and {wanted or 'some'} are needed; give fewer --workers, or more machines"
            )
        self.num_places = min(wanted, max(1, _room(ray.available_resources(), units)))
        if self.num_places < wanted:
            log.warning(
                "others use the Ray at %s: sites train on %d of %d processes",
                address,
                self.num_places,
                wanted,
            )
        needed = {"num_cpus": 1, "num_gpus": units.count("GPU")}
        # No restarts of Ray's own: what a site holds in memory would be gone without a word.
        self._actor_class = ray.remote(max_restarts=0, max_task_retries=0, **needed)(TurnActor)
        self._actors: dict[int, Any] = {}
        self._here: dict[int, Any] = {}
        """Place to Ray's reference of the word that its actor runs."""
        self._num_told = 0
        """Actors that had not begun, as it was last said."""
        self._replies: dict[int, Any] = {}
        """Place to Ray's reference of the reply."""

    def begin(self, place: int, site: str, message: Message) -> None:
        """See ``turn_pool.Crew``."""
        if place not in self._actors:
            self._actors[place] = self._actor_class.remote(self._work.bench)
            self._here[place] = self._actors[place].is_here.remote()
        self._replies[place] = self._actors[place].answer.remote(site, message)

    def listen(self, places: Collection[int]) -> Sequence[tuple[int, Message | Died]]:
        """See ``turn_pool.Crew``."""
        place_of = {self._replies[place]: place for place in places}
        ready: list[Any] = []
        while not ready:
            ready, _ = self._ray.wait(list(place_of), num_returns=1, timeout=_SAYS_AFTER_S)
            if not ready:
                self._tell_what_waits()
        return [(place_of[reply], self._said(place_of[reply])) for reply in ready]

    def _tell_what_waits(self) -> None:
        """Once for each number of actors that have not begun."""
        words = list(self._here.values())
        _, waiting = self._ray.wait(words, num_returns=len(words), timeout=0)
        if len(waiting) not in (0, self._num_told):
            log.warning(
                "waiting for the Ray at %s: %d of %d processes have not begun, as others use it or "
                "it is slow to start them; after Ctrl-C the same command goes on",
                self._address,
                len(waiting),
                len(words),
            )
        self._num_told = len(waiting)

    def _said(self, place: int) -> Message | Died:
        errors = self._ray.exceptions
        try:
            said = self._ray.get(self._replies.pop(place))
        except errors.RayTaskError as error:
            why = f"{type(error.cause).__name__}: {error.cause}"
            raise ProcessError(f"a process that works for sites cannot go on: {why}") from error
        except errors.RayError as error:
            self._ray.kill(self._actors.pop(place))
            del self._here[place]
            return Died(type(error).__name__)
        assert isinstance(said, Message)
        return said

    def close(self) -> None:
        """End the actors, and leave the cluster."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._ray.shutdown()


def _room(resources: Mapping[str, float], units: Sequence[str]) -> int:
    """Processes that take one of each unit. Ray leaves out what is all taken."""
    return min(int(resources.get(unit, 0)) for unit in units)


def _connect(ray: Any, address: str, *, num_cpus: int | None, work: SiteWork) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of a simulation
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of its future
    options: dict[str, Any] = {"address": address, "log_to_driver": work.is_verbose}
    if address == LOCAL:
        options |= {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        if address not in (LOCAL, "auto"):
            _knock(address)  # Ray itself would try for minutes
        ray.init(logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ScenarioError(
            f"no Ray at {address}: {said}; --ray takes local, auto or the HOST:PORT of `ray start`"
        ) from error


def _knock(address: str) -> None:
    """Raises OSError where nobody listens, ValueError where the address is none."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_KNOCK_S):
        pass
