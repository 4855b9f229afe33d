"""The one file of a study: images, truth, orders and answers, in SQLite.

A page asks it for the reader's current image and gives it answers; nothing of it that a page may
ask says what an image is, except of a calibration image that was answered.
"""

import hmac
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sqlalchemy import URL, Select, create_engine, event, func, select
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError
from sqlalchemy.orm import Session

from crafts_core.study.presentation import Showing
from crafts_core.study.questions import ATTRIBUTES, Answer, Questions, StudyError
from crafts_core.study.records import Position, Reader, Reading, StudyImage, StudyInfo, Truth
from crafts_core.study.rows import (
    FORMAT_VERSION,
    AnswerRow,
    Base,
    ImageRow,
    ReaderRow,
    StudyRow,
    TrialRow,
)

_CODE_LETTERS = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"
"""None that is mistaken for another when read from paper."""
_CODE_LENGTH = 10


class FileBusyError(StudyError):
    """The file cannot be read or written now: a full disk, or somebody else's lock."""


class NotCurrentError(StudyError):
    """The trial is not the one that the reader is at: answered already, or never theirs."""


class StudyFile:
    """Short transactions on the tables of one file. ``close`` gives up the connections."""

    def __init__(self, path: Path) -> None:
        self._engine = create_engine(URL.create("sqlite", database=str(path)))
        event.listen(self._engine, "connect", _configure_sqlite)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a study that ``create`` made.

        Raises:
            StudyError: it is none, or of another version.
        """
        if not path.is_file():
            raise StudyError(f"there is no study {path}; `crafts study create` makes one")
        study = cls(path)
        try:
            with study._session() as session:
                version = session.scalars(select(StudyRow.format_version)).one_or_none()
        except (DatabaseError, StudyError) as error:
            study.close()
            raise StudyError(f"{path} is no study; `crafts study create` makes one") from error
        if version != FORMAT_VERSION:
            study.close()
            raise StudyError(
                f"{path} has format {version}, expected {FORMAT_VERSION}; use the version of "
                "crafts-federated that made it"
            )
        return study

    @classmethod
    def create(
        cls,
        path: Path,
        info: StudyInfo,
        images: Iterable[StudyImage],
        orders: Sequence[Sequence[Showing]],
    ) -> Self:
        """Write a new study; the file is there when all of it is, and its owner alone reads it.

        Args:
            path: The file to be.
            info: What it is.
            images: Taken one at a time; numbered as they come.
            orders: For each reader what is shown, by the images' numbers.

        Raises:
            FileExistsError: there is such a file; answers may be in it.
        """
        if path.exists():
            raise FileExistsError(17, "the file exists, and may hold answers", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.writing")
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600)
        study = cls(temporary)
        try:
            with study._session() as session:
                Base.metadata.create_all(session.connection())
                session.add(_study_row(info))
                for number, image in enumerate(images):
                    session.add(_image_row(number, image))
                    session.flush()
                    session.expunge_all()  # its pixels are in the file now
                _add_readers(session, orders)
        except BaseException:
            study.close()
            temporary.unlink()
            raise
        study.close()
        temporary.rename(path)
        return cls.open(path)

    def close(self) -> None:
        """Give up all connections."""
        self._engine.dispose()

    @property
    def info(self) -> StudyInfo:
        """What was fixed when the study was made."""
        with self._session() as session:
            row = session.scalars(select(StudyRow)).one()
            return StudyInfo(
                name=row.name,
                token=row.token,
                seed=row.seed,
                questions=Questions(ratings=row.asks_ratings, types=row.asks_types),
                created_at=row.created_at,
            )

    def readers(self) -> list[Reader]:
        """All readers, by number."""
        with self._session() as session:
            rows = session.scalars(select(ReaderRow).order_by(ReaderRow.number))
            return [Reader(number=row.number, code=row.code) for row in rows]

    def reader_with(self, code: str) -> Reader | None:
        """Whose code it is, if anybody's. Spaces, dashes and small letters do not matter."""
        given = "".join(code.split()).replace("-", "").upper().encode()
        found = [r for r in self.readers() if hmac.compare_digest(r.code.encode(), given)]
        return found[0] if found else None

    def position(self, reader: Reader) -> Position:
        """The first image of the reader's order without an answer, and how far that is."""
        with self._session() as session:
            total = session.scalar(_trials(reader, func.count()))
            done = session.scalar(_trials(reader, func.count()).where(_is_answered()))
            row = _current(session, reader)
            last = _last_answer(session, reader)
            return Position(
                done=done or 0,
                total=total or 0,
                trial=None if row is None else row[0].id,
                is_calibration=row is not None and row[1],
                can_undo=last is not None,
            )

    def picture(self, reader: Reader, trial: str) -> bytes:
        """The image that the reader is at; nobody looks back or ahead.

        Raises:
            NotCurrentError: the reader is at another.
        """
        with self._session() as session:
            row = _checked_current(session, reader, trial)
            found = session.scalars(select(ImageRow.png).where(ImageRow.id == row.image_id))
            return found.one()

    def record(self, reader: Reader, answer: Answer) -> Truth | None:
        """Keep an answer; it is on disk when this returns.

        Returns:
            What the image is if it is one of calibration.

        Raises:
            NotCurrentError: the answer is to another image than the reader is at.
            StudyError: it does not answer what is asked.
        """
        answer.check(self.info.questions)
        values = answer.model_dump(exclude={"trial"})
        try:
            with self._session() as session:
                row = _checked_current(session, reader, answer.trial)
                session.add(AnswerRow(trial_id=row.id, answered_at=_now(), **values))
                image = session.get_one(ImageRow, row.image_id)
                if not image.is_calibration:
                    return None
                return Truth(is_synthetic=image.is_synthetic, type=image.type)
        except IntegrityError as error:  # another window was quicker
            raise NotCurrentError("this image is answered already") from error

    def undo(self, reader: Reader) -> None:
        """Take back the reader's last answer, unless its image has told what it is.

        Raises:
            NotCurrentError: there is none to take back.
        """
        with self._session() as session:
            last = _last_answer(session, reader)
            if last is None:
                raise NotCurrentError("there is no answer to take back")
            last.withdrawn_at = _now()

    def readings(self) -> list[Reading]:
        """All answers that stand, by reader and place; calibration left out."""
        query = (
            select(TrialRow, ImageRow, AnswerRow)
            .join(ImageRow, ImageRow.id == TrialRow.image_id)
            .join(AnswerRow, AnswerRow.trial_id == TrialRow.id)
            .where(AnswerRow.withdrawn_at.is_(None), ImageRow.is_calibration.is_(False))
            .order_by(TrialRow.reader, TrialRow.place)
        )
        with self._session() as session:
            return [
                Reading(
                    reader=trial.reader,
                    place=trial.place,
                    image=image.id,
                    source=image.source,
                    is_synthetic=image.is_synthetic,
                    type=image.type,
                    is_repeat=trial.is_repeat,
                    score=answer.score,
                    type_guess=answer.type_guess,
                    seconds=answer.seconds,
                    answered_at=answer.answered_at,
                    **{name: getattr(answer, name) for name in ATTRIBUTES},
                )
                for trial, image, answer in session.execute(query)
            ]

    @contextmanager
    def _session(self) -> Iterator[Session]:
        try:
            with Session(self._engine) as session, session.begin():
                yield session
        except OperationalError as error:
            raise FileBusyError(f"{self._engine.url.database}: {error.orig}") from error


