"""The coordinator's registry: which sites, plans, runs, rounds and checkpoints there are.

SQLAlchemy 2; SQLite by default, PostgreSQL by URL. The truth about a round is its signed
checkpoint; the registry is the index that people and programs query, and the witness that no
committed round has gone missing. A crash between the two leaves the registry behind, never ahead,
and the next start brings it up to date.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, Select, create_engine, event, func, make_url, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from crafts_privacy.errors import SchemaError
from crafts_privacy.schema import Schema, Standing, lacking, standing, upgrade
from crafts_server.errors import RegistryError, UnknownRunError
from crafts_server.receipts import RoundReceipt
from crafts_server.registry_rows import (
    Base,
    CheckpointRow,
    ParticipationRow,
    PlanRow,
    RegistryInfoRow,
    RosterRow,
    RoundRow,
    RunRow,
    SiteRow,
    now,
)

FORMAT_VERSION = 1
SCHEMA = Schema(metadata=Base.metadata, folder=Path(__file__).parent / "registry_revisions")
_PATIENCE_S = 20.0
"""How long a transaction waits for others."""
_RUNS = select(
    RunRow,
    PlanRow.study,
    PlanRow.json,
    select(func.count())
    .where(RoundRow.run_id == RunRow.run_id)
    .correlate(RunRow)
    .scalar_subquery(),
).join(PlanRow, PlanRow.hash == RunRow.plan_hash)
"""Each run with its study, its plan and how many rounds it has."""
_ADVICE = {
    "55P03": "; another program holds its tables: try again, or look who does in pg_locks",
    "25006": "; the database, or its server, takes no writes now: is it a standby?",
}
"""By PostgreSQL's code of an error."""
_UPGRADE_LOCK = 0x63726166747300  # "crafts", for PostgreSQL's advisory locks


