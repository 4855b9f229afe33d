"""What left this site and when, by its own ledger and the outbox' records."""

from collections.abc import Sequence
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from crafts_client.outbox import REFUSED_RELEASE, ReleaseRecord
from crafts_privacy.ledger_rows import EntryKind, LedgerEntry


class Transmission(BaseModel):
    """One update that left, and what paid for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    committed_at: datetime
    plan_hash: str
    run_id: str
    round: int
    stage: str
    hash: str
    num_bytes: int | None
    num_tensors: int | None
    noise_multiplier: float
    sample_rate: float
    steps: int
    noise: str
    """The class in ``crafts_privacy.noise`` that drew it."""


def transmissions_of(
    entries: Sequence[LedgerEntry], records: dict[str, ReleaseRecord]
) -> tuple[Transmission, ...]:
    """Commits of a sealed file; a refused release committed a constant and sent nothing."""
    found = []
    for entry in entries:
        if entry.kind is not EntryKind.COMMITTED or entry.release_hash == REFUSED_RELEASE:
            continue
        record = records.get(entry.release_hash)
        found.append(
            Transmission(
                committed_at=entry.recorded_at,
                plan_hash=entry.plan_hash,
                run_id=entry.run_id,
                round=entry.round,
                stage=entry.stage,
                hash=entry.release_hash,
                num_bytes=None if record is None else record.num_bytes,
                num_tensors=None if record is None else len(record.tensors),
                noise_multiplier=entry.noise_multiplier,
                sample_rate=entry.sample_rate,
                steps=entry.steps,
                noise="not recorded" if record is None else record.noise,
            )
        )
    return tuple(found)
