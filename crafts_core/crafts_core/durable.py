"""Files and directories that are there completely or not at all, also after a power failure."""

import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_POLL_S = 0.02
_BINARY = getattr(os, "O_BINARY", 0)
"""Windows alone has it, and without it turns line ends into its own."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""From file systems that know no second name of a file."""
_BLOCK_BYTES = 64 * 1024


def write_file(path: Path, content: bytes | str, *, mode: int = 0o644) -> None:
    """Replace ``path`` atomically: temporary file, fsync, rename, fsync of the directory.

    Args:
        path: What a reader sees only whole.
        content: Text is written as UTF-8.
        mode: Permissions from the first byte on (less the umask); 0o600 for what is the owner's.
    """
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    _write_synced(temporary, content.encode() if isinstance(content, str) else content, mode)
    temporary.replace(path)
    sync(path.parent)


def write_directory(path: Path, files: Mapping[str, bytes | memoryview]) -> None:
    """Create ``path`` with ``files`` in it, atomically.

    A half-written predecessor of the same name is removed; a complete one is an error.

    Raises:
        FileExistsError: ``path`` is there already.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists")
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, content in files.items():
        _write_synced(temporary / name, content, 0o644)
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def share_as_umask_says(directory: Path, like: Path) -> None:
    """Give every file of a directory the permissions of ``like``, which was written plainly.

    Libraries write weights through temporary files, which only their owner may read.
    """
    mode = stat.S_IMODE(like.stat().st_mode)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def create_secret(path: Path, content: bytes) -> None:
    """Write a new file that only its owner may read, whole or not at all.

    Raises:
        FileExistsError: there is a file already; a secret is never replaced.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        _write_synced(temporary, content, 0o600)
        os.link(temporary, path)  # unlike a rename it never replaces
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _write_synced(path, content, 0o600)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def exclusive_lock(
    path: Path, *, held: Exception, timeout_s: float = 0.0, is_shared: bool = False
) -> Iterator[None]:
    """Hold an advisory lock on ``path``; the kernel frees it when the process dies.

    Args:
        path: Made if it is missing. Who holds the lock may remove it: whoever waited for it then
            waits for the file that is there now.
        held: Raised when another process or thread held it for the whole time.
        timeout_s: How long to wait for it.
        is_shared: Keep out only those who want it for themselves alone.
    """
    deadline = time.monotonic() + timeout_s
    while (descriptor := _locked(path, is_shared)) is None:
        if time.monotonic() >= deadline:
            raise held
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path, is_shared: bool) -> int | None:
    """A descriptor that holds the lock of the file at ``path``; None where another has it."""
    import fcntl  # of Unix; only coordinators and sites lock anything, and they run on Linux

    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    with ExitStack() as closing:
        closing.callback(os.close, descriptor)
        with suppress(BlockingIOError, FileNotFoundError):
            kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                closing.pop_all()
                return descriptor
    return None


def append_line(path: Path, line: str, *, mode: int = 0o644) -> None:
    """Add one line to a file, durably. A line that a crash tore stays torn; this one is whole."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode), "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        torn = size > 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def newest_lines(path: Path, most: int) -> tuple[list[bytes], int]:
    """The whole lines at a file's end, read from the end: as quick in a file of years.

    Args:
        path: Of a file of lines; one that is missing has none.
        most: How many lines at most.

    Returns:
        The lines without their ends, oldest first, and how many bytes of a torn one follow them.
    """
    try:
        with path.open("rb") as file:
            place = file.seek(0, os.SEEK_END)
            tail = b""
            while place > 0 and tail.count(b"\n") <= most:
                step = min(_BLOCK_BYTES, place)
                place = file.seek(place - step)
                tail = file.read(step) + tail
    except FileNotFoundError:
        return [], 0
    *lines, torn = tail.split(b"\n")
    return (lines if place == 0 else lines[1:])[-most:], len(torn)


def sync(path: Path) -> None:
    """Make a file's content, or the renames and new files in a directory, outlive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories; NTFS keeps a journal of names itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, content: bytes | memoryview, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
