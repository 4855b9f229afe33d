"""An audit of sums over sites: hospitals that nobody is, through the code that answers.

Each virtual site is a ``SiteSums`` as the installed one is, with keys of its own and a sum over
nobody, and a coordinator that is the audit itself. It asks what would be seen if a share were
missing or too small, a mask left out or used again, or an announcement believed that must not be.
What is charged is not asked here: the ledger's own tests and kills are about that.

Letters: A attempts, M members, D coordinates.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy import stats

from crafts_client.errors import NotReadyError
from crafts_client.outbox import Outbox, Release
from crafts_client.policy import Policy
from crafts_client.sums import SiteSums
from crafts_core.array_bytes import PACKED
from crafts_core.exchange import Announcement, ReadyReply, RoundRequest
from crafts_core.plan import Plan
from crafts_core.roster import Roster
from crafts_privacy import signing
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.audit_statistics import FALSE_ALARM, Vector, p_fresh, p_scale, p_shape
from crafts_privacy.clipping import grid_step
from crafts_privacy.held_sum import HeldSum
from crafts_privacy.ledger import Reservation
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import NoiseSource
from crafts_privacy.secure_aggregation.fixed_point import from_group
from crafts_privacy.secure_aggregation.masking import Group, MaskKey, add_masks_
from crafts_privacy.secure_aggregation.members import MembersError, announce, verify_members

_NAMES = ("aarau", "berlin", "coburg", "dresden", "erfurt")
_COLLUDING, _ATTEMPTS, _NUM_VALUES = 2, 4, 4096
_NOISE, _BOUND, _BITS = 3.0, 0.7, 18
_LEAST = 0.01
"""Share that a sum was charged with: so small that it mends none of what is looked for."""
_PLAN = {
    "study": {"name": "audit", "foundation": "0" * 64, "seed": 0},
    "adapter": {"kind": "lora"},
    "stage": [{"name": "pretraining", "rounds": 1, "local_steps": 1, "learning_rate": 1.0}],
    "privacy": {
        "mechanism": "patient_dp",
        "target_epsilon": 1.0,
        "delta": 1e-3,
        "max_grad_norm": _BOUND,
        "sample_rate": 0.5,
        "tiles_per_patient": 1,
        "draws_per_tile": 1,
        "trust": "distributed",
        "colluding_sites": _COLLUDING,
        "sum_grid_bits": _BITS,
    },
    "aggregation": {"rule": "uniform", "min_sites": 4, "secure_aggregation": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SumCheck:
    """One question to the code of sums."""

    name: str
    question: str
    passed: bool
    found: str


class _VirtualSite:
    """Keys, a place for sealed vectors, and a sum over nobody."""

    def __init__(self, name: str, folder: Path, noise: NoiseSource) -> None:
        self.name = name
        self.identity = Ed25519PrivateKey.generate()
        self._noise = noise
        self._sums = SiteSums(Outbox(folder / name), type(noise).__name__)

    def ready(self, request: RoundRequest, mechanism: Mechanism) -> ReadyReply:
        unit = _BOUND / grid_step(_BOUND, _BITS)
        held = HeldSum(torch.zeros(_NUM_VALUES, dtype=torch.float64), self._noise, sensitivity=unit)
        reservation = Reservation(
            sequence=1,
            entry_hash="0" * 64,
            cohort="audit",
            plan_hash=request.plan_hash,
            run_id=request.run_id,
            round=request.round,
            stage="pretraining",
            event=PrivacyEvent(noise_multiplier=_NOISE, sample_rate=0.5, steps=1),
            request_hash=request.hash,
            own_noise_multiplier=_LEAST,
        )
        return self._sums.hold(
            request,
            held,
            reservation,
            mechanism=mechanism,
            trained={"values": torch.zeros(_NUM_VALUES)},
            identity=self.identity,
            site=self.name,
            declared_patients=30,
            keep_s=3600.0,
        )

    def add(self, request: RoundRequest, announcement: Announcement, study: "_Study") -> Release:
        release, _ = self._sums.release(
            request, announcement, plan=study.plan, policy=study.policy, roster=study.roster
        )
        return release


class _Study:
    """A federation of virtual sites."""

    def __init__(self, folder: Path, policy: Policy, noise: NoiseSource) -> None:
        self.plan = Plan.parse(_PLAN)
        # Of this site's own policy what changes a vector, with as few members as there are here.
        self.policy = policy.model_copy(update={"min_members": 3, "peers": {}})
        self.sites = {name: _VirtualSite(name, folder, noise) for name in _NAMES}
        self.roster = Roster.of(
            self.plan.hash,
            dict.fromkeys(_NAMES, 30),
            {name: signing.public_key_of(site.identity) for name, site in self.sites.items()},
        )
        self.mechanism = Mechanism(
            noise_multiplier=_NOISE, max_grad_norm=_BOUND, sample_rate=0.5, expected_patients=15.0
        )

    def request(self, attempt: int) -> RoundRequest:
        return RoundRequest(
            run_id="audit",
            plan_hash=self.plan.hash,
            round=1,
            stage_index=0,
            factor="second",
            checkpoint_hash="0" * 64,
            stage_start_hash="0" * 64,
            attempt=attempt,
        )

    def ready(self, attempt: int) -> list[ReadyReply]:
        request = self.request(attempt)
        return [site.ready(request, self.mechanism) for site in self.sites.values()]

    def attempt(self, attempt: int) -> tuple[list[ReadyReply], list[Group]]:
        """What a coordinator gets of an honest attempt: words and vectors."""
        request, words = self.request(attempt), self.ready(attempt)
        announcement = announce(words)
        releases = [site.add(request, announcement, self) for site in self.sites.values()]
        return words, [each.delta[PACKED].numpy().view(np.uint32) for each in releases]


def audit_sums(policy: Policy, noise: NoiseSource) -> tuple[SumCheck, ...]:
    """Audit the sums of a site. Needs no patient, no network and no budget.

    Args:
        policy: Of the site.
        noise: Where it draws its shares from.
    """
    with tempfile.TemporaryDirectory(prefix="crafts-sums-") as folder:
        study = _Study(Path(folder), policy, noise)
        attempts = [study.attempt(number) for number in range(1, _ATTEMPTS + 1)]
        checks = [*_noise_checks(study, [vectors for _, vectors in attempts])]
        checks += _mask_checks([vectors for _, vectors in attempts])
        checks.append(_members_are_in_every_mask(study))
        checks.append(_keys_are_fresh([words for words, _ in attempts]))
        checks.append(_lies_are_refused(study))
        checks.append(_sums_leave_once(study))
    return tuple(checks)


def _noise_checks(study: _Study, vectors_AM: list[list[Group]]) -> Iterator[SumCheck]:
    """Of opened sums over nobody, which are noise and nothing else."""
    num_honest = len(_NAMES) - _COLLUDING
    own = max(_NOISE / num_honest**0.5, study.policy.min_own_noise_multiplier)
    std = own * len(_NAMES) ** 0.5 * _BOUND / grid_step(_BOUND, _BITS)
    opened_AD = np.stack([_opened(vectors) for vectors in vectors_AM]) / std
    of_each = f"of {_ATTEMPTS} sums over {len(_NAMES)} sites, {_COLLUDING} of them not counted on"
    questions: tuple[tuple[str, str, Callable[[Vector], float]], ...] = (
        ("noise", "has an opened sum the noise of all its shares?", p_scale),
        ("shape", "is it Gaussian?", p_shape),
        ("fresh", "is it drawn anew in every attempt?", p_fresh),
    )
    for name, question, p_value in questions:
        value = p_value(opened_AD)
        yield SumCheck(
            name=name,
            question=question,
            passed=value > FALSE_ALARM,
            found=f"p = {value:.2g}, {of_each}",
        )


def _mask_checks(vectors_AM: list[list[Group]]) -> Iterator[SumCheck]:
    """What a coordinator sees of fewer than all members must be uniform; all are the control."""
    alone = min(_p_uniform(vector) for vectors in vectors_AM for vector in vectors)
    short = min(
        _p_uniform(_added(vectors) - left_out) for vectors in vectors_AM for left_out in vectors
    )
    control = max(_p_uniform(_added(vectors)) for vectors in vectors_AM)
    for name, question, value in (
        ("one vector", "does a member's vector alone tell nothing?", alone),
        ("all but one", "does a sum that lacks one member tell nothing?", short),
    ):
        yield SumCheck(
            name=name,
            question=question,
            passed=value > FALSE_ALARM > control,
            found=f"p = {value:.2g} at least; of whole sums {control:.2g} at most",
        )


def _members_are_in_every_mask(study: _Study) -> SumCheck:
    """One key under two announcements: two unrelated masks."""
    private = X25519PrivateKey.generate()
    words = study.ready(_ATTEMPTS + 1)
    vectors = []
    for members in (words, words[:-1]):
        verified = verify_members(announce(members), study.roster, words[0], min_members=3)
        vector_D: Group = np.zeros(_NUM_VALUES, dtype=np.uint32)
        add_masks_(vector_D, MaskKey(private).pair_keys(words[0].site, verified)[:1])
        vectors.append(vector_D)
    value = _p_uniform(vectors[0] - vectors[1])
    return SumCheck(
        name="members",
        question="does every mask hang on the whole announcement?",
        passed=value > FALSE_ALARM,
        found=f"p = {value:.2g} that masks of one pair under two announcements are unrelated",
    )


def _keys_are_fresh(words_AM: list[list[ReadyReply]]) -> SumCheck:
    keys = [word.key for words in words_AM for word in words]
    return SumCheck(
        name="keys",
        question="is every key of a mask used for one attempt?",
        passed=len(set(keys)) == len(keys),
        found=f"{len(set(keys))} keys for {len(keys)} words",
    )


def _lies_are_refused(study: _Study) -> SumCheck:
    """A stranger, too few, another's key, another request, and the own word replaced."""
    attempt = _ATTEMPTS + 2
    request, words = study.request(attempt), study.ready(attempt)
    stranger = words[1].model_copy(update={"site": "stranger"})
    swapped = words[1].model_copy(update={"key": MaskKey().public_key})
    foreign = words[1].model_copy(update={"request_hash": "1" * 64})
    own = words[0].model_copy(update={"key": MaskKey().public_key})
    lies = (
        [*words, stranger],
        words[:2],
        [words[0], swapped, *words[2:]],
        [words[0], foreign, *words[2:]],
        [own, *words[1:]],
        words[1:],
    )
    refused = 0
    for lie in lies:
        told = Announcement(
            request_hash=request.hash, members=tuple(sorted(lie, key=lambda word: word.site))
        )
        try:
            study.sites[words[0].site].add(request, told, study)
        except MembersError:
            refused += 1
        except NotReadyError:  # a lie before this one was believed, and has the sum
            break
    return SumCheck(
        name="announcements",
        question="is every false announcement refused?",
        passed=refused == len(lies),
        found=f"{refused} of {len(lies)} were",
    )


def _sums_leave_once(study: _Study) -> SumCheck:
    """The same site, asked twice for one attempt."""
    attempt = _ATTEMPTS + 3
    request, words = study.request(attempt), study.ready(attempt)
    site = study.sites[words[0].site]
    site.add(request, announce(words), study)
    try:
        site.add(request, announce(words), study)
        left = 2
    except NotReadyError:
        left = 1
    return SumCheck(
        name="once",
        question="does a sum leave once?",
        passed=left == 1,
        found=f"{left} vectors of one sum",
    )


def _added(vectors: list[Group]) -> Group:
    total: Group = np.zeros(_NUM_VALUES, dtype=np.uint32)
    for vector in vectors:
        total += vector
    return total


def _opened(vectors: list[Group]) -> Vector:
    opened: Vector = from_group(_added(vectors)).numpy()
    return opened


def _p_uniform(vector_D: Group) -> float:
    """Are all bytes equally frequent?"""
    counts = np.bincount(vector_D.view(np.uint8), minlength=256)
    return float(stats.chisquare(counts).pvalue)
