"""A coordinator and its sites as the installed programs, on loopback, with TLS.

What runs is what hospitals run: ``crafts-server serve`` with a SuperLink inside, and for each site
``crafts-client join`` with its SuperNode. Only the machine between them is missing.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from crafts_client.enrolment import enrol
from crafts_client.home import SiteHome
from crafts_client.offered_plans import offered_plan
from crafts_client.rosters import shown_roster
from crafts_core.plan import Plan
from crafts_server.checkpoints import Checkpoint
from crafts_server.enrolments import Enrolments
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.plan_queue import queue_plan, queued_plans
from crafts_simulations.errors import ProcessError

LOOPBACK = "127.0.0.1"
COORDINATOR = "coordinator"
_STARTS_WITHIN_S = 300.0
_ENDS_WITHIN_S = 30.0
_POLL_S = 0.5
_START = "import sys; from {module}.cli import app; app(sys.argv[1:])"


def loopback_config(foundation: Path) -> HomeConfig:
    """A coordinator that only this machine reaches, on ports that are free now."""
    with _free_ports(4) as (fleet, enrolment, registrar, metrics):
        return HomeConfig(
            foundation=str(foundation.resolve()),
            hosts=("localhost",),
            listen=LOOPBACK,
            fleet_port=fleet,
            enrolment_port=enrolment,
            registrar_port=registrar,
            metrics_port=metrics,
        )


class Programs:
    """The programs of one federation; each writes to ``NAME.log``. Leaving the block ends all."""

    def __init__(self, home: CoordinatorHome, sites: Mapping[str, Path], logs: Path) -> None:
        """Prepare; nothing runs yet.

        Args:
            home: With the ports of ``loopback_config``.
            sites: Name to site home.
            logs: Folder for what the programs say.
        """
        self.home = home
        self.sites = dict(sites)
        self.logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Programs":
        if threading.current_thread() is threading.main_thread():
            # Ended by SIGTERM we would leave programs behind that hold homes and ports.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.terminate()
        for name in list(self._running):
            with suppress(ProcessError):
                self.wait_end(name)

    def start_coordinator(self, *, first_import_from: str = "") -> None:
        """``crafts-server serve``, until it listens; as for a site, a folder before all others."""
        arguments: list[object] = ["serve", "--home", self.home.path]
        self._start(COORDINATOR, "crafts_server", arguments, first_import_from)
        port = self.home.config.enrolment_port  # the last that it opens

        def listens() -> bool:
            with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
                return True
            return False

        self.wait(listens, "the coordinator does not listen", within_s=_STARTS_WITHIN_S)

    def enrol(self, name: str) -> None:
        """Invite a site and let it enrol; the coordinator must listen. Again is fine."""
        site = SiteHome.open(self.sites[name])
        if site.coordinator_path.exists():
            return
        with self.home.registry() as registry:
            token = Enrolments(registry).invite(
                name,
                patients=site.config.declared_patients,
                valid_for=timedelta(minutes=10),
            )
        token += f".{self.home.pki.enrolment_fingerprint}"
        enrol(site, f"localhost:{self.home.config.enrolment_port}", token)

    def approve_roster(self, plan: Plan) -> None:
        """At every site, who the hospitals of the plan's sums are; enrolled, they ask by TLS."""
        if not plan.aggregation.secure_aggregation:
            return
        self.home.sign_plan(plan)
        for path in self.sites.values():
            site = SiteHome.open(path)
            offered, _ = offered_plan(site, plan.hash)
            site.roster_approvals.approve(shown_roster(site, offered).roster)

    def start_site(self, name: str, *, first_import_from: str = "") -> None:
        """``crafts-client join``; ``first_import_from`` is a folder before all others."""
        arguments: list[object] = ["join", "--home", self.sites[name]]
        self._start(name, "crafts_client", arguments, first_import_from)

    def kill(self, name: str) -> None:
        """SIGKILL: nothing is said, nothing is finished."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def kill_supernode(self, name: str) -> None:
        """SIGKILL to the SuperNode that a site's program looks after."""
        (pid,) = _children(self._running[name].pid)
        os.kill(pid, signal.SIGKILL)

    def pid(self, name: str) -> int:
        """The process of a program that runs."""
        return self._running[name].pid

    def is_running(self, name: str) -> bool:
        """Whether the program was started and has not ended."""
        return name in self._running and self._running[name].poll() is None

    def end(self, name: str) -> int:
        """SIGTERM, as systemd does; the exit status."""
        self._running[name].terminate()
        return self.wait_end(name)

    def wait_end(self, name: str, *, within_s: float = _ENDS_WITHIN_S) -> int:
        """The exit status of a program that ends by itself.

        Raises:
            ProcessError: it did not, and was killed.
        """
        process = self._running.pop(name)
        try:
            return process.wait(timeout=within_s)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.wait()
            raise ProcessError(f"{name} did not end within {within_s:.0f} s") from error

    def log(self, name: str) -> str:
        """What a program said so far."""
        path = self.logs / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def chain(self, plan: Plan) -> list[Checkpoint]:
        """The verified checkpoints of a plan, as they are on disk now. Nothing is changed."""
        with self.home.registry() as registry:
            run_id = registry.newest_run(plan.hash)
        return [] if run_id is None else self.home.checkpoints(run_id).chain()

    def train(self, plan: Plan) -> None:
        """Hand a plan to the coordinator."""
        queue_plan(self.home, plan)

    def is_finished(self, plan: Plan) -> bool:
        """Whether the plan has left the queue."""
        return plan.hash not in {path.name for path in queued_plans(self.home)}

    def wait(self, condition: Callable[[], bool], problem: str, *, within_s: float) -> None:
        """Until a condition holds.

        Raises:
            ProcessError: it does not; ``problem`` and where the logs are.
        """
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() >= deadline:
                raise ProcessError(f"{problem} within {within_s:.0f} s; see {self.logs}")
            time.sleep(_POLL_S)

    def _start(
        self, name: str, module: str, arguments: list[object], first_import_from: str = ""
    ) -> None:
        command = [sys.executable, "-c", _START.format(module=module), *map(str, arguments)]
        roots = os.pathsep.join(path for path in (first_import_from, *sys.path) if path)
        with (self.logs / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(  # noqa: S603  # our own words, no shell
                command,
                env=os.environ | {"PYTHONPATH": roots},
                stdout=log,
                stderr=subprocess.STDOUT,
            )


@contextmanager
def _free_ports(number: int) -> Iterator[tuple[int, ...]]:
    """Ports that nobody had a moment ago, all different."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind((LOOPBACK, 0))
        yield tuple(each.getsockname()[1] for each in sockets)
    finally:
        for each in sockets:
            each.close()


def _children(pid: int) -> list[int]:
    """Processes that a thread of this one has started (Linux)."""
    children = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            children += (thread / "children").read_text(encoding="ascii").split()
    return [int(child) for child in children]
