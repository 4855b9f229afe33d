"""Backups of a site's home, and what a home that was put back may not do.

What left after a backup was made was paid for, and the backup's ledger does not know it. So a
ledger that is put back says so of itself, in an entry, and pays for nothing, wherever it lies,
until a person has moved it here; before that everybody is asked who keeps heads of it: folders,
coordinator and other sites. Where one of them saw more than came back, the entries must come from
a newer copy: the export in a witness folder holds every one that anything ever left for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crafts_client.home import LEDGER_NAME, SITE_NAME, SiteHome
from crafts_client.ledger_witness import witness_ledger
from crafts_client.register import PatientRegister
from crafts_client.site_ledger import existing_ledger
from crafts_client.witness_folders import check_folders
from crafts_core.backup import BackupError, Manifest, Saving, files_of, write_backup
from crafts_core.page_token import TOKEN_FILE
from crafts_core.restore import restoring
from crafts_privacy import signing
from crafts_privacy.ledger import Ledger, LedgerEntry
from crafts_privacy.ledger_export import read_entries
from crafts_privacy.witness import head_path

KEYS = ("keys", "salt")
_REGISTER = "patients.jsonl"
_MADE_ANEW = ("pictures", "ingest.html")
"""By ``ingest``, like the tiles, and as private."""
_SECRETS_OF_A_PROCESS = ("keys/executor.secret", TOKEN_FILE, "figures.json")
"""And what is computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A home that was put back."""

    manifest: Manifest
    ledger_entries: int
    """Without the one that says that it was put back."""
    has_keys: bool
    has_tiles: bool


def back_up(home: SiteHome, out: Path, *, keys: bool, tiles: bool) -> Manifest:
    """Copy a home into one file, also while it takes part in a study.

    Raises:
        LedgerTamperedError: the ledger is not in order; nothing is written in its name.
        BackupError: the file cannot be made.
    """
    ledger = existing_ledger(home)
    of_ledger = (home.ledger_path, head_path(home.ledger_path))
    register_head = head_path(home.register_path)
    # A witness that came back with the home would swear to whatever the backup says.
    unwanted = [*_SECRETS_OF_A_PROCESS, *home.config.witness_folders, *(() if keys else KEYS)]
    if not tiles:
        unwanted += [*_MADE_ANEW, home.config.tile_store]
    special = [path.name for path in (*of_ledger, register_head)]

    def save(saving: Saving) -> None:
        saving.add(register_head)  # before the lines that it is about
        for path in files_of(home.path, without=[*unwanted, *special]):
            saving.add(path)
        if ledger is not None:  # last: every release in the outbox is in it
            with ledger.held() as files:
                for path in files:
                    saving.add(path)

    return write_backup(out, home.path, of="site", save=save)


def put_back(
    file: Path, path: Path, *, newest_ledger: Path | None, site_key: Path | None = None
) -> Restored:
    """Make a home of a backup; its ledger pays for nothing until it is moved there.

    Args:
        file: The backup.
        path: Of the home, missing or empty.
        newest_ledger: An export of the same ledger with the entries since.
        site_key: What signed the export, where the backup has no keys. It is not copied.

    Raises:
        BackupError: the file is no whole backup of a site, or the export is not of its ledger.
        LedgerError: the ledger or the export is not what was written.
    """
    with restoring(file, path, of="site", last=SITE_NAME) as (inside, manifest):
        ledger = Ledger(inside / LEDGER_NAME)
        is_young = not ledger.entries()
        if newest_ledger is not None:
            key = site_key or inside / "keys" / "site.key"
            ledger = _continued(ledger, inside, newest_ledger, key)
        entries = ledger.verify().sequence
        ledger.mark_restored(manifest.made_at)
        if is_young:  # else one that is missing was lost, with who withdrew
            PatientRegister(inside / _REGISTER).begin()
    home = SiteHome.open(path)
    return Restored(
        manifest=manifest,
        ledger_entries=entries,
        has_keys=home.site_key_path.exists() and home.salt_path.exists(),
        has_tiles=home.tile_store_path.exists(),
    )


def ask_witnesses(home: SiteHome, ledger: Ledger) -> list[str]:
    """Nobody who keeps heads of a ledger that was put back may have seen more of it.

    Returns:
        Who was asked.

    Raises:
        LedgerTamperedError: somebody did: what was spent since the backup is missing.
        WitnessError: a folder is away, so that nobody can say.
        EnrolmentError: the coordinator of this site cannot be asked.
    """
    check_folders(home, ledger)
    asked = [str(folder) for folder in home.witness_folders]
    if home.coordinator_path.exists():
        witness_ledger(home)
        asked.append("the coordinator")
    return asked


def _continued(ledger: Ledger, inside: Path, export: Path, key: Path) -> Ledger:
    """The same ledger with the entries of an export that go on from its own."""
    if not key.exists():
        raise BackupError(
            f"the backup has no key that {export} could be compared with; say with --site-key "
            "where its keys/site.key is kept"
        )
    own = signing.public_key_of(signing.load_signing_key(key))
    head, entries = read_entries(export, trusted=[signing.fingerprint(own)])
    _check_goes_on(ledger.entries(), entries, export)
    # A backup from before the first entry holds no ledger, or one that nobody has heard of.
    ledger_id = head.ledger_id
    for path in (inside / LEDGER_NAME, head_path(inside / LEDGER_NAME)):
        path.unlink()
    return Ledger.begin_with(inside / LEDGER_NAME, ledger_id, entries)


def _check_goes_on(
    ours: Sequence[LedgerEntry], entries: Sequence[LedgerEntry], export: Path
) -> None:
    hashes = [[entry.hash for entry in each] for each in (ours, entries)]
    if hashes[1][: len(ours)] != hashes[0]:
        raise BackupError(
            f"{export} ({len(entries)} entries) does not go on from the backup's ledger "
            f"({len(ours)} entries); take the newest export of the same ledger"
        )
