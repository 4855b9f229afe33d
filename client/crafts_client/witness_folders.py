"""Folders as witnesses of the ledger, on disks or shares that are not backed up with the home.

Each keeps two files for a site's ledger: its newest signed head and, to put a lost home back, every
entry that leads to it (``ledger_export``). Before a round, and again before its release leaves, the
ledger must have had that head, and moves it on. So of two copies of a home that know the same
folder, whatever their operators said, only the first goes on. A folder that is away, or that holds
no head (a share that is not mounted looks empty), stops the site.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from crafts_client.errors import WitnessError
from crafts_client.home import SiteHome
from crafts_client.site_key import signed_head
from crafts_core.durable import exclusive_lock, write_file
from crafts_privacy.errors import LedgerTamperedError
from crafts_privacy.ledger import Ledger
from crafts_privacy.ledger_export import write_export
from crafts_privacy.signed_head import SignedHead
from crafts_privacy.signing import SignatureError

_LOCK_TIMEOUT_S = 30.0


def show_to_folders(home: SiteHome, ledger: Ledger) -> None:
    """Compare the ledger with what each folder saw last, and leave the head there.

    Raises:
        WitnessError: a folder is away, cannot be written, or was never a witness.
        LedgerTamperedError: the ledger is an older copy, or another copy went on.
    """
    for folder in home.witness_folders:
        with _held(folder, home) as path:
            kept, now = _compared(home, ledger, path)
            if now.sequence > kept.sequence:
                _keep(now, ledger, path)


def check_folders(home: SiteHome, ledger: Ledger) -> None:
    """Compare, and leave nothing there.

    Raises:
        WitnessError: as above.
        LedgerTamperedError: as above.
    """
    for folder in home.witness_folders:
        with _held(folder, home) as path:
            _compared(home, ledger, path)


def begin_in_folder(home: SiteHome, ledger: Ledger, folder: Path) -> Path:
    """Make a folder a witness: put the first head there.

    Raises:
        WitnessError: it holds one already, or cannot be written.
    """
    with _held(folder, home) as path:
        if path.exists():
            raise WitnessError(f"{path} is there already; add {folder} to witness_folders")
        _keep(signed_head(home, ledger), ledger, path)
    return path


def _keep(head: SignedHead, ledger: Ledger, path: Path) -> None:
    """The entries first: what the head says must be there."""
    write_export(ledger.entries()[: head.sequence], head, path.with_suffix(".csv"))
    write_file(path, head.model_dump_json() + "\n")


@contextmanager
def _held(folder: Path, home: SiteHome) -> Iterator[Path]:
    """The file of this site's ledger, for one program at a time on all machines."""
    path = folder / f"{home.config.name}.{home.ledger_name}.json"
    held = WitnessError(f"{path} has been held for {_LOCK_TIMEOUT_S:g} s by another program")
    try:
        with exclusive_lock(path.with_suffix(".lock"), held=held, timeout_s=_LOCK_TIMEOUT_S):
            yield path
    except OSError as error:
        raise WitnessError(
            f"cannot use the witness folder {folder}: {error.strerror}; mount it again; nothing "
            "leaves without it"
        ) from error


def _compared(home: SiteHome, ledger: Ledger, path: Path) -> tuple[SignedHead, SignedHead]:
    """What the folder keeps and what it would keep now, if the ledger had the one."""
    kept, now = _read(path), signed_head(home, ledger)
    try:
        kept.check()
    except SignatureError as error:
        raise LedgerTamperedError(f"{path} is not what a site signed: {error}") from error
    if kept.public_key != now.public_key:
        raise LedgerTamperedError(
            f"{path} is signed by another key ({kept.fingerprint[:16]}) than this site's "
            f"({now.fingerprint[:16]}): another home of this name is in use, or the key was lost"
        )
    if ledger.lacks([kept.head]):
        raise LedgerTamperedError(
            f"{path} saw this ledger with {kept.sequence} entries, and this one ({now.sequence} "
            "entries) does not continue it: it is an older copy, or another copy went on; do not "
            "train here, restore the newest copy"
        )
    return kept, now


def _read(path: Path) -> SignedHead:
    try:
        return SignedHead.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise WitnessError(
            f"the witness folder {path.parent} holds no head of this site; mount it again, or, if "
            f"it never was a witness, run crafts-client ledger witness {path.parent}"
        ) from error
    except ValidationError as error:
        raise LedgerTamperedError(
            f"{path} is damaged; find out by whom before you go on"
        ) from error
