"""Pseudonyms: keyed hashes that only the site can make, and nobody can turn back.

The key is a file of the site. Whoever has it can test guesses of a name, so it stays at the site
beside the slides; losing it means that a store made later shares no id with one made before.
"""

import hashlib
import hmac
import secrets
import stat
import unicodedata
from pathlib import Path

from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.patient_names import likeness, participant
from crafts_core.durable import create_secret

SALT_BYTES = 32
_ID_HEX = 32


class Salt:
    """The site's secret key for pseudonyms. Never printed."""

    def __init__(self, key: bytes) -> None:
        if len(key) != SALT_BYTES:
            raise ValueError(f"expected {SALT_BYTES} bytes, got {len(key)}")
        self._key = key

    def __repr__(self) -> str:
        return "Salt(****)"

    @classmethod
    def create(cls, path: Path) -> "Salt":
        """Make a new salt file, readable by its owner only; an existing one is never replaced."""
        key = secrets.token_bytes(SALT_BYTES)
        try:
            create_secret(path, key)
        except FileExistsError as error:
            raise IngestError(
                f"salt file {path} exists; replacing it would change every id of this site"
            ) from error
        return cls(key)

    @classmethod
    def load(cls, path: Path) -> "Salt":
        """Read a salt file.

        Raises:
            IngestError: it is missing, has another length, or others may read it.
        """
        try:
            mode, key = path.stat().st_mode, path.read_bytes()
        except OSError as error:
            raise IngestError(f"cannot read salt file {path}: {error.strerror}") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise IngestError(f"salt file {path} is open to others; run: chmod 600 {path}")
        if len(key) != SALT_BYTES:
            raise IngestError(f"salt file {path}: expected {SALT_BYTES} bytes, got {len(key)}")
        return cls(key)

    def patient_id(self, patient: str) -> str:
        """The same however a name is spaced, capitalised or composed in Unicode."""
        return self._pseudonym("patient", plain_name(patient))

    def alike_id(self, patient: str) -> str:
        """The same for all names that may be one patient's, as ``likeness`` tells."""
        return self._pseudonym("alike", likeness(participant(patient)))

    def case_id(self, patient: str, case: str) -> str:
        return self._pseudonym("case", plain_name(patient), case)

    def slide_id(self, patient: str, name: str) -> str:
        return self._pseudonym("slide", plain_name(patient), name)

    def key(self, *parts: str) -> str:
        """64 hex digits that are the same only for the same parts."""
        return self._digest("key", *parts)

    def tile_id(self, slide_id: str, x: int, y: int) -> str:
        return self._pseudonym("tile", slide_id, str(x), str(y))

    def _pseudonym(self, *parts: str) -> str:
        """128 bits are enough that no two of a site collide."""
        return self._digest(*parts)[:_ID_HEX]

    def _digest(self, *parts: str) -> str:
        """HMAC-SHA256 over length-prefixed parts, so no two tuples collide."""
        encoded = [part.encode() for part in parts]
        message = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()


def plain_name(name: str) -> str:
    """The name without what people write now so, now so; of a barcode, whose sample it is."""
    return " ".join(unicodedata.normalize("NFKC", participant(name)).casefold().split())
