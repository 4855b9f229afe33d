"""Tables of the registry (design 5.7). Times are UTC; columns hold them without a zone."""

from datetime import UTC, datetime

from sqlalchemy import ForeignKey, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """All tables of one registry."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        }
    )


class RegistryInfoRow(Base):
    """One row: the schema's version."""

    __tablename__ = "registry_info"

    format_version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class SiteRow(Base):
    """A site that has sent a usable update."""

    __tablename__ = "site"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    first_seen_at: Mapped[datetime]


class InvitationRow(Base):
    """A site may enrol once; the newest invitation of a name counts."""

    __tablename__ = "invitation"

    site: Mapped[str] = mapped_column(String(63), primary_key=True)
    token_hash: Mapped[str] = mapped_column(String(64), unique=True)
    expires_at: Mapped[datetime]
    used: Mapped[bool]


class EnrolmentRow(Base):
    """The certificate and the Flower node that speak for a site."""

    __tablename__ = "enrolment"

    site: Mapped[str] = mapped_column(String(63), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    node_public_key: Mapped[str] = mapped_column(Text)
    enrolled_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class CohortSizeRow(Base):
    """How many patients a site counts as, by both sides' word."""

    __tablename__ = "cohort_size"

    site: Mapped[str] = mapped_column(String(63), primary_key=True)
    invited: Mapped[int | None]
    """By the newest invitation: the coordinator's word until the site enrols."""
    told: Mapped[int | None]
    """What the site said last."""
    agreed: Mapped[int | None]


class IdentityRow(Base):
    """The key that signs for a site in rosters to come."""

    __tablename__ = "identity"

    site: Mapped[str] = mapped_column(String(63), primary_key=True)
    public_key: Mapped[str] = mapped_column(String(64), unique=True)


class RosterRow(Base):
    """Who takes part in the sums of a plan."""

    __tablename__ = "roster"

    plan_hash: Mapped[str] = mapped_column(ForeignKey("plan.hash"), primary_key=True)
    json: Mapped[str] = mapped_column(Text)


class WitnessRow(Base):
    """The head of a site's ledger when it last said."""

    __tablename__ = "witness"

    site: Mapped[str] = mapped_column(String(63), primary_key=True)
    ledger: Mapped[str] = mapped_column(String(64), primary_key=True)
    entries: Mapped[int]
    head: Mapped[str] = mapped_column(String(64))
    seen_at: Mapped[datetime]


class SignedHeadRow(Base):
    """A head of a ledger, signed by its site, that a site (the same or another) has shown."""

    __tablename__ = "signed_head"

    holder: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    site: Mapped[str] = mapped_column(String(63), index=True)
    json: Mapped[str] = mapped_column(Text)


class PlanRow(Base):
    """A signed plan."""

    __tablename__ = "plan"

    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    study: Mapped[str] = mapped_column(String(63))
    json: Mapped[str] = mapped_column(Text)
    signature: Mapped[str] = mapped_column(String(128))
    public_key: Mapped[str] = mapped_column(String(64))
    signed_at: Mapped[datetime]


class RunRow(Base):
    """One execution of a plan, over as many processes as it took."""

    __tablename__ = "run"

    run_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    plan_hash: Mapped[str] = mapped_column(ForeignKey("plan.hash"), index=True)
    status: Mapped[str] = mapped_column(String(16))
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class RoundRow(Base):
    """One committed round."""

    __tablename__ = "round"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.run_id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    stage: Mapped[str] = mapped_column(String(32))
    factor: Mapped[str] = mapped_column(String(16))
    margin_before: Mapped[float]
    margin_after: Mapped[float]
    step_scale: Mapped[float]
    step_norm: Mapped[float]
    trust_norm: Mapped[float]
    bytes_down: Mapped[int]
    bytes_up: Mapped[int]
    seconds: Mapped[float]
    finished_at: Mapped[datetime]


class ParticipationRow(Base):
    """One site in one round: used with a weight, refused with a reason, or missing."""

    __tablename__ = "participation"

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("run.run_id"), index=True)
    round: Mapped[int]
    site: Mapped[str] = mapped_column(String(63))
    outcome: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text, default="")
    weight: Mapped[float | None]
    gain: Mapped[float | None]
    update_norm: Mapped[float | None]
    noise_multiplier: Mapped[float | None]
    steps: Mapped[int | None]
    sample_rate: Mapped[float | None]
    declared_patients: Mapped[int | None]


class AttemptRow(Base):
    """An attempt at a round's sum: its number is taken."""

    __tablename__ = "attempt"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.run_id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    void: Mapped[bool]
    """No member will be asked for it again."""


class AnnouncementRow(Base):
    """A set of sites that were, or are about to be, told that they are the members of a sum."""

    __tablename__ = "announcement"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.run_id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    part: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    json: Mapped[str] = mapped_column(Text)
    missing: Mapped[str | None] = mapped_column(Text)
    """JSON list of who did not deliver, once their time was up."""


class CheckpointRow(Base):
    """Where a round's checkpoint is, and its identity."""

    __tablename__ = "checkpoint"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.run_id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    manifest_hash: Mapped[str] = mapped_column(String(64))
    state_hash: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]


def now() -> datetime:
    """As columns hold it."""
    return datetime.now(UTC).replace(tzinfo=None)
