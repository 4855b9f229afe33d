"""The running coordinator: three listeners, and the plans that wait to be trained, one by one.

``serve`` is one process. Plans are handed to it as files in the home's ``queue``, so that
``crafts-server train`` needs no port and a restart forgets nothing; a plan leaves the queue when it
is finished. What a kill leaves behind, the next start goes on with.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import OperationalError

from crafts_core import __version__
from crafts_core.errors import CraftsError
from crafts_server.audit_log import Event
from crafts_server.checkpoints import Checkpoint
from crafts_server.collection import Members, Patience
from crafts_server.coordinator import Coordinator
from crafts_server.enrolments import Enrolments
from crafts_server.errors import (
    AggregationError,
    AuditLogError,
    RegistryError,
    RunStoppedError,
    SitesRefuseError,
    StorageError,
)
from crafts_server.home import CoordinatorHome
from crafts_server.metrics import Metrics
from crafts_server.past_rounds import num_short, past_runs
from crafts_server.plan_queue import fail_plan, queued_plans
from crafts_server.receipts import RoundReceipt
from crafts_server.registrar import (
    EnrolmentService,
    RegistrarService,
    enrolment_server,
    registrar_server,
)
from crafts_server.registry import RunStatus
from crafts_server.signed_heads import SignedHeads
from crafts_server.superlink import SuperLink

log = logging.getLogger(__name__)

_LOOK_S = 2.0
_TRY_AGAIN_S = 30.0
"""After a round that too few sites answered: committed rounds stay, the sites may come back."""
_TELL_AGAIN_S = 3600.0


@dataclass(slots=True, kw_only=True)
class _Wait:
    """A plan's newest line of a round without a result."""

    queued_at: float
    """Handed over again, a plan waits anew."""
    why: str
    told_at: float
    untold: int = 0
    """Such rounds since that line."""
    is_over: bool = False
    """A round was committed since: what waits after that is another wait."""


