"""Backups of the coordinator's home.

The registry is read first and checkpoints after it: it is the witness that no committed round has
gone missing, so it may be behind them and never ahead. A registry on PostgreSQL is not in the home;
it is dumped by its own tools, before the home is read and put back before the home is used. Public
pools stay out: they are large, and made again of their tables, to the same hash.
"""

from pathlib import Path

from crafts_core.backup import Manifest, Saving, files_of, write_backup
from crafts_core.page_token import TOKEN_FILE
from crafts_core.restore import restoring
from crafts_server.audit_log import AuditLog, Event
from crafts_server.home import CONFIG_NAME, SQLITE, CoordinatorHome

KEYS = ("signing.key", "pki")
REGISTRY = "registry.db"


def back_up(home: CoordinatorHome, out: Path, *, keys: bool) -> Manifest:
    """Copy a home into one file, also while the coordinator serves.

    Raises:
        BackupError: the file cannot be made.
    """

    def save(saving: Saving) -> None:
        if home.config.registry == SQLITE and (home.path / REGISTRY).exists():
            saving.add(home.path / REGISTRY)
        without = [REGISTRY, TOKEN_FILE, home.pools.name, *(() if keys else KEYS)]
        for path in files_of(home.path, without=without):
            saving.add(path)

    return write_backup(out, home.path, of="coordinator", save=save)


def put_back(file: Path, path: Path) -> Manifest:
    """Make a home of a backup, and say so in its audit log.

    Raises:
        BackupError: the file is no whole backup of a coordinator, or the folder is not empty.
        AuditLogError: the log in it is not as it was written.
    """
    with restoring(file, path, of="coordinator", last=CONFIG_NAME) as (inside, manifest):
        (inside / "queue").mkdir(mode=0o700, exist_ok=True)
        AuditLog(inside / "audit.jsonl").write(
            Event.RESTORED, made_at=manifest.made_at.isoformat(), manifest=manifest.hash
        )
    return manifest