def new_token() -> str:
    """What a link must hold: 128 bits from entropy."""
    return secrets.token_urlsafe(16)


def _trials(reader: Reader, *columns: Any) -> Select[Any]:
    query = select(*columns).select_from(TrialRow)
    return query.where(TrialRow.reader == reader.number)


def _is_answered() -> Any:
    standing = select(AnswerRow.id).where(AnswerRow.withdrawn_at.is_(None))
    return standing.where(AnswerRow.trial_id == TrialRow.id).exists()


def _current(session: Session, reader: Reader) -> tuple[TrialRow, bool] | None:
    query = _trials(reader, TrialRow, ImageRow.is_calibration)
    query = query.join(ImageRow, ImageRow.id == TrialRow.image_id).where(~_is_answered())
    found = session.execute(query.order_by(TrialRow.place).limit(1)).one_or_none()
    return None if found is None else (found[0], found[1])


def _checked_current(session: Session, reader: Reader, trial: str) -> TrialRow:
    found = _current(session, reader)
    if found is None or not hmac.compare_digest(found[0].id.encode(), trial.encode()):
        raise NotCurrentError("this is not the image that you are at; load the page again")
    return found[0]


def _last_answer(session: Session, reader: Reader) -> AnswerRow | None:
    """The reader's newest answer, if it may be taken back: one step, not from image to image."""
    query = (
        select(AnswerRow, ImageRow.is_calibration)
        .join(TrialRow, TrialRow.id == AnswerRow.trial_id)
        .join(ImageRow, ImageRow.id == TrialRow.image_id)
        .where(TrialRow.reader == reader.number)
        .order_by(AnswerRow.id.desc())
        .limit(1)
    )
    found = session.execute(query).one_or_none()
    if found is None or found[1] or found[0].withdrawn_at is not None:
        return None
    answer: AnswerRow = found[0]
    return answer


def _study_row(info: StudyInfo) -> StudyRow:
    return StudyRow(
        format_version=FORMAT_VERSION,
        name=info.name,
        token=info.token,
        seed=info.seed,
        asks_ratings=info.questions.ratings,
        asks_types=info.questions.types,
        created_at=info.created_at,
    )


def _image_row(number: int, image: StudyImage) -> ImageRow:
    return ImageRow(
        id=number,
        is_synthetic=image.is_synthetic,
        is_calibration=image.is_calibration,
        type=image.type,
        source=image.source,
        png=image.png,
    )


def _add_readers(session: Session, orders: Sequence[Sequence[Showing]]) -> None:
    for number, order in enumerate(orders, start=1):
        code = "".join(secrets.choice(_CODE_LETTERS) for _ in range(_CODE_LENGTH))
        session.add(ReaderRow(number=number, code=code))
        session.flush()
        session.add_all(
            TrialRow(
                id=secrets.token_hex(12),
                reader=number,
                place=place,
                image_id=showing.image,
                is_repeat=showing.is_repeat,
            )
            for place, showing in enumerate(order)
        )


def _configure_sqlite(connection: Any, _record: Any) -> None:
    """Committed means on disk; references are checked; a busy file is waited for."""
    connection.execute("PRAGMA busy_timeout = 20000")  # first: the next line reads the file
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
