"""Finding the files that a table names, as file servers, Macs and data managers keep them.

A name may be spelt in another Unicode form than the folder has it. A link is not resolved: what
belongs to a slide lies beside the link, while its target may stand alone in a store of contents.
"""

import os
import unicodedata
from collections import defaultdict
from pathlib import Path


class NamedFiles:
    """Files below one folder. Remembers what folders hold, so it lives as long as one reading."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def find(self, name: str) -> tuple[Path, str | None]:
        """Where a file or folder is, and what is wrong with it."""
        if not name:
            return self.base, "no file"
        try:
            path = self._spelt(name).absolute()
            problem = self._problem(name, path)
        except (OSError, ValueError, RuntimeError) as error:  # too long, or no name at all
            return self.base, f"file {name!r} cannot be looked for: {error}"
        return path, problem

    def _problem(self, name: str, path: Path) -> str | None:
        if not path.exists():
            return self._why_missing(name, path)
        if not (path.is_file() or path.is_dir()):
            return f"file {name} is neither a file nor a folder"
        if target(self.base).is_relative_to(target(path)):
            return f"file {name} is the folder of all slides, not a slide"
        if not os.access(path, os.R_OK):
            return f"file {name} may not be read; check its permissions"
        return None

    def _why_missing(self, name: str, path: Path) -> str:
        if path.is_symlink():
            if _goes_in_a_circle(path):
                return f"file {name} is a link that leads back to itself"
            return (
                f"file {name} is a link to nothing; fetch what it leads to (git annex get, dvc "
                "pull), or mend the link"
            )
        if "\\" in name and self._spelt(name.replace("\\", "/")).exists():
            return f"file {name} does not exist below {self.base}; write / for \\"
        alike = [
            entry
            for entries in self._listing(path.parent).values()
            for entry in entries
            if entry.casefold() == path.name.casefold()
        ]
        hint = f"; there is {alike[0]}: write it so" if alike else ""
        return f"file {name} does not exist below {self.base}{hint}"

    def _spelt(self, name: str) -> Path:
        """The name as folders have it, where only its Unicode form differs."""
        path = self.base / name
        if os.path.lexists(path):
            return path
        found = self.base
        for part in Path(name).parts:
            entry = found / part
            if not os.path.lexists(entry):
                alike = self._listing(found).get(composed(part), [])
                if len(alike) != 1:
                    return path
                entry = found / alike[0]
            found = entry
        return found

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """What a folder holds, by composed name."""
        if folder not in self._listings:
            names: dict[str, list[str]] = defaultdict(list)
            for entry in folder.iterdir() if folder.is_dir() else ():
                names[composed(entry.name)].append(entry.name)
            self._listings[folder] = dict(names)
        return self._listings[folder]


def target(path: Path) -> Path:
    """What a path leads to, as far as it leads."""
    return Path(os.path.realpath(path))  # Path.resolve raises where links go in a circle


def composed(name: str) -> str:
    """A name in the one Unicode form that names are compared in."""
    return unicodedata.normalize("NFC", name)


def _goes_in_a_circle(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:  # too many levels of links
        return True
    return False
