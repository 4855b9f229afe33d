"""Putting a backup back: into an empty folder, every byte compared, whole or not at all.

Files are unpacked into a folder of their own inside the new home (which may be a volume that is
mounted there) and move up once all are what the manifest says; the file that makes a folder a home
is the last.
"""

import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crafts_core.backup import MANIFEST, BackupError, Manifest, SavedFile, Whose
from crafts_core.durable import exclusive_lock, sync

_UNPACKED = ".restoring"
_LOCK = ".restoring.lock"
_OF_NEW_DISKS = "lost+found"
_BLOCK_BYTES = 1024 * 1024
_MANIFEST_NAME = re.compile(rf"{MANIFEST}[0-9a-f]{{64}}")
"""Not its beginning alone: a file of the home may be called like that."""
_MOST_MANIFEST_BYTES = 256 * 1024 * 1024


@contextmanager
def restoring(file: Path, home: Path, *, of: Whose, last: str) -> Iterator[tuple[Path, Manifest]]:
    """The checked files, in a folder that becomes the home when the caller is done with it.

    Args:
        file: The backup.
        home: Missing or empty.
        of: Whose home it must be of.
        last: The file that makes a folder a home.

    Raises:
        BackupError: the file is not a whole backup of such a home, or the folder is not empty.
    """
    _check_empty(home)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.chmod(0o700)
    busy = BackupError(f"another restore fills {home}; wait for it, or name another folder")
    lock = home / _LOCK
    with exclusive_lock(lock, held=busy):
        try:
            _check_empty(home)  # what was restored while this waited for its turn is a home
            yield from _filled(file, home, of=of, last=last)
        finally:
            lock.unlink()
    sync(home)


def _check_empty(home: Path) -> None:
    there = {path.name for path in home.iterdir()} if home.exists() else set()
    if there - {_UNPACKED, _LOCK, _OF_NEW_DISKS}:
        raise BackupError(f"{home} is not empty; a backup is put back into a new folder only")


def _filled(file: Path, home: Path, *, of: Whose, last: str) -> Iterator[tuple[Path, Manifest]]:
    unpacked = home / _UNPACKED
    shutil.rmtree(unpacked, ignore_errors=True)  # of a program that was killed
    unpacked.mkdir(mode=0o700)
    try:
        yield unpacked, _unpack(file, unpacked, of=of)
        _sync_all(unpacked)
        names = sorted((path.name for path in unpacked.iterdir()), key=lambda name: name == last)
        for name in names:
            if name == last:
                sync(home)  # a power cut leaves no home that lacks its ledger
            (unpacked / name).rename(home / name)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _unpack(file: Path, into: Path, *, of: Whose) -> Manifest:
    try:
        with tarfile.open(file, "r:") as tar:
            *found, manifest = list(_members(tar, into))
    except (
        tarfile.TarError,
        ValueError,
        FileExistsError,
        OverflowError,  # these two: of a header that says an impossible number
        MemoryError,
    ) as error:
        raise BackupError(f"{file} is no backup, or not whole; take another one") from error
    if not isinstance(manifest, Manifest) or tuple(found) != manifest.files:
        raise BackupError(f"{file} is damaged: it does not hold what its manifest says")
    if manifest.of != of:
        raise BackupError(f"{file} is the backup of a {manifest.of}, not of a {of}")
    return manifest


def _members(tar: tarfile.TarFile, into: Path) -> Iterator[SavedFile | Manifest]:
    """Write each file and say what it was; the manifest is not written."""
    for member in tar:
        is_plain = member.isreg() and not member.issparse()  # holes would fill a disk from nothing
        source = tar.extractfile(member) if is_plain else None
        if source is None:
            raise ValueError(f"{member.name} is no file")
        if _MANIFEST_NAME.fullmatch(member.name):
            if member.size > _MOST_MANIFEST_BYTES:
                raise ValueError("the manifest is too long")
            manifest = Manifest.model_validate_json(source.read())
            if manifest.file_name != member.name:
                raise ValueError("the manifest was changed")
            yield manifest
            continue
        name = SavedFile(name=member.name, size_bytes=0, sha256="0" * 64).name  # stays inside
        path, digest, size_bytes = into / name, hashlib.sha256(), 0
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "wb") as target:
            while block := source.read(_BLOCK_BYTES):
                target.write(block)
                digest.update(block)
                size_bytes += len(block)
        os.utime(path, (member.mtime, member.mtime))  # plans wait in this order
        yield SavedFile(name=name, size_bytes=size_bytes, sha256=digest.hexdigest())


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
