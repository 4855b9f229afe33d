"""Which code runs here, as one number that two sites can compare."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = (
    "crafts_core",
    "crafts_privacy",
    "crafts_client",
    "crafts_server",
    "crafts_simulations",
)


def code_sha256() -> str:
    """SHA-256 over the names and contents of all files of the installed packages."""
    whole = hashlib.sha256()
    for name in _PACKAGES:
        spec = find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    content = hashlib.sha256(path.read_bytes()).hexdigest()
                    whole.update(
                        f"{name}/{path.relative_to(folder).as_posix()} {content}\n".encode()
                    )
    return whole.hexdigest()
