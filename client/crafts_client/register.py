"""Who is in which cohort, and who withdrew: ``patients.jsonl`` in the site home.

The ledger accounts for cohorts, so what it promises a patient holds only if that patient is in one
cohort for good. The register keeps pseudonyms (never a name), is appended to and never shortened,
and is asked before every round. It stays at the site.

A line that is lost could bring a patient back who withdrew, so each line has the hash of the one
before, and ``patients.jsonl.head`` knows the newest. Only what a crash tore, a last line without
its end, is passed over: whoever wrote it was not told yes. Everything else that is not as it was
written stops the site. Not found from inside: both files put back from one older copy.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from crafts_client.errors import HomeError
from crafts_client.home import LEDGER_NAME
from crafts_core.chained_log import START, Chain, ChainedLog
from crafts_core.durable import exclusive_lock, write_file
from crafts_privacy.witness import head_path, read_head

_RESTORE = "put back the newest copy of it and of its .head file; until then nobody is read"
_LOCK_S = 30.0


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    patient: str
    cohort: str
    withdrawn: bool
    at: datetime
    previous: str
    hash: str = ""

    def computed_hash(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"hash"}).encode()).hexdigest()


class PatientRegister:
    """The register of one home. Safe to use from several processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = ChainedLog(path, _parsed)
        self._head_path = path.with_name(path.name + ".head")

    def begin(self) -> None:
        """Say that nobody is known yet, where no register was ever begun."""
        with self._locked():
            if self._head() is None and not self._has_bytes():
                self._write_head(START)

    def enrol(self, patients: Iterable[str], cohort: str, *, patience_s: float = _LOCK_S) -> None:
        """Note patients who are new here; those who are known must be in the same cohort.

        Args:
            patients: Pseudonyms.
            cohort: Theirs.
            patience_s: How long to wait where others write.

        Raises:
            HomeError: a patient belongs to another cohort, and nothing is noted; or the register
                is not what was written.
        """
        wanted = list(dict.fromkeys(patients))
        with self._locked(patience_s):
            lines = self._lines()
            known = _newest(lines)
            _refuse_elsewhere(known, wanted, cohort)
            self._append(lines, [(p, cohort, False) for p in wanted if p not in known])

    def cohorts(self) -> dict[str, str]:
        """The cohort of everybody who was ever here.

        Raises:
            HomeError: the register is not what was written.
        """
        return {patient: line.cohort for patient, line in _newest(self._lines()).items()}

    def withdraw(self, patient: str, *, alike: str | None = None) -> None:
        """From the next round on, no tile of this patient is read. Again is fine.

        Args:
            patient: The pseudonym.
            alike: What all spellings of the name have in common (``Salt.alike_id``), so that the
                patient does not come back under another one.

        Raises:
            HomeError: the patient was never here, or the register is not what was written.
        """
        with self._locked():
            lines = self._lines()
            known = _newest(lines).get(patient)
            if known is None:
                raise HomeError("no such patient here; name the patient as in the table of ingest")
            gone = {name for name, line in _newest(lines).items() if line.withdrawn}
            names = [name for name in (patient, alike) if name is not None and name not in gone]
            self._append(lines, [(name, known.cohort, True) for name in names])

    @property
    def withdrawn(self) -> frozenset[str]:
        """Pseudonyms that must not be trained on.

        Raises:
            HomeError: the register is not what was written; nobody may be trained on.
        """
        return frozenset(p for p, line in _newest(self._lines()).items() if line.withdrawn)

    def _lines(self) -> list[_Line]:
        """Every line, checked from the first to the one that the head names, and those after it."""
        head = self._head()  # before the lines: a writer moves it after them
        chain = self._chain()
        lines = list(chain.lines)
        if chain.broken_at is not None:
            raise HomeError(
                f"{self._path}: line {chain.broken_at} is not what was written; {_RESTORE}"
            )
        if head is None and not lines:
            self._refuse_to_begin_anew()
        elif head not in (START, *(line.hash for line in lines)):
            raise HomeError(
                f"{self._path} and its .head file do not belong together, or lines are missing; "
                f"{_RESTORE}"
            )
        return lines

    def _chain(self) -> Chain[_Line]:
        try:
            return self._log.read()
        except OSError as error:
            raise HomeError(f"cannot read {self._path}: {error.strerror}") from error

    def _head(self) -> str | None:
        """The newest line's hash when the last writer was done."""
        try:
            return self._head_path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise HomeError(f"cannot read {self._head_path}; {_RESTORE}") from error

    def _refuse_to_begin_anew(self) -> None:
        """Where the ledger beside has entries, patients were known and some may have withdrawn."""
        witness = read_head(head_path(self._path.with_name(LEDGER_NAME)))
        if witness is not None and witness.sequence > 0:
            raise HomeError(
                f"{self._path} is missing, but patients were trained on here; {_RESTORE}"
            )

    def _append(self, lines: Sequence[_Line], entries: list[tuple[str, str, bool]]) -> None:
        if not entries:
            return
        now, added = datetime.now(UTC), list(lines)
        for patient, cohort, withdrawn in entries:
            line = _Line(
                number=len(added) + 1,
                patient=patient,
                cohort=cohort,
                withdrawn=withdrawn,
                at=now,
                previous=added[-1].hash if added else START,
            )
            added.append(line.model_copy(update={"hash": line.computed_hash()}))
        if not lines:  # from here on a register that is missing is missed
            self._write_head(START)
        self._log.append([line.model_dump_json() for line in added[len(lines) :]], mode=0o600)
        self._write_head(added[-1].hash)

    def _has_bytes(self) -> bool:
        return self._path.exists() and self._path.stat().st_size > 0

    def _write_head(self, head: str) -> None:
        write_file(self._head_path, head + "\n", mode=0o600)

    def _locked(self, patience_s: float = _LOCK_S) -> AbstractContextManager[None]:
        held = HomeError(f"{self._path} is in use; try again")
        lock_path = self._path.with_name(self._path.name + ".lock")
        return exclusive_lock(lock_path, held=held, timeout_s=patience_s)


def _newest(lines: Iterable[_Line]) -> dict[str, _Line]:
    """The last line of each patient."""
    return {line.patient: line for line in lines}


def _refuse_elsewhere(known: dict[str, _Line], patients: Iterable[str], cohort: str) -> None:
    elsewhere = [p for p in set(patients) if p in known and known[p].cohort != cohort]
    if elsewhere:
        other = known[elsewhere[0]].cohort
        raise HomeError(
            f"{len(elsewhere)} patients of cohort {cohort} belong to cohort {other}, whose "
            f"budget they share for life; set cohort = {json.dumps(other)} in site.toml and "
            "ingest again"
        )


def _parsed(text: bytes) -> _Line | None:
    """The line, if its hash is of its content."""
    try:
        line = _Line.model_validate_json(text)
    except ValidationError:
        return None
    return line if line.hash == line.computed_hash() else None
