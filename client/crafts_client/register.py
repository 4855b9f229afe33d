"""Who is in which cohort, and who withdrew: ``patients.jsonl`` in the site home.

The ledger accounts for cohorts, so what it promises a patient holds only if that patient is in one
cohort for good. The register keeps pseudonyms (never a name), is appended to and never shortened,
and is asked before every round. It stays at the site.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from crafts_client.errors import HomeError
from crafts_core.durable import append_line


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    patient: str
    cohort: str
    withdrawn: bool
    at: datetime


class PatientRegister:
    """The register of one home."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def enrol(self, patients: Iterable[str], cohort: str) -> None:
        """Note patients who are new here; those who are known must be in the same cohort.

        Raises:
            HomeError: a patient belongs to another cohort; nothing is noted.
        """
        wanted = list(dict.fromkeys(patients))
        self.refuse_elsewhere(wanted, cohort)
        known = self._read()
        self._append([(p, cohort, False) for p in wanted if p not in known])

    def refuse_elsewhere(self, patients: Iterable[str], cohort: str) -> None:
        """Check that nobody of these is known under another cohort.

        Raises:
            HomeError: somebody is.
        """
        known = self._read()
        elsewhere = [p for p in set(patients) if p in known and known[p].cohort != cohort]
        if elsewhere:
            other = known[elsewhere[0]].cohort
            raise HomeError(
                f"{len(elsewhere)} patients of cohort {cohort} belong to cohort {other}, whose "
                f"budget they share for life; set cohort = {json.dumps(other)} in site.toml and "
                "ingest again"
            )

    def withdraw(self, patient: str) -> None:
        """From the next round on, no tile of this patient is read. Again is fine.

        Raises:
            HomeError: the patient was never here.
        """
        known = self._read().get(patient)
        if known is None:
            raise HomeError("no such patient here; name the patient as in the table of ingest")
        if not known.withdrawn:
            self._append([(patient, known.cohort, True)])

    @property
    def withdrawn(self) -> frozenset[str]:
        """Pseudonyms that must not be trained on."""
        return frozenset(p for p, line in self._read().items() if line.withdrawn)

    def _read(self) -> dict[str, _Line]:
        """The last line of each patient."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        found = {}
        for text in lines:
            with suppress(ValidationError):  # torn by a crash: whoever wrote it was not told yes
                line = _Line.model_validate_json(text)
                found[line.patient] = line
        return found

    def _append(self, entries: list[tuple[str, str, bool]]) -> None:
        now = datetime.now(UTC)
        lines = [
            _Line(patient=patient, cohort=cohort, withdrawn=withdrawn, at=now).model_dump_json()
            for patient, cohort, withdrawn in entries
        ]
        if lines:
            append_line(self._path, "\n".join(lines), mode=0o600)