class RunStatus(StrEnum):
    """Where a run is. A process that dies leaves ``running``; the next start goes on."""

    RUNNING = "running"
    STOPPED = "stopped"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """A plan as it was signed."""

    hash: str
    study: str
    json: str
    signature: str
    public_key: str

    @property
    def is_of_sums(self) -> bool:
        """Whether it counts only with a roster."""
        return bool(json.loads(self.json)["aggregation"].get("secure_aggregation"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A committed checkpoint as the registry remembers it."""

    round: int
    manifest_hash: str
    state_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run at a glance."""

    run_id: str
    study: str
    plan_hash: str
    status: RunStatus
    rounds: int
    planned_rounds: int
    started_at: datetime
    finished_at: datetime | None

    @property
    def progress(self) -> str:
        """Rounds with a checkpoint, of those that the plan has."""
        return f"{self.rounds} of {self.planned_rounds} rounds"


def _planned_rounds(plan_json: str) -> int:
    """A stage that is one round by its nature does not say so."""
    stages: list[dict[str, Any]] = json.loads(plan_json).get("stage", [])
    return sum(stage.get("rounds", 1) for stage in stages)


class Registry:
    """Short transactions on the tables above. The engine is this object's; ``close`` ends it."""

    def __init__(self, url: str, *, may_upgrade: bool = False) -> None:
        """Open a database, and make its tables where there are none.

        Args:
            url: Of SQLAlchemy.
            may_upgrade: Bring tables of an older program up to date. Whoever else uses the same
                database must be of this version, too: only a coordinator may that starts.

        Raises:
            RegistryError: it cannot be reached, was made by a newer program, or by an older one
                whose tables this one cannot read as they are.
        """
        try:
            self._engine = create_engine(url, connect_args=_postgresql_options(url))
        except (SQLAlchemyError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise RegistryError(f"the registry's URL cannot be used: {reason}") from error
        except ValueError:  # its text may hold a part of the password
            raise RegistryError(
                "the registry's URL cannot be used; in a password write @ as %40, : as %3A, "
                "/ as %2F and % as %25"
            ) from None
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _configure_sqlite)
        try:
            self._make_or_check_tables(may_upgrade=may_upgrade)
        except RegistryError:
            self._engine.dispose()
            raise

    def _make_or_check_tables(self, *, may_upgrade: bool) -> None:
        with self.session() as session:
            found = standing(session.connection(), SCHEMA)
        if found is Standing.NEWER:
            raise RegistryError(
                "the registry was written by a newer crafts-federated; update this program"
            )
        if found is Standing.EMPTY or (may_upgrade and found is not Standing.CURRENT):
            self._upgrade()
        elif found is not Standing.CURRENT:
            self._check_readable()
        with self.session() as session:
            version = session.scalars(select(RegistryInfoRow.format_version)).one_or_none()
            if version != FORMAT_VERSION:
                raise RegistryError(
                    f"registry has format {version}, expected {FORMAT_VERSION}; "
                    "use the version of crafts-federated that wrote it"
                )

    def _check_readable(self) -> None:
        with self.session() as session:
            lacks = lacking(session.connection(), SCHEMA)
        if lacks:
            raise RegistryError(
                f"the registry is of an older crafts-federated and has no {lacks[0]}; "
                "`crafts-server serve` brings it up to date (stop an older one before)"
            )

    def _upgrade(self) -> None:
        """Run missing revisions, one program at a time, in one transaction."""
        try:
            with self.session() as session:
                connection = session.connection()
                _alone(connection)
                upgrade(connection, SCHEMA)
                if session.scalars(select(RegistryInfoRow)).one_or_none() is None:
                    session.add(RegistryInfoRow(format_version=FORMAT_VERSION))
        except SchemaError as error:
            raise RegistryError(
                f"the tables of the registry are not what any version made ({error}); nothing was "
                "changed; put back its newest intact copy"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up all connections."""
        self._engine.dispose()

    def add_plan(self, plan: PlanRecord) -> None:
        """Remember a signed plan; the newest signature counts."""
        with self.session() as session:
            keep_plan(session, plan)

    def plan(self, plan_hash: str) -> PlanRecord:
        """A signed plan by its hash, or by an unambiguous beginning of it.

        Raises:
            RegistryError: there is none, or several.
        """
        with self.session() as session:
            found = session.scalars(
                select(PlanRow).where(PlanRow.hash.startswith(plan_hash, autoescape=True))
            ).all()
            if len(found) != 1:
                raise RegistryError(
                    f"{len(found)} signed plans begin with {plan_hash!r}, expected one; "
                    "sign it with `crafts-server plan sign`"
                )
            return _plan_record(found[0])

    def plans(self) -> list[PlanRecord]:
        """Every signed plan, oldest first."""
        with self.session() as session:
            rows = session.scalars(select(PlanRow).order_by(PlanRow.signed_at))
            return [_plan_record(row) for row in rows]

    def offered_plans(self) -> list[PlanRecord]:
        """What sites are shown: every signed plan, of sums only if its roster is fixed.

        Older programs kept plans of sums that they then refused.
        """
        with self.session() as session:
            fixed = set(session.scalars(select(RosterRow.plan_hash)))
        return [plan for plan in self.plans() if plan.hash in fixed or not plan.is_of_sums]

    def finished_plans(self) -> frozenset[str]:
        """Hashes of the plans whose run has come to its end."""
        query = select(RunRow.plan_hash).where(RunRow.status == RunStatus.FINISHED)
        with self.session() as session:
            return frozenset(session.scalars(query))

    def start_run(self, run_id: str, plan_hash: str) -> None:
        """Remember a new run."""
        with self.session() as session:
            session.add(
                RunRow(
                    run_id=run_id,
                    plan_hash=plan_hash,
                    status=RunStatus.RUNNING,
                    started_at=now(),
                )
            )

    def newest_run(self, plan_hash: str) -> str | None:
        """The run of this plan that was started last; None if there is none."""
        query = (
            select(RunRow.run_id)
            .where(RunRow.plan_hash == plan_hash)
            .order_by(RunRow.started_at.desc())
        )
        with self.session() as session:
            return session.scalars(query).first()

    def set_status(self, run_id: str, status: RunStatus) -> None:
        """Move a run to ``status``."""
        with self.session() as session:
            run = _run(session, run_id)
            run.status = status
            run.finished_at = now() if status is RunStatus.FINISHED else None

    def checkpoints(self, run_id: str) -> list[CheckpointRecord]:
        """Committed checkpoints in order."""
        query = (
            select(CheckpointRow)
            .where(CheckpointRow.run_id == run_id)
            .order_by(CheckpointRow.round)
        )
        with self.session() as session:
            return [
                CheckpointRecord(
                    round=row.round, manifest_hash=row.manifest_hash, state_hash=row.state_hash
                )
                for row in session.scalars(query)
            ]

    def record(
        self, run_id: str, checkpoint: CheckpointRecord, receipt: RoundReceipt | None
    ) -> None:
        """Index a committed checkpoint and its receipt in one transaction."""
        with self.session() as session:
            _run(session, run_id)
            session.add(
                CheckpointRow(
                    run_id=run_id,
                    round=checkpoint.round,
                    manifest_hash=checkpoint.manifest_hash,
                    state_hash=checkpoint.state_hash,
                    created_at=now(),
                )
            )
            if receipt is not None:
                session.add(_round_row(receipt))
                session.add_all(_participations(receipt))
                _remember_sites(session, [site.site for site in receipt.sites])

    def runs(self) -> list[RunSummary]:
        """All runs, newest first."""
        return self._summaries(_RUNS.order_by(RunRow.started_at.desc()))

    def run(self, run_id: str) -> RunSummary:
        """One run.

        Raises:
            UnknownRunError: there is none of this name.
        """
        found = self._summaries(_RUNS.where(RunRow.run_id == run_id))
        if not found:
            raise UnknownRunError(f"no run {run_id}; see `crafts-server runs list`")
        return found[0]

    def _summaries(self, query: Select[RunRow, str, str, int]) -> list[RunSummary]:
        with self.session() as session:
            return [
                RunSummary(
                    run_id=run.run_id,
                    study=study,
                    plan_hash=run.plan_hash,
                    status=RunStatus(run.status),
                    rounds=num_rounds,
                    planned_rounds=_planned_rounds(plan),
                    started_at=run.started_at.replace(tzinfo=UTC),
                    finished_at=run.finished_at and run.finished_at.replace(tzinfo=UTC),
                )
                for run, study, plan, num_rounds in session.execute(query)
            ]

    def sites(self) -> list[str]:
        """Names of all sites whose updates were ever used."""
        with self.session() as session:
            return list(session.scalars(select(SiteRow.name).order_by(SiteRow.name)))

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction.

        Raises:
            RegistryError: the database refuses.
        """
        try:
            with Session(self._engine) as session, session.begin():
                yield session
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            advice = _ADVICE.get(getattr(cause, "sqlstate", None) or "", "")
            raise RegistryError(
                f"cannot use the registry at {self._engine.url.render_as_string()}: "
                f"{str(cause).splitlines()[0]}{advice}"
            ) from error


def keep_plan(session: Session, plan: PlanRecord) -> None:
    """A plan that is signed now; one that was before is no younger, each attempt signs it anew."""
    known = session.get(PlanRow, plan.hash)
    session.merge(
        PlanRow(
            hash=plan.hash,
            study=plan.study,
            json=plan.json,
            signature=plan.signature,
            public_key=plan.public_key,
            signed_at=now() if known is None else known.signed_at,
        )
    )


def _plan_record(row: PlanRow) -> PlanRecord:
    return PlanRecord(
        hash=row.hash,
        study=row.study,
        json=row.json,
        signature=row.signature,
        public_key=row.public_key,
    )


def _run(session: Session, run_id: str) -> RunRow:
    run = session.get(RunRow, run_id)
    if run is None:
        raise UnknownRunError(f"no run {run_id}; see `crafts-server runs list`")
    return run


def _round_row(receipt: RoundReceipt) -> RoundRow:
    return RoundRow(
        run_id=receipt.run_id,
        round=receipt.round,
        stage=receipt.stage,
        factor=receipt.factor,
        margin_before=receipt.margin_before,
        margin_after=receipt.margin_after,
        step_scale=receipt.step_scale,
        step_norm=receipt.step_norm,
        trust_norm=receipt.trust_norm,
        bytes_down=receipt.bytes_down,
        bytes_up=receipt.bytes_up,
        seconds=receipt.seconds,
        finished_at=receipt.finished_at.astimezone(UTC).replace(tzinfo=None),
    )


def _participations(receipt: RoundReceipt) -> Iterator[ParticipationRow]:
    where: dict[str, Any] = {"run_id": receipt.run_id, "round": receipt.round}
    for site in receipt.sites:
        yield ParticipationRow(
            **where,
            site=site.site,
            outcome="used",
            weight=site.weight,
            gain=site.gain,
            update_norm=site.update_norm,
            noise_multiplier=site.noise_multiplier,
            steps=site.steps,
            sample_rate=site.sample_rate,
            declared_patients=site.declared_patients,
        )
    for refusal in receipt.refused:
        yield ParticipationRow(**where, site=refusal.site, outcome="refused", reason=refusal.reason)
    for name in receipt.missing:
        yield ParticipationRow(**where, site=name, outcome="missing")


def _remember_sites(session: Session, names: Sequence[str]) -> None:
    for name in names:
        if session.get(SiteRow, name) is None:
            session.add(SiteRow(name=name, first_seen_at=now()))


def _alone(connection: Connection) -> None:
    """Wait until no other program changes tables, and keep others waiting until the end."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # the driver's own does not cover tables
    elif connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_UPGRADE_LOCK)))


def _postgresql_options(url: str) -> dict[str, str | int]:
    """PostgreSQL waits for a lock, and for a server, for ever, unless it is told.

    A cluster without an encoding (SQL_ASCII) would answer in bytes.
    """
    given = make_url(url)
    if given.get_backend_name() != "postgresql":
        return {}
    wanted: dict[str, str | int] = {
        "options": f"-c lock_timeout={round(_PATIENCE_S * 1000)}",
        "connect_timeout": max(1, round(_PATIENCE_S)),
        "client_encoding": "utf8",
    }
    return {name: value for name, value in wanted.items() if name not in given.query}


def _configure_sqlite(connection: Any, _record: Any) -> None:
    """Committed means on disk; references are checked; a busy file is waited for."""
    connection.execute(
        f"PRAGMA busy_timeout = {round(_PATIENCE_S * 1000)}"
    )  # first: the next line reads the file
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