class Service:
    """Listens from ``start`` to ``stop``."""

    def __init__(self, home: CoordinatorHome) -> None:
        """Open everything; nothing listens yet."""
        self._home = home
        config = home.config
        home.close_to_others()
        self._registry = home.registry(may_upgrade=True)
        self._enrolments = Enrolments(self._registry)
        self.superlink = SuperLink(
            database=home.path / "superlink.db",
            pki=home.pki,
            host=config.listen,
            port=config.fleet_port,
        )
        self.metrics = Metrics()
        self._audit = home.audit_log
        self._contacts = home.contacts
        self.ports: dict[str, int] = {}
        self._waits: dict[str, _Wait] = {}
        """By plan."""
        self._stop = threading.Event()
        self._over = threading.Event()
        self._admitting = threading.Lock()
        """From looking up who is enrolled until the nodes are as it says: a node that enrols in
        between would be dismissed, and Flower never takes its key again."""
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
            RegistrarService(self._home, self._enrolments, SignedHeads(self._registry)),
            pki,
            f"{config.listen}:{config.registrar_port}",
            on_refused=self._refused,
        )
        enrolment, enrolment_port = enrolment_server(
            EnrolmentService(
                self._enrolments,
                pki,
                signer=self._home.public_key,
                registrar_address=f"{config.hosts[0]}:{registrar_port}",
                fleet_address=f"{config.hosts[0]}:{self.superlink.port}",
                on_enrolled=self._enrolled,
            ),
            pki,
            f"{config.listen}:{config.enrolment_port}",
            on_refused=self._refused,
        )
        self._grpc = (registrar, enrolment)
        self._count_on()
        self.ports = {
            "fleet": self.superlink.port,
            "registrar": registrar_port,
            "enrolment": enrolment_port,
            "metrics": self.metrics.start(config.metrics_port),
        }
        self.metrics.certificate_expires.set(pki.server_expires_at.timestamp())
        self._audit.write(Event.STARTED, version=__version__, signer=self._home.public_key)
        self._looking.start()

    def stop(self) -> None:
        """Close the listeners."""
        self._over.set()
        self._looking.join()
        for server in self._grpc:
            server.stop(2.0).wait()
        self.metrics.stop()
        self.superlink.stop()
        self._registry.close()
        for plan, wait in self._waits.items():
            if wait.untold and (self._home.path / "queue" / plan).exists():
                self._audit.write(Event.SHORT, plan=plan, why=wait.why, times=wait.untold)
        self._audit.write(Event.ENDED)

    def work(self, stop: threading.Event) -> None:
        """Train what is queued, oldest first, until ``stop`` is set.

        A plan that sites refuse lets the next one go before it: their people may take weeks to say
        yes. One whose sites are away does not, as they come back by themselves.
        """
        self._stop = stop
        refused: set[str] = set()
        while not stop.is_set():
            waiting = queued_plans(self._home)
            entry = next((each for each in waiting if each.name not in refused), None)
            if entry is None:
                refused.clear()
                stop.wait(_TRY_AGAIN_S if waiting else _LOOK_S)
                continue
            try:
                is_over = self._train(entry, stop)
            except SitesRefuseError:
                refused.add(entry.name)
                continue
            refused.clear()
            if not is_over:
                stop.wait(_TRY_AGAIN_S)

    def _train(self, entry: Path, stop: threading.Event) -> bool:
        """One plan; False if it is worth trying again later.

        Raises:
            SitesRefuseError: sites refuse it, which is noted.
        """
        plan = entry.name
        try:
            with self.superlink.grid() as grid:
                coordinator = Coordinator.open(
                    self._home.path,
                    plan,
                    on_round=self._committed,
                    patience=Patience(sleep=_until_stopped(entry, stop)),
                    members=Members(
                        enrolled_as=self.superlink.site_of,
                        connected_since=self.superlink.connected_since,
                    ),
                )
                self._make_up(coordinator.chain())
                coordinator.run(grid)
        except RunStoppedError:
            log.info("plan %s was stopped", plan[:16])
            return True
        except AggregationError as error:
            log.warning("%s", error)
            self._note_short(entry, str(error))
            if isinstance(error, SitesRefuseError):
                raise
            return False
        except (RegistryError, StorageError, OperationalError, OSError) as error:
            # A busy database, a full disk: committed rounds are safe, and it may pass.
            log.error("trying again in %.0f s: %s", _TRY_AGAIN_S, _first_line(error))
            return False
        except CraftsError as error:
            log.error("plan %s cannot be trained: %s", plan[:16], error)
            self._note(Event.FAILED, plan=plan, why=str(error))
            fail_plan(self._home, plan, str(error))
            return True
        log.info("plan %s is finished", plan[:16])
        self._note(Event.FINISHED, plan=plan)
        entry.unlink(missing_ok=True)
        return True

    def _note_short(self, entry: Path, why: str) -> None:
        """Once for each reason of a wait, and once an hour: a plan may wait for weeks.

        Each line has how often it happened since the one before.
        """
        self.metrics.short_rounds.inc()
        plan, now = entry.name, time.monotonic()
        new = _Wait(queued_at=_changed_at(entry), why=why, told_at=now)
        wait = self._waits.get(plan)
        if (
            wait is not None
            and not wait.is_over
            and (wait.queued_at, wait.why) == (new.queued_at, why)
            and now - wait.told_at < _TELL_AGAIN_S
        ):
            wait.untold += 1
            return
        times = 1 if wait is None else wait.untold + 1
        self._note(Event.SHORT, plan=plan, why=why, times=times)
        self._waits[plan] = new

    def _committed(self, receipt: RoundReceipt) -> None:
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
        for rise in receipt.rises:
            log.warning(
                "weight rose site=%s round=%d per share %.2f -> %.2f",
                *(rise.site, receipt.round, rise.before, rise.now),
            )
        self.metrics.committed(receipt)
        for wait in self._waits.values():
            wait.is_over = True
        self._note_round(receipt)

    def _make_up(self, chain: Sequence[Checkpoint]) -> None:
        """Note the rounds whose lines a kill cut off: the checkpoint alone commits a round."""
        try:
            entries = self._audit.verify()
        except AuditLogError as error:  # what was altered is no reason to stop a study
            log.error("no line of the audit log is made up: %s", error)
            return
        told = {
            (entry.facts["run"], entry.facts["round"])
            for entry in entries
            if entry.event == Event.COMMITTED
        }
        for checkpoint in chain[1:]:
            receipt = checkpoint.receipt()
            if (receipt.run_id, receipt.round) not in told:
                self._note_round(receipt)

    def _note_round(self, receipt: RoundReceipt) -> None:
        """With the line last by which it is known that all are there."""
        for refusal in receipt.refused:
            self._note(
                Event.REFUSED,
                run=receipt.run_id,
                round=receipt.round,
                site=refusal.site,
                why=refusal.reason,
            )
        for rise in receipt.rises:
            self._note(
                Event.ROSE,
                run=receipt.run_id,
                round=receipt.round,
                site=rise.site,
                before=rise.before,
                now=rise.now,
            )
        self._note(
            Event.COMMITTED,
            run=receipt.run_id,
            round=receipt.round,
            state=receipt.state_hash,
            sites=[site.site for site in receipt.sites],
            missing=list(receipt.missing),
        )

    def _note(self, event: Event, **facts: object) -> None:
        """Write to the audit log, however long the disk is full: nothing goes on without it."""
        while True:
            try:
                self._audit.write(event, **facts)
                return
            except OSError as error:
                log.error("the audit log cannot be written, trying again: %s", error)
                if self._stop.wait(_LOOK_S):
                    raise

    def _count_on(self) -> None:
        """Counters go on where they were; they are for looking, and stop nothing."""
        try:
            entries = self._audit.verify()
            self.metrics.go_on(
                tuple(past_runs(self._registry, entries)), num_short=num_short(entries)
            )
        except CraftsError as error:
            log.warning("metrics count from zero: %s", error)

    def _refused(self, call: str) -> None:
        self.metrics.refused_calls.labels(call).inc()

    def _enrolled(self, site: str, node_public_key: str) -> None:
        with self._admitting:
            self.superlink.admit(site, node_public_key)
        patients = self._enrolments.sizes.agreed().get(site)
        self._audit.write(Event.ENROLLED, site=site, patients=patients)

    def _watch_sites(self) -> None:
        """Enrolled nodes may connect, revoked or replaced ones no more, whoever changed it."""
        while True:
            try:
                with self._admitting:
                    sites = self._enrolments.sites()
                    admitted = {s.name: s.node_public_key for s in sites if s.revoked_at is None}
                    self.superlink.admit_only(admitted)
                online = self.superlink.online & admitted.keys()
                for site in online:
                    self._contacts.note(site)
                self.metrics.connected({site: site in online for site in admitted})
                self.metrics.plans_queued.set(len(queued_plans(self._home)))
                self.metrics.audit_entries.set(self._audit.num_entries)
                for run in self._registry.runs():
                    if run.status is RunStatus.RUNNING:
                        self.metrics.began(run.run_id)
            except (CraftsError, OperationalError, OSError) as error:  # the next look is soon
                log.warning("%s", _first_line(error))
            except Exception:  # a thread that ended here would let revoked sites stay
                log.exception("looking after sites failed; the next look is soon")
            if self._over.wait(_LOOK_S):
                return


def _until_stopped(entry: Path, stop: threading.Event) -> Callable[[float], None]:
    """A sleep that ends the run when the program ends or the plan has left the queue."""

    def sleep(seconds: float) -> None:
        if stop.wait(seconds) or not entry.exists():
            raise RunStoppedError("the run was stopped; committed rounds stay")

    return sleep


def _changed_at(entry: Path) -> float:
    """When a plan was handed over; zero if it has left the queue meanwhile."""
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
