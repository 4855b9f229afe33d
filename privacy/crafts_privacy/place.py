"""Where a ledger lies, as three hashes: what stays the same there, and is another in a copy.

A ledger answers for all copies of itself only if it is the only one that pays. So it is bound to

* the *folder*: its absolute path, links resolved;
* the *files*: inode numbers of the ledger and of its folder, which copying, restoring and hard
  linking a folder change, whatever else they preserve;
* the *machine*: ``/etc/machine-id``, compared only where both times there was one (containers have
  none).

All three outlive reboots, remounts of a disk or an NFS share, and new containers on the same
volume. A cloned disk or virtual machine has the same three, and nothing here can tell: only a
witness elsewhere can. Nothing of the machine can be read from the hashes: each is salted with the
ledger's random id.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MACHINE_ID = Path("/etc/machine-id")
_NONE = "-"
_MACHINE_ID_CHARACTERS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One place. As text it is what the ledger's entry holds."""

    folder: str
    files: str
    machine: str
    """``-`` where the machine has no id."""

    @classmethod
    def of(cls, ledger_path: Path, ledger_id: str) -> Self:
        """Where a ledger's file lies now.

        Raises:
            OSError: it cannot be found.
        """
        path = ledger_path.resolve()
        inodes = f"{path.stat().st_ino}:{path.parent.stat().st_ino}"
        machine = _machine_id()

        def hashed(what: str, value: str) -> str:
            return hashlib.sha256(f"{ledger_id}:{what}:{value}".encode()).hexdigest()[:16]

        return cls(
            folder=hashed("folder", str(path.parent)),
            files=hashed("files", inodes),
            machine=hashed("machine", machine) if machine else _NONE,
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """What ``str`` gave."""
        folder, files, machine = text.split(" ")
        return cls(folder=folder, files=files, machine=machine)

    def __str__(self) -> str:
        return f"{self.folder} {self.files} {self.machine}"

    def differences(self, other: "Place") -> list[str]:
        """What is another here; nothing means that this is the same place."""
        pairs = {
            "another folder": (self.folder, other.folder),
            "other files": (self.files, other.files),
            "another machine": (self.machine, other.machine),
        }
        if _NONE in pairs["another machine"]:
            del pairs["another machine"]
        return [words for words, (mine, theirs) in pairs.items() if mine != theirs]


def _machine_id() -> str:
    """Empty where there is none."""
    try:
        found = MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return found if len(found) == _MACHINE_ID_CHARACTERS else ""
