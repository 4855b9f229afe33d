"""The app bundle (Flower's FAB) of a study: no code, only the names of what is installed.

Flower ships a bundle with every run. Ours holds one file that says which installed functions to
call; a site compares every value of it with what its own installed version would say, so no other
code, name or version is ever looked at, and nothing of a bundle is ever unpacked.
"""

import io
import tomllib
import zipfile

from crafts_core import __version__

PUBLISHER, NAME = "crafts", "crafts-federated"
SERVER_APP, CLIENT_APP = "crafts_server.server_app:app", "crafts_client.client_app:app"
FILE = "pyproject.toml"
_FILES = {FILE, ".info/CONTENT"}
_MOST_BYTES = 64 * 1024

TEXT = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{NAME}"
version = "{__version__}"
description = "Runs what is installed"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "{PUBLISHER}"

[tool.flwr.app.components]
serverapp = "{SERVER_APP}"
clientapp = "{CLIENT_APP}"
"""


def is_ours(content: bytes) -> bool:
    """Whether a bundle is the code-free one of exactly this installed version."""
    if len(content) > _MOST_BYTES:
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = archive.infolist()
            names = [file.filename for file in files]
            if sorted(names) != sorted(_FILES) or sum(f.file_size for f in files) > _MOST_BYTES:
                return False
            found = tomllib.loads(archive.read(FILE).decode())
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, ValueError):
        return False  # what cannot be read is not ours
    return found == tomllib.loads(TEXT)
