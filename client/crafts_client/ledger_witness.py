"""The coordinator, and through it the other sites, as witnesses of this site's ledger.

A ledger and the witness file beside it can both be put back from one backup, and no program at the
site could tell: budget that was spent would be spent again. The coordinator keeps the head as well,
so a ledger that is not a continuation of what it saw is found before a round trains, and an entry
that nobody witnessed pays for no release: the head goes out before the release does. What goes out
is a count and two hashes.

A coordinator could say nothing of what it saw. So the sites are witnesses too: each signs its head,
and the registrar hands on what each signed and what each holds of the others. A coordinator cannot
make a head, but it can keep one back; only a folder of the site's own (``witness_folders``) is a
witness that nobody else stands before.
"""

import logging
import time
from dataclasses import replace

from crafts_client.enrolment import Registrar
from crafts_client.errors import CoordinatorBusyError, EnrolmentError
from crafts_client.home import SiteHome
from crafts_client.peer_heads import PeerHeads
from crafts_client.site_key import signed_head
from crafts_client.site_ledger import open_ledger
from crafts_core.registrar import messages
from crafts_privacy.errors import LedgerTamperedError
from crafts_privacy.ledger import EntryKind, Ledger, LedgerHead
from crafts_privacy.signed_head import SignedHead
from crafts_privacy.signing import SignatureError

log = logging.getLogger(__name__)

_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)


def witness_ledger(home: SiteHome) -> None:
    """Compare the ledger with what the coordinator and others saw last, and show them the head.

    A coordinator that fails is asked again for half a minute, from the start, as it may have kept
    the head and not said so. A site that refuses a round because of it is out of that round.

    Raises:
        LedgerTamperedError: the ledger is an old copy, or another one.
        LedgerError: the ledger is not in order by itself.
        EnrolmentError: the coordinator cannot be reached or refuses; nothing may be released.
    """
    for wait_s in _WAITS_S:
        try:
            _witness(home)
        except CoordinatorBusyError:
            time.sleep(wait_s)
        else:
            return
    _witness(home)


def witness_at_start(home: SiteHome) -> None:
    """The same before any round, so that a copy is found at once; who is away is asked later.

    Raises:
        LedgerError: as above.
    """
    try:
        _witness(home)
    except EnrolmentError as error:
        log.warning("nobody has witnessed the ledger yet: %s", type(error).__name__)


def _witness(home: SiteHome) -> None:
    ledger = open_ledger(home)
    with Registrar(home) as registrar:
        _show_to_coordinator(home, ledger, registrar)
        _exchange_with_sites(home, ledger, registrar)


def _show_to_coordinator(home: SiteHome, ledger: Ledger, registrar: Registrar) -> None:
    head = ledger.verify()
    hashes = [entry.hash for entry in ledger.entries()][: head.sequence]
    kept = registrar.call("WitnessLedger", ledger=home.ledger_name)
    if kept.entries and hashes[kept.entries - 1 : kept.entries] != [kept.head]:
        raise LedgerTamperedError(
            f"the coordinator saw this cohort's ledger with {kept.entries} entries, and this "
            f"one ({len(hashes)} entries) does not continue it; restore the newest copy of "
            f"{home.ledger_path} and of the witness beside it, or give its newest export to "
            "crafts-client restore FILE --ledger EXPORT"
        )
    shown = _lasting_head(ledger)
    if shown.sequence > kept.entries:
        registrar.call(
            "WitnessLedger",
            ledger=home.ledger_name,
            entries=shown.sequence,
            head=shown.hash,
            hash_at_witnessed=kept.head,
        )


def _exchange_with_sites(home: SiteHome, ledger: Ledger, registrar: Registrar) -> None:
    mine, peers = signed_head(home, ledger, _lasting_head(ledger)), PeerHeads(home.peer_heads_path)
    reply = registrar.call(
        "ExchangeHeads",
        mine=messages.SignedHead(**mine.model_dump()),
        held=[messages.SignedHead(**head.model_dump()) for head in peers.held()],
    )
    try:
        of_me = [SignedHead.of(head) for head in reply.of_you]
        of_others = [SignedHead.of(head) for head in reply.of_others]
    except ValueError as error:
        raise EnrolmentError("the coordinator hands on what is no head of a ledger") from error
    check_own_heads(ledger, mine.public_key, of_me)
    peers.keep(head for head in of_others if head.site != home.config.name)


def _lasting_head(ledger: Ledger) -> LedgerHead:
    """The head before it was put back, until somebody vouches: it may be put back once more."""
    head = ledger.verify()
    for entry in reversed(ledger.entries()[: head.sequence]):
        if entry.kind is not EntryKind.RESTORED:
            break
        head = replace(head, sequence=entry.sequence - 1, hash=entry.previous_hash)
    return head


def check_own_heads(ledger: Ledger, public_key: str, heads: list[SignedHead]) -> None:
    """Look at what others hold of this ledger. What this site's key did not sign shows nothing.

    Raises:
        LedgerTamperedError: this site signed a head that its ledger never had.
    """
    ours = [head for head in heads if head.public_key == public_key]
    try:
        for head in ours:
            head.check()
    except SignatureError as error:
        raise EnrolmentError(
            "the coordinator hands on a head that this site never signed"
        ) from error
    if len(ours) < len(heads):
        log.warning("alarm: others hold heads of this site that another key has signed")
    for lacking in ledger.lacks(head.head for head in ours):
        raise LedgerTamperedError(
            f"another site holds a head of {lacking.sequence} entries that this site has signed, "
            "and the ledger here never had it: it is an older copy, or another copy went on; do "
            "not train here, restore the newest copy"
        )
