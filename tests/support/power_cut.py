"""A power cut in effect: what a process wrote below a folder and did not sync is gone.

``power_cut.c`` is preloaded into the process and keeps what was synced, whoever asked for it:
Python's ``os.fsync`` and SQLite's own. Strict: a file keeps what it held when it was last synced, a
folder the names that it had when it was last synced itself. Needs Linux and a C compiler.
"""

import shutil
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")


def compiler() -> str | None:
    """Of C, if this machine has one."""
    return shutil.which("cc") or shutil.which("gcc")


def environment(folder: Path, root: Path) -> dict[str, str]:
    """Variables of a process whose syncs below ``root`` are kept in ``folder``."""
    library, found = folder / "power_cut.so", compiler()
    assert found is not None
    command = [found, "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    kept = folder / "kept"
    kept.mkdir()
    return {"LD_PRELOAD": str(library), "DISK_ROOT": str(root), "DISK_KEPT": str(kept)}


def settle(root: Path, kept: Path) -> None:
    """From now on everything that lies below ``root`` is on the disk, and nothing else."""
    shutil.rmtree(kept)
    kept.mkdir()
    for path in (root, *root.rglob("*")):
        inode = path.stat().st_ino
        if path.is_dir():
            names = [f"{each.stat().st_ino} {each.name}\n" for each in path.iterdir()]
            (kept / f"folder-{inode}").write_text("".join(names))
        else:
            shutil.copyfile(path, kept / f"file-{inode}")
            (kept / f"held-{inode}").hardlink_to(path)  # or another file gets the inode


def cut(root: Path, kept: Path) -> None:
    """The power goes off and on again: ``root`` holds what had been synced."""
    left = root.with_name(f"{root.name}-after")
    _put_back(left, root.stat().st_ino, kept)
    shutil.rmtree(root)
    left.rename(root)
    settle(root, kept)


def _put_back(path: Path, inode: int, kept: Path) -> None:
    path.mkdir(mode=0o700)
    for line in (kept / f"folder-{inode}").read_text().splitlines():
        number, _, name = line.partition(" ")
        file = kept / f"file-{number}"
        if (kept / f"folder-{number}").exists():
            _put_back(path / name, int(number), kept)
        elif file.exists():
            shutil.copyfile(file, path / name)
        else:  # its name was synced and its content never
            (path / name).touch()
        if not (path / name).is_dir():
            (path / name).chmod(0o600)  # a home is its owner's; modes are not kept here
