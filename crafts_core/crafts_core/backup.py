"""A home as one file: a tar of its files and a manifest, named by its hash, with the hash of each.

The file belongs to its owner alone (0600) and is not encrypted; it is there whole or not at all.
Databases are copied by SQLite itself, as they were between two transactions, while programs write
to them; whatever else lies in a home is replaced by renaming or only grows. In which order files
are read, so that none is ahead of what it must not be ahead of, is the caller's.
"""

import hashlib
import io
import os
import sqlite3
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from crafts_core import __version__
from crafts_core.durable import exclusive_lock, sync
from crafts_core.errors import CraftsError
from crafts_core.fields import Sha256

MANIFEST = "MANIFEST-"
Whose = Literal["site", "coordinator"]
_PASSING_SUFFIXES = (".lock", ".writing", "-journal", "-wal", "-shm")
"""Of locks, files under way, and what SQLite keeps beside a database and folds into its copy."""
_BUSY_S = 30.0


class BackupError(CraftsError):
    """A backup cannot be made, or put back: the operator must act."""


class SavedFile(BaseModel):
    """One file of a backup."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Relative to the home."""
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        path = PurePosixPath(name)
        if path.is_absolute() or not path.name or ".." in path.parts or str(path) != name:
            raise ValueError("expected a plain path below the home")
        return name


class Manifest(BaseModel):
    """What a backup holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["crafts-backup-1"] = "crafts-backup-1"
    of: Whose
    made_at: datetime
    """By the machine's clock, before the first file was read."""
    version: str
    files: tuple[SavedFile, ...]

    @property
    def hash(self) -> str:
        """Stands for everything in the backup."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def file_name(self) -> str:
        """Under which it lies in the tar."""
        return f"{MANIFEST}{self.hash}"


class Saving:
    """A backup that is being written: files of a home are added to it, each as it is then."""

    def __init__(self, tar: tarfile.TarFile, home: Path, scratch: Path) -> None:
        self._tar, self._home, self._scratch = tar, home, scratch
        self.files: list[SavedFile] = []

    def add(self, path: Path) -> None:
        """One file; a database by a copy of it. One that has just gone is passed over.

        Raises:
            BackupError: it became shorter meanwhile, or is a database that cannot be copied.
        """
        source = self._scratch if path.suffix == ".db" else path
        try:
            if source is not path:
                copy_database(path, source)
            with source.open("rb") as file:
                self._add(path, file, os.fstat(file.fileno()))
        except FileNotFoundError:
            return
        finally:
            self._scratch.unlink(missing_ok=True)

    def _add(self, path: Path, file: IO[bytes], stat: os.stat_result) -> None:
        name = path.relative_to(self._home).as_posix()
        if os.fsencode(name).decode(errors="ignore") != name:
            raise BackupError(f"{name!a} in {self._home} is not named in UTF-8; rename it")
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = stat.st_size, stat.st_mtime, 0o600
        reader = _Hashed(file)
        try:
            self._tar.addfile(info, reader)
        except OSError as error:
            if reader.num_bytes < info.size and error.errno is None:
                raise BackupError(f"{path} became shorter while it was read; try again") from error
            raise
        self.files.append(
            SavedFile(name=info.name, size_bytes=info.size, sha256=reader.digest.hexdigest())
        )


class _Hashed(io.RawIOBase):
    """Hashes what is read through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        """As of the file."""
        data = self._file.read(size)
        self.digest.update(data)
        self.num_bytes += len(data)
        return data


def write_backup(out: Path, home: Path, *, of: Whose, save: Callable[[Saving], None]) -> Manifest:
    """Write the file, whole or not at all.

    Args:
        out: The new file.
        home: Whose files are saved.
        of: Whose home it is.
        save: Adds every file.

    Raises:
        BackupError: ``out`` is there already or lies in the home, another backup is under way, or
            as ``Saving.add``.
    """
    if out.exists():
        raise BackupError(f"{out} is there already; a backup is never replaced")
    if out.absolute().resolve().is_relative_to(home.resolve()):
        raise BackupError(f"{out} lies in the home itself; write it to another disk")
    busy = BackupError(f"another backup of {home} is being made; try again when it is done")
    with exclusive_lock(home / ".backup.lock", held=busy):
        return _write(out, home, of=of, save=save)


def _write(out: Path, home: Path, *, of: Whose, save: Callable[[Saving], None]) -> Manifest:
    made_at = datetime.now(UTC)
    temporary, scratch = (out.with_name(f".{out.name}.{what}") for what in ("writing", "database"))
    temporary.unlink(missing_ok=True)
    try:
        with _new_secret(temporary) as raw:
            with tarfile.open(fileobj=raw, mode="w") as tar:
                saving = Saving(tar, home, scratch)
                save(saving)
                manifest = Manifest(
                    of=of, made_at=made_at, version=__version__, files=tuple(saving.files)
                )
                text = manifest.model_dump_json().encode()
                info = tarfile.TarInfo(manifest.file_name)
                info.size, info.mode = len(text), 0o600
                tar.addfile(info, io.BytesIO(text))
            raw.flush()
            os.fsync(raw.fileno())
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    sync(out.absolute().parent)
    return manifest


def files_of(home: Path, *, without: Collection[str]) -> Iterator[Path]:
    """Every file of a home, in order; what passes is left out.

    Args:
        home: The folder.
        without: Files and folders, relative to the home, that are not wanted.

    Raises:
        BackupError: one is a link: what is behind it would be missing without a word.
    """
    unwanted = {(home / name).resolve() for name in without}

    def below(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.name.endswith(_PASSING_SUFFIXES) or path.resolve() in unwanted:
                continue
            if path.is_symlink():
                raise BackupError(
                    f"{path} is a link, and a backup holds none; put what it points to into the "
                    "home, and try again"
                )
            if path.is_dir():
                yield from below(path)
            elif path.is_file():
                yield path

    return below(home)


def copy_database(path: Path, to: Path) -> None:
    """Copy a SQLite database as it is between two transactions of others.

    Raises:
        BackupError: it is damaged, or somebody holds it for too long.
    """
    to.unlink(missing_ok=True)
    _new_secret(to).close()
    try:
        with (
            closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as source,
            closing(sqlite3.connect(to)) as target,
        ):
            source.execute(f"PRAGMA busy_timeout = {1000 * _BUSY_S:.0f}")
            source.execute("BEGIN")  # ``backup`` itself would wait for a lock without end
            source.execute("SELECT 1 FROM sqlite_master").fetchone()
            source.backup(target)
    except sqlite3.Error as error:
        raise BackupError(
            f"cannot copy the database {path}: {error}; nothing was written"
        ) from error


def _new_secret(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")
