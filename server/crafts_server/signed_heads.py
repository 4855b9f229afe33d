"""The heads of ledgers that sites signed, handed from each to the others.

The coordinator is a post office here: it can lose a head or hand it on late, and can make none.
What it keeps is what each site said last: its own head, and those of others that it holds.
"""

from collections import Counter
from collections.abc import Sequence

from sqlalchemy import delete, or_, select

from crafts_privacy.signed_head import SignedHead
from crafts_privacy.signing import SignatureError
from crafts_server.errors import EnrolmentError
from crafts_server.registry import Registry
from crafts_server.registry_rows import SignedHeadRow

MAX_HELD = 256
"""Of other sites, by one."""
_MAX_OF_A_LEDGER = 2


class SignedHeads:
    """One table of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def exchange(
        self, site: str, mine: SignedHead, held: Sequence[SignedHead]
    ) -> tuple[list[SignedHead], list[SignedHead]]:
        """Keep what a site says instead of what it said before; give it what concerns it.

        Returns:
            What others hold of it, and the others' own heads.

        Raises:
            EnrolmentError: a head is not signed by its key, or these are too many.
        """
        _check(site, mine, held)
        with self._registry.session() as session:
            session.execute(delete(SignedHeadRow).where(SignedHeadRow.holder == site))
            session.add_all(
                SignedHeadRow(
                    holder=site, number=number, site=head.site, json=head.model_dump_json()
                )
                for number, head in enumerate((mine, *held))
            )
            wanted = select(SignedHeadRow).where(
                SignedHeadRow.holder != site,
                or_(SignedHeadRow.site == site, SignedHeadRow.site == SignedHeadRow.holder),
            )
            rows = session.scalars(wanted.order_by(SignedHeadRow.holder, SignedHeadRow.number))
            heads = [SignedHead.model_validate_json(row.json) for row in rows]
        return (
            [head for head in heads if head.site == site],
            [head for head in heads if head.site != site],
        )


def _check(site: str, mine: SignedHead, held: Sequence[SignedHead]) -> None:
    if mine.site != site or any(head.site == site for head in held):
        raise EnrolmentError("a site shows its own head once, and else those of others")
    of_a_ledger = Counter((head.site, head.ledger) for head in held)
    if len(held) > MAX_HELD or any(number > _MAX_OF_A_LEDGER for number in of_a_ledger.values()):
        raise EnrolmentError("these are too many heads of other sites")
    try:
        for head in (mine, *held):
            head.check()
    except SignatureError as error:
        raise EnrolmentError("a head is not signed by its key") from error
