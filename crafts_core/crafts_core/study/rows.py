"""Tables of a study file. Times are UTC; columns hold them without a zone."""

from datetime import datetime

from sqlalchemy import ForeignKey, Index, LargeBinary, MetaData, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

FORMAT_VERSION = 1


class Base(DeclarativeBase):
    """All tables of one study."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        }
    )


class StudyRow(Base):
    """One row: what the study is and asks."""

    __tablename__ = "study"

    format_version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(120))
    token: Mapped[str] = mapped_column(String(64))
    seed: Mapped[int]
    asks_ratings: Mapped[bool]
    asks_types: Mapped[bool]
    created_at: Mapped[datetime]


class ImageRow(Base):
    """One image and the truth about it."""

    __tablename__ = "image"

    id: Mapped[int] = mapped_column(primary_key=True)
    is_synthetic: Mapped[bool]
    is_calibration: Mapped[bool]
    type: Mapped[str | None] = mapped_column(String(64))
    source: Mapped[str]
    """Its file, relative to the folder that it came from."""
    png: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)


class ReaderRow(Base):
    """A reader; the code is all that opens their part."""

    __tablename__ = "reader"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    code: Mapped[str] = mapped_column(String(16), unique=True)


class TrialRow(Base):
    """One image at one place of a reader's order. Its random id is all that a page says of it."""

    __tablename__ = "trial"
    __table_args__ = (UniqueConstraint("reader", "place"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    reader: Mapped[int] = mapped_column(ForeignKey("reader.number"))
    place: Mapped[int]
    image_id: Mapped[int] = mapped_column(ForeignKey("image.id"))
    is_repeat: Mapped[bool]


class AnswerRow(Base):
    """What a reader said. An answer that was taken back stays, marked."""

    __tablename__ = "answer"

    id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[str] = mapped_column(ForeignKey("trial.id"))
    score: Mapped[int]
    nuclei: Mapped[int | None]
    architecture: Mapped[int | None]
    stain: Mapped[int | None]
    artefacts: Mapped[int | None]
    type_guess: Mapped[str | None] = mapped_column(String(64))
    seconds: Mapped[float]
    answered_at: Mapped[datetime]
    withdrawn_at: Mapped[datetime | None]


Index(
    "uq_answer_standing",
    AnswerRow.trial_id,
    unique=True,
    sqlite_where=AnswerRow.withdrawn_at.is_(None),
)
"""At most one answer of a trial counts, whatever two windows send at once."""
