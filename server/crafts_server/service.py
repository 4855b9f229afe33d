"""The running coordinator: three listeners, and the plans that wait to be trained, one by one.

``serve`` is one process. Plans are handed to it as files in the home's ``queue``, so that
``crafts-server train`` needs no port and a restart forgets nothing; a plan leaves the queue when it
is finished. What a kill leaves behind, the next start goes on with.
"""

import logging
import threading
from pathlib import Path

from crafts_core.errors import CraftsError
from crafts_core.plan import Plan
from crafts_server.coordinator import Coordinator
from crafts_server.enrolments import Enrolments
from crafts_server.errors import AggregationError, RegistryError
from crafts_server.home import CoordinatorHome
from crafts_server.receipts import RoundReceipt
from crafts_server.registrar import (
    EnrolmentService,
    RegistrarService,
    enrolment_server,
    registrar_server,
)
from crafts_server.superlink import SuperLink

log = logging.getLogger(__name__)

_LOOK_S = 2.0
_TRY_AGAIN_S = 30.0
"""After a round that too few sites answered: committed rounds stay, the sites may come back."""


class Service:
    """Listens from ``start`` to ``stop``."""

    def __init__(self, home: CoordinatorHome) -> None:
        """Open everything; nothing listens yet."""
        self._home = home
        config = home.config
        self._registry = home.registry()
        self._enrolments = Enrolments(self._registry)
        self.superlink = SuperLink(
            database=home.path / "superlink.db",
            pki=home.pki,
            host=config.listen,
            port=config.fleet_port,
        )
        self.ports: dict[str, int] = {}
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._watch_sites, name="sites", daemon=True)

    def start(self) -> None:
        """Listen for sites.

        Raises:
            CraftsError: a port is taken.
        """
        config, pki = self._home.config, self._home.pki
        pki.renew(config.hosts)
        self.superlink.start()
        registrar, registrar_port = registrar_server(
            RegistrarService(self._home, self._enrolments),
            pki,
            f"{config.listen}:{config.registrar_port}",
        )
        enrolment, enrolment_port = enrolment_server(
            EnrolmentService(
                self._enrolments,
                pki,
                signer=self._home.public_key,
                registrar_address=f"{config.hosts[0]}:{registrar_port}",
                fleet_address=f"{config.hosts[0]}:{self.superlink.port}",
                on_enrolled=self.superlink.admit,
            ),
            pki,
            f"{config.listen}:{config.enrolment_port}",
        )
        self._grpc = (registrar, enrolment)
        self.ports = {
            "fleet": self.superlink.port,
            "registrar": registrar_port,
            "enrolment": enrolment_port,
        }
        self._looking.start()

    def stop(self) -> None:
        """Close the listeners."""
        self._over.set()
        self._looking.join()
        for server in self._grpc:
            server.stop(2.0).wait()
        self.superlink.stop()
        self._registry.close()

    def work(self, stop: threading.Event) -> None:
        """Train what is queued, oldest first, until ``stop`` is set."""
        while not stop.is_set():
            waiting = queued_plans(self._home)
            if not waiting or not self._train(waiting[0]):
                stop.wait(_TRY_AGAIN_S if waiting else _LOOK_S)

    def _train(self, entry: Path) -> bool:
        """One plan; whether it left the queue."""
        try:
            with self.superlink.grid() as grid:
                Coordinator.open(self._home.path, entry.name, on_round=_say).run(grid)
        except AggregationError as error:
            log.warning("%s", error)
            return False
        except CraftsError as error:
            log.error("plan %s cannot be trained: %s", entry.name[:16], error)
            entry.rename(entry.with_suffix(".failed"))
            return True
        log.info("plan %s is finished", entry.name[:16])
        entry.unlink()
        return True

    def _watch_sites(self) -> None:
        """Enrolled nodes may connect, revoked ones no more, whoever changed it."""
        while True:
            try:
                for site in self._enrolments.sites():
                    if site.revoked_at is None:
                        self.superlink.admit(site.name, site.node_public_key)
                    else:
                        self.superlink.dismiss(site.node_public_key)
            except RegistryError as error:  # locked now, answered at the next look
                log.warning("%s", error)
            if self._over.wait(_LOOK_S):
                return


def _say(receipt: RoundReceipt) -> None:
    log.info(
        "committed round=%d stage=%s sites=%d refused=%d missing=%d bytes_up=%d seconds=%.0f",
        receipt.round,
        receipt.stage,
        len(receipt.sites),
        len(receipt.refused),
        len(receipt.missing),
        receipt.bytes_up,
        receipt.seconds,
    )


def queue_plan(home: CoordinatorHome, plan: Plan) -> None:
    """Sign a plan and hand it to whoever serves this home. Again is fine."""
    home.sign_plan(plan)
    folder = home.path / "queue"
    folder.mkdir(exist_ok=True)
    (folder / plan.hash).touch()


def queued_plans(home: CoordinatorHome) -> list[Path]:
    """What waits, oldest first; the names are the plans' hashes."""
    entries = [path for path in (home.path / "queue").glob("*") if not path.suffix]
    return sorted(entries, key=lambda path: path.stat().st_mtime)
