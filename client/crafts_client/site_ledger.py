"""The site's ledger, opened together with everything else here that knows of it.

A ledger lies beside its own witness, and both can be lost, or put back from one backup. The outbox
is a third witness: each release that was ever sealed names the entry that paid for it, so a ledger
that lacks such an entry is not the newest one. Who removes all three finds an empty site; only
whoever kept a head knows better: a folder elsewhere, the coordinator, other sites.
"""

from crafts_client.home import SiteHome
from crafts_client.outbox import Outbox
from crafts_client.site_key import site_key
from crafts_privacy.errors import LedgerTamperedError
from crafts_privacy.ledger import Ledger
from crafts_privacy.ledger_rows import RESTORE
from crafts_privacy.witness import head_path


def existing_ledger(home: SiteHome) -> Ledger | None:
    """The ledger, verified; ``None`` where nothing was ever trained. Makes nothing.

    Raises:
        LedgerTamperedError: the ledger is not what was written, or is missing and was there.
        LedgerError: another process holds it.
        OutboxError: a sealed release cannot be read.
    """
    known = home.ledger_path.exists() or head_path(home.ledger_path).exists()
    if known or Outbox(home.outbox_path).payments():
        return _opened(home, may_upgrade=False)
    return None


def open_ledger(home: SiteHome) -> Ledger:
    """The same to train with: a new one where nothing was ever trained, and of this version."""
    return _opened(home, may_upgrade=True)


def _opened(home: SiteHome, *, may_upgrade: bool) -> Ledger:
    payments = Outbox(home.outbox_path).payments()  # first: what is sealed meanwhile is newer
    if payments and not home.ledger_path.exists():
        raise LedgerTamperedError(
            f"ledger {home.ledger_path} is missing, but the outbox holds what "
            f"{len(payments)} of its entries paid for; {RESTORE}"
        )
    ledger = Ledger(home.ledger_path, may_upgrade=may_upgrade)
    entries = ledger.entries()
    for payment in sorted(payments):
        known = entries[payment.reservation - 1 : payment.reservation]
        if not known or known[0].hash != payment.entry_hash:
            raise LedgerTamperedError(
                f"the outbox holds a release that ledger entry {payment.reservation} paid for, and "
                f"this ledger ({len(entries)} entries) is without it: it is an older copy or "
                f"another one; {RESTORE}"
            )
    return ledger


def take_place(home: SiteHome, ledger: Ledger) -> None:
    """Bind the ledger to this home, and have the key that signs its head.

    Raises:
        LedgerPlaceError: it is bound to another place: this home is a copy.
        HomeError: the key is missing.
    """
    ledger.check_place()
    site_key(home, ledger)  # first: who finds the ledger bound expects a key
    ledger.bind()
