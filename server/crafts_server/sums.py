"""Attempts at a round's sum, until one opens.

Two phases make an attempt: sites say that they are ready, and whoever is ready when that closes is
announced as the members; then all of these must deliver, or the attempt is void and the next begins
with fresh samples, noise and keys. Who is late to be ready is no member, and costs nobody anything.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from crafts_core.exchange import TOLD_OUT, Announcement, RoundRequest
from crafts_privacy.secure_aggregation.members import announce
from crafts_privacy.secure_aggregation.updates import MOST_WEIGHT, UpdateGrid
from crafts_server.attempts import Attempts, unreliable
from crafts_server.collection import Replies
from crafts_server.diagnosis import parts_of, suspicion
from crafts_server.errors import AggregationError, VoidSumsError
from crafts_server.open_round import OpenRound
from crafts_server.receipts import Refusal
from crafts_server.sum_phases import MaskedPhase, ReadyPhase, SumOfPart

log = logging.getLogger(__name__)

_FEWEST_MEMBERS = 3
"""Sites refuse smaller sets unless their policy says otherwise."""


@dataclass(slots=True)
class Collected:
    """What the attempts at one round came to."""

    left_out: frozenset[str]
    parts: list[SumOfPart] = field(default_factory=list)
    """Every announced set of every attempt; of the last attempt some can be read."""
    refused: list[Refusal] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    num_asked: int = 0


class _ToldOutError(Exception):
    """Too few sites may still be asked for a release."""


class SumCollection:
    """The attempts at one round, after those that an earlier process made."""

    def __init__(self, opened: OpenRound) -> None:
        self._opened = opened
        self._number = opened.planned.round
        self._config = opened.study.plan.aggregation
        self._roster = opened.study.roster()
        self._attempts = Attempts(opened.study.registry, opened.study.run_id)
        rounds = (checkpoint.receipt().sums for checkpoint in opened.chain[1:])
        self._search = suspicion(rounds, diagnose_after=self._config.diagnose_after)
        self._collected = Collected(left_out=self._who_is_left_out())

    def run(self) -> Collected:
        """Try until a sum can be read.

        A release has its own few attempts, over all processes: sites charge no more. If none can be
        read, none is in what comes back.

        Raises:
            AggregationError: too few sites are ready.
            VoidSumsError: every attempt at a step was void.
        """
        is_release = self._opened.planned.stage.is_release
        most = self._config.max_attempts
        if is_release:
            plan = self._opened.study.plan
            most = max(0, plan.release_attempts - self._attempts.num_void(self._number))
        with suppress(_ToldOutError):
            for _ in range(most):
                if self._attempt():
                    return self._collected
                self._collected.left_out = self._who_is_left_out()
        if is_release:
            log.warning("no sum of release round=%d: public data stand in", self._number)
            return self._collected
        raise VoidSumsError(
            f"round {self._number}: {self._config.max_attempts} sums in a row could not be read, "
            f"as a member did not deliver. {self._who()}. Each was charged to its members; "
            "committed rounds are kept, run again when all sites can stay"
        )

    def _attempt(self) -> bool:
        """The attempt that a crash left under way, or the next; whether a sum can be read."""
        under_way = self._attempts.under_way(self._number)
        if under_way is None:
            attempt = self._attempts.begin(self._number)
            announcements = self._settle_members(attempt)
            self._attempts.announce(self._number, attempt, announcements)
        else:
            attempt, announcements = under_way.attempt, list(under_way.announcements)
        phase = MaskedPhase(
            *(self._opened, self._request(attempt), announcements),
            is_resumed=under_way is not None,
        )
        replies = self._opened.collect(
            phase,
            expected=sum(len(part.members) for part in phase.parts),
            deadline_s=self._config.masked_deadline_s,
            only=phase.asks,
        )
        return self._note(attempt, phase, replies)

    def _request(self, attempt: int) -> RoundRequest:
        return self._opened.request.model_copy(update={"attempt": attempt})

    def _settle_members(self, attempt: int) -> list[Announcement]:
        """Ask who is ready, and make one set of them, or two where a bad site is looked for."""
        collected, sites = self._collected, self._opened.sites
        phase = ReadyPhase(self._opened, self._request(attempt), self._roster)
        replies = self._opened.collect(
            phase,
            min_sites=self._config.min_sites,
            deadline_s=self._config.deadline_s,
            only=lambda node: sites.name(node) not in collected.left_out,
        )
        collected.num_asked = max(collected.num_asked, replies.num_asked)
        collected.refused += replies.refused
        collected.missing |= set(replies.missing)
        if len(phase.ready) < self._config.min_sites:
            if any(TOLD_OUT in each.reason for each in replies.refused):
                raise _ToldOutError
            raise replies.too_few(
                self._config.min_sites,
                f"round {self._number}: {len(phase.ready)} sites are ready, expected at least "
                f"{self._config.min_sites}. {self._who()}",
            )
        parts = self._parts(set(phase.ready))
        return [announce([phase.ready[site] for site in members]) for members in parts]

    def _parts(self, ready: set[str]) -> list[list[str]]:
        """Whom to announce together; no set that a member would refuse, as a void sum is charged.

        Raises:
            AggregationError: one site would be most of the sum.
        """
        colluding = self._opened.study.plan.privacy.colluding_sites or 0
        smallest = max(_FEWEST_MEMBERS, colluding + 2, self._config.min_sites)
        parts = parts_of(ready, self._search.suspects, smallest=smallest)
        if any(self._heaviest(members) for members in parts):
            parts = [sorted(ready)]
        if (site := self._heaviest(ready)) is not None:
            raise AggregationError(
                f"round {self._number}: of those who are ready {site} would be more than "
                f"{MOST_WEIGHT:g} of the sum, which it refuses. {self._who()}. Committed rounds "
                "are kept; run again when more sites are back"
            )
        return parts

    def _heaviest(self, members: Iterable[str]) -> str | None:
        """Of each member's own update: the one that would be most of their sum."""
        study = self._opened.study
        if study.plan.privacy.trust != "site":
            return None
        patients = {site: self._roster.patients[site] for site in members}
        noise, stage = self._opened.noise_multiplier, self._opened.planned.stage
        return UpdateGrid.of(study.plan, stage, patients, noise_multiplier=noise).heaviest

    def _note(self, attempt: int, phase: MaskedPhase, replies: Replies) -> bool:
        """What became of an attempt; on disk, so that the next process knows who to leave out."""
        missing = [part.missing for part in phase.parts]
        is_void = all(missing)
        self._attempts.note(self._number, attempt, missing, void=is_void)
        collected = self._collected
        collected.parts += phase.parts
        collected.refused += replies.refused
        collected.missing |= {site for names in missing for site in names}
        if is_void:
            names = ",".join(sorted(site for names in missing for site in names))
            log.warning("void round=%d attempt=%d missing=%s", self._number, attempt, names)
        return not is_void

    def _who_is_left_out(self) -> frozenset[str]:
        """Whoever spoils sums; and who does not deliver, while enough others are left."""
        found = self._search.found
        late = unreliable(self._attempts.past(), self._number)
        num_left = len(self._roster.patients.keys() - found - late)
        return found | late if num_left >= self._config.min_sites else found

    def _who(self) -> str:
        collected = self._collected
        told = "; ".join(f"{each.site} ({each.reason})" for each in collected.refused) or "none"
        return (
            f"Missing: {', '.join(sorted(collected.missing)) or 'none'}. Refused: {told}. "
            f"Left out: {', '.join(sorted(collected.left_out)) or 'none'}"
        )
