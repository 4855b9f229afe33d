"""The coordinator as witness of this site's ledger.

A ledger and the witness file beside it can both be put back from one backup, and no program at the
site could tell: budget that was spent would be spent again. The coordinator keeps the head as well,
so a ledger that is not a continuation of what it saw is found before a round trains, and an entry
that nobody witnessed pays for no release: the head goes out before the release does. What goes out
is a count and two hashes.
"""

import hashlib
import time

from crafts_client.enrolment import Registrar
from crafts_client.errors import CoordinatorBusyError
from crafts_client.home import SiteHome
from crafts_client.site_ledger import open_ledger
from crafts_privacy.errors import LedgerTamperedError

_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)


def witness_ledger(home: SiteHome) -> None:
    """Compare the ledger with what the coordinator saw last, and show it the head.

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


def _witness(home: SiteHome) -> None:
    ledger = open_ledger(home)
    head = ledger.verify()
    hashes = [entry.hash for entry in ledger.entries()][: head.sequence]
    # The cohort is what the budget belongs to; its name is the hospital's own.
    name = hashlib.sha256(home.config.cohort.encode()).hexdigest()[:32]
    with Registrar(home) as registrar:
        kept = registrar.call("WitnessLedger", ledger=name)
        if kept.entries and hashes[kept.entries - 1 : kept.entries] != [kept.head]:
            raise LedgerTamperedError(
                f"the coordinator saw this cohort's ledger with {kept.entries} entries, and this "
                f"one ({len(hashes)} entries) does not continue it; restore the newest copy of "
                f"{home.ledger_path} and of the witness beside it"
            )
        if len(hashes) > kept.entries:
            registrar.call(
                "WitnessLedger",
                ledger=name,
                entries=len(hashes),
                head=hashes[-1],
                hash_at_witnessed=kept.head,
            )
