"""How far the other sites' ledgers were, as they signed it: this site is a witness of theirs.

Of each ledger the newest head is kept, and beside it the first that contradicts it: another key,
another ledger under the same name, other entries at the same length, or a shorter one that was
signed later. Both are handed on, so that the site itself, and every other, can see them. A head
that somebody delayed is older and contradicts nothing.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from crafts_client.errors import HomeError
from crafts_core.durable import write_file
from crafts_privacy.signed_head import SignedHead
from crafts_privacy.signing import SignatureError

log = logging.getLogger(__name__)

MAX_LEDGERS, MAX_OF_A_SITE = 128, 4
"""Of all other sites together, and of one: who names more is not believed, and keeps no room from
the others."""
_MOST_SKEW_S = 300
"""By which a site's clock may be set back without an alarm."""


class PeerHead(BaseModel):
    """What is known of one other ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    newest: SignedHead
    against: SignedHead | None = None
    """What contradicts it."""

    def after(self, seen: SignedHead) -> Self:
        """The same with one more head."""
        if self.against is None and _contradict(self.newest, seen):
            log.warning("alarm: two ledgers of site=%s; see crafts-client doctor", seen.site)
            return self.model_copy(update={"against": seen})
        newer = not _contradict(self.newest, seen) and seen.sequence > self.newest.sequence
        return self.model_copy(update={"newest": seen}) if newer else self


_FILE = TypeAdapter(list[PeerHead])


class PeerHeads:
    """The file of all of them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[PeerHead]:
        """What is known, by site.

        Raises:
            HomeError: the file is damaged.
        """
        try:
            return _FILE.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return []
        except ValidationError as error:
            raise HomeError(
                f"cannot read {self._path}; put back its newest copy, or remove it to begin anew"
            ) from error

    def held(self) -> list[SignedHead]:
        """Every head that is kept."""
        both = ((each.newest, each.against) for each in self.read())
        return [head for pair in both for head in pair if head is not None]

    def keep(self, seen: Iterable[SignedHead]) -> None:
        """Look at heads that others signed, and keep what is news."""
        before = self.read()
        known = {(each.newest.site, each.newest.ledger): each for each in before}
        of_a_site = Counter(site for site, _ in known)
        for head in seen:
            name = (head.site, head.ledger)
            try:
                head.check()
            except SignatureError:
                log.warning("a head of site=%s was not signed by its key; not kept", head.site)
                continue
            if name in known:
                known[name] = known[name].after(head)
            elif len(known) < MAX_LEDGERS and of_a_site[head.site] < MAX_OF_A_SITE:
                known[name] = PeerHead(newest=head)
                of_a_site[head.site] += 1
            else:
                log.warning("site=%s shows one ledger too many; its head is not kept", head.site)
        after = [known[name] for name in sorted(known)]
        if after != before:
            write_file(self._path, _FILE.dump_json(after, indent=1), mode=0o600)


def _contradict(first: SignedHead, second: SignedHead) -> bool:
    """Whether one ledger, growing, cannot have had both heads."""
    if (first.public_key, first.ledger_id) != (second.public_key, second.ledger_id):
        return True
    if first.sequence == second.sequence:
        return first.hash != second.hash
    older, newer = sorted((first, second), key=lambda head: head.sequence)
    return older.signed_at > newer.signed_at + _MOST_SKEW_S
