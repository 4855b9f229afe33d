"""Attempts at sums, on disk before a word of them is sent.

An attempt has a number that is never used again, and announcements: the sets of sites whose sums it
asks for, one, or two where a bad site is looked for. A number is recorded before sites are asked
whether they are ready, an announcement before a member hears it. So whatever kills the coordinator,
it never announces twice under one number, and asks for an announced sum again until it has it or
gives the attempt up. Part of the registry.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Select, func, select

from crafts_core.exchange import Announcement
from crafts_server.registry import Registry
from crafts_server.registry_rows import AnnouncementRow, AttemptRow

MISSES = 2
"""So many sums in a row that a site was ready for and did not deliver: then it is left out."""
ROUNDS_LEFT_OUT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """An attempt whose members were told of each other."""

    attempt: int
    announcements: tuple[Announcement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PastSum:
    """One announced set, after its members' time was up."""

    round: int
    members: frozenset[str]
    missing: frozenset[str]


class Attempts:
    """Those of one run."""

    def __init__(self, registry: Registry, run_id: str) -> None:
        self._registry = registry
        self._run_id = run_id

    def begin(self, round_number: int) -> int:
        """The number of a new attempt at a round, from now on taken."""
        with self._registry.session() as session:
            last = session.scalar(
                select(func.max(AttemptRow.attempt)).where(
                    AttemptRow.run_id == self._run_id, AttemptRow.round == round_number
                )
            )
            attempt = (last or 0) + 1
            session.add(
                AttemptRow(run_id=self._run_id, round=round_number, attempt=attempt, void=False)
            )
            return attempt

    def announce(
        self, round_number: int, attempt: int, announcements: Sequence[Announcement]
    ) -> None:
        """Remember who will be told of whom."""
        with self._registry.session() as session:
            session.add_all(
                AnnouncementRow(
                    run_id=self._run_id,
                    round=round_number,
                    attempt=attempt,
                    part=part,
                    json=announcement.to_json(),
                )
                for part, announcement in enumerate(announcements)
            )

    def note(
        self, round_number: int, attempt: int, missing: Sequence[Iterable[str]], *, void: bool
    ) -> None:
        """Remember who did not deliver, part by part, and whether that voids the attempt."""
        with self._registry.session() as session:
            for part, names in enumerate(missing):
                row = session.get_one(AnnouncementRow, (self._run_id, round_number, attempt, part))
                row.missing = json.dumps(sorted(names))
            row_of = session.get_one(AttemptRow, (self._run_id, round_number, attempt))
            row_of.void = void

    def num_void(self, round_number: int) -> int:
        """How many attempts at a round could not be read."""
        query = select(func.count()).where(
            AttemptRow.run_id == self._run_id, AttemptRow.round == round_number, AttemptRow.void
        )
        with self._registry.session() as session:
            return session.scalar(query) or 0

    def under_way(self, round_number: int) -> Announced | None:
        """The newest attempt at a round, if its members may have been told and it is not void."""
        query = (
            select(AttemptRow)
            .where(AttemptRow.run_id == self._run_id, AttemptRow.round == round_number)
            .order_by(AttemptRow.attempt.desc())
        )
        with self._registry.session() as session:
            newest = session.scalars(query).first()
            if newest is None or newest.void:
                return None
            rows = self._announcements(round_number, newest.attempt)
            announcements = tuple(Announcement.parse(row.json) for row in session.scalars(rows))
            if not announcements:
                return None
            return Announced(attempt=newest.attempt, announcements=announcements)

    def past(self) -> list[PastSum]:
        """Every announced set whose end was noted, oldest first."""
        query = (
            select(AnnouncementRow)
            .where(AnnouncementRow.run_id == self._run_id, AnnouncementRow.missing.is_not(None))
            .order_by(AnnouncementRow.round, AnnouncementRow.attempt, AnnouncementRow.part)
        )
        with self._registry.session() as session:
            return [
                PastSum(
                    round=row.round,
                    members=frozenset(ready.site for ready in Announcement.parse(row.json).members),
                    missing=frozenset(json.loads(row.missing or "[]")),
                )
                for row in session.scalars(query)
            ]

    def _announcements(self, round_number: int, attempt: int) -> Select[AnnouncementRow]:
        return (
            select(AnnouncementRow)
            .where(
                AnnouncementRow.run_id == self._run_id,
                AnnouncementRow.round == round_number,
                AnnouncementRow.attempt == attempt,
            )
            .order_by(AnnouncementRow.part)
        )


def unreliable(past: Iterable[PastSum], round_number: int) -> frozenset[str]:
    """Sites to leave out of a round: each was ready twice in a row, and delivered neither time."""
    misses: dict[str, int] = {}
    until: dict[str, int] = {}
    for each in past:
        for site in each.members:
            misses[site] = misses.get(site, 0) + 1 if site in each.missing else 0
            if misses[site] >= MISSES:
                until[site] = each.round + ROUNDS_LEFT_OUT
    return frozenset(site for site, last in until.items() if round_number <= last)
