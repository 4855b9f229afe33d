"""The token in the links of a home's pages: whoever has it may look."""

import secrets
from pathlib import Path

from crafts_core.durable import create_secret
from crafts_core.errors import CraftsError

TOKEN_FILE = "dashboard.token"  # noqa: S105  # its name
_TOKEN_BYTES = 32


class TokenError(CraftsError):
    """There is a file for the token of the links, and no token in it."""


def token_of(home: Path) -> str:
    """The token of a home's links; made at first, the owner's alone, another if it is removed.

    Raises:
        TokenError: the file holds none.
    """
    path = home / TOKEN_FILE
    if not path.exists():
        create_secret(path, secrets.token_urlsafe(_TOKEN_BYTES).encode())
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < _TOKEN_BYTES or not token.isascii():
        raise TokenError(f"{path} holds no token; remove it, and the next start makes one")
    return token
