"""Masks of pairs: each two members share one, one adds it, the other subtracts it.

A mask is ChaCha20 (RFC 8439) under a key from X25519 (RFC 7748) and HKDF-SHA256 (RFC 5869), salted
with ``members_hash``: the same two keys under another announcement give an unrelated mask. A key
pair lives in memory only, and answers one announcement.
"""

import base64
import binascii
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from numpy.typing import NDArray

from crafts_privacy.secure_aggregation.members import Members, MembersError

Group = NDArray[np.uint32]
"""Numbers modulo 2**32; letter D counts coordinates."""

_CHUNK = 1 << 16
"""Numbers at a time: what stays in a processor's cache."""
_NONCE = bytes(16)
"""Block counter 0 and nonce 0: a pair's key is used once."""


class MaskKey:
    """A site's key pair for one request."""

    def __init__(self, private: X25519PrivateKey | None = None) -> None:
        """Fresh from the operating system's entropy, unless a test brings its own."""
        self._private = private or X25519PrivateKey.generate()
        self._members_hash: str | None = None

    @property
    def public_key(self) -> str:
        """Base64 of the raw key: what the site signs and sends."""
        raw = self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return base64.b64encode(raw).decode("ascii")

    def pair_keys(self, site: str, members: Members) -> list[tuple[bytes, bool]]:
        """The key of each pair that ``site`` is one of, and whether it adds that pair's mask.

        Raises:
            MembersError: this key has answered another announcement, or a member's key is none.
        """
        if self._members_hash not in (None, members.hash):
            raise MembersError("this site's key has answered another announcement")
        pairs = [
            (_pair_key(self._private, key, members.hash, *sorted((site, peer))), site < peer)
            for peer, key in members.keys.items()
            if peer != site
        ]
        self._members_hash = members.hash
        return pairs


def add_masks_(vector_D: Group, pairs: Iterable[tuple[bytes, bool]]) -> None:
    """Add or subtract a mask for each pair, in place."""
    zeros = bytes(4 * min(_CHUNK, len(vector_D)))
    mask = np.empty(len(zeros), dtype=np.uint8)
    for key, adds in pairs:
        stream = Cipher(algorithms.ChaCha20(key, _NONCE), mode=None).encryptor()
        for start in range(0, len(vector_D), _CHUNK):
            chunk_D = vector_D[start : start + _CHUNK]
            room = mask[: 4 * len(chunk_D)]
            stream.update_into(zeros[: len(room)], room.data)
            words_D = room.view("<u4")
            if adds:
                chunk_D += words_D
            else:
                chunk_D -= words_D


def add_up_(sum_D: Group, vector_D: Group) -> None:
    """Add a member's vector to the sum, in place; once all are in, the masks are gone."""
    if sum_D.shape != vector_D.shape:
        raise ValueError(f"expected {sum_D.shape}, got {vector_D.shape}")
    sum_D += vector_D


def _pair_key(
    private: X25519PrivateKey, peer_key: str, members_hash: str, first: str, second: str
) -> bytes:
    try:
        public = X25519PublicKey.from_public_bytes(base64.b64decode(peer_key, validate=True))
        shared = private.exchange(public)
    except (ValueError, binascii.Error) as error:  # of low order, too
        raise MembersError("a member's key is no X25519 key") from error
    info = f"crafts-mask-v1|{first}|{second}".encode()
    salt = bytes.fromhex(members_hash)
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=info).derive(shared)
