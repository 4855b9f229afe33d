"""What sums left at the sites, where the coordinator has no say: in their outboxes and ledgers.

Of each attempt at most one vector of a site was ever sealed, the members' vectors are the sum that
the receipt tells of, those of an attempt that lacks a member are nothing that anybody could read,
and every vector was charged.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from safetensors.numpy import load as load_tensors

from crafts_client.home import SiteHome
from crafts_core.array_bytes import PACKED
from crafts_core.exchange import RoundRequest
from crafts_core.plan_sections import PrivacyConfig
from crafts_privacy.clipping import grid_step
from crafts_privacy.ledger import EntryKind, Ledger
from crafts_privacy.secure_aggregation.masking import Group
from crafts_server.receipts import RoundReceipt
from crafts_simulations.faults.case import expect
from crafts_simulations.small_study import COHORT, SmallStudy

_ROUNDS_SEALED = 2
"""An outbox forgets what is older."""
_HIDDEN = 20.0
"""Times the largest norm that a sum may have: masks fill all 32 bits, so what they still hide is
hundreds of times longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedVector:
    """A masked vector as it lies at a site."""

    site: str
    round: int
    attempt: int
    hash: str
    members_hash: str
    vector_D: Group


def sealed_vectors(study: SmallStudy) -> Iterator[SealedVector]:
    """All vectors of all sites that their outboxes still hold."""
    for name, path in study.sites.items():
        for file in SiteHome.open(path).outbox_path.glob("*.safetensors"):
            content = file.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            seal = json.loads(header["__metadata__"]["seal"])
            request = RoundRequest.model_validate(seal["request"])
            yield SealedVector(
                site=name,
                round=request.round,
                attempt=request.attempt,
                hash=sha256(content).hexdigest(),
                members_hash=seal["reply"]["members_hash"],
                vector_D=load_tensors(content)[PACKED].view(np.uint32),
            )


def check_sums(receipts: Sequence[RoundReceipt], study: SmallStudy) -> None:
    """What receipts tell of sums is what lies at the sites, and was charged there.

    Raises:
        ProcessError: it is not.
    """
    for receipt in receipts:
        _check_read(receipt, study)
    _check_charges(receipts, study)


def _check_read(receipt: RoundReceipt, study: SmallStudy) -> None:
    """What was read is what exactly the members sealed; what lacks a member is unreadable."""
    is_kept = receipt.round > study.plan.num_rounds - _ROUNDS_SEALED
    sealed = [each for each in sealed_vectors(study) if each.round == receipt.round]
    for told in receipt.sums if is_kept else ():
        of_it = [e for e in sealed if e.attempt == told.attempt and e.site in told.members]
        where = f"round {receipt.round}, attempt {told.attempt}"
        delivered = sorted(set(told.members) - set(told.missing))
        names = sorted(each.site for each in of_it)
        expect(set(delivered) <= set(names), f"{where}: {delivered} delivered, sealed: {names}")
        expect(len(set(names)) == len(names), f"{where}: two vectors of one site")
        expect(len({each.members_hash for each in of_it}) <= 1, f"{where}: announced twice")
        if told.missing and not delivered:
            continue
        kept = [each.vector_D for each in of_it if each.site in delivered]
        norm = _norm(kept, study.plan.privacy)
        if told.missing:
            longest = receipt.sums[-1].highest
            assert longest is not None
            expect(norm > _HIDDEN * longest, f"{where}: a part of a sum has norm {norm:.3g}")
        else:
            told_norm = told.norm or 0.0
            expect(
                abs(norm - told_norm) <= 1e-6 * norm,
                f"{where}: the members sealed {norm:.6g}, the coordinator read {told_norm:.6g}",
            )


def _norm(vectors: Sequence[Group], privacy: PrivacyConfig) -> float:
    """Of their sum, in units of max_grad_norm, by nothing of the product's own."""
    assert privacy.sum_grid_bits is not None
    total_D = np.sum(np.stack(vectors), axis=0, dtype=np.uint32).view(np.int32)
    step = grid_step(privacy.max_grad_norm, privacy.sum_grid_bits)
    return float(np.linalg.norm(total_D.astype(np.float64))) * step / privacy.max_grad_norm


def _check_charges(receipts: Sequence[RoundReceipt], study: SmallStudy) -> None:
    """Every vector that was sealed or delivered was charged, and no attempt twice."""
    sealed = list(sealed_vectors(study))
    for name, path in study.sites.items():
        ledger = Ledger(SiteHome.open(path).ledger_path)
        entries = ledger.entries()
        committed = [entry for entry in entries if entry.kind is EntryKind.COMMITTED]
        unknown = {each.hash for each in sealed if each.site == name} - {
            entry.release_hash for entry in committed
        }
        expect(not unknown, f"{name} sealed {len(unknown)} vectors that its ledger lacks")
        of_round = Counter(entry.round for entry in committed)
        for receipt in receipts:
            delivered = sum(name in set(s.members) - set(s.missing) for s in receipt.sums)
            expect(
                delivered <= of_round[receipt.round],
                f"{name}, round {receipt.round}: {delivered} delivered, "
                f"{of_round[receipt.round]} charged",
            )
        charged, attempts = len(ledger.events(COHORT)), sum(r.sums[-1].attempt for r in receipts)
        expect(charged <= attempts, f"{name} was charged {charged} times in {attempts} attempts")
