"""Ed25519 signatures over exact bytes: who asked for a plan, who wrote a checkpoint.

Public keys and signatures are base64 of their raw bytes. A key file is an unencrypted PKCS#8 PEM
that only its owner can read; anything looser is refused.
"""

import base64
import binascii
import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from crafts_core.durable import create_secret
from crafts_privacy.errors import PrivacyError

_PUBLIC_KEY_BYTES = 32
_SIGNATURE_BYTES = 64


class SignatureError(PrivacyError):
    """A signature or key is missing, malformed, or does not belong to these bytes."""


def create_signing_key(path: Path) -> str:
    """Make a key in a new file (mode 0600) and return its public key.

    Raises:
        FileExistsError: there is a file already; a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    create_secret(path, pem)
    return public_key_of(key)


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read a key file.

    Raises:
        SignatureError: the file is missing, readable by others, or not an Ed25519 key.
    """
    try:
        mode = path.stat().st_mode & 0o777
        pem = path.read_bytes()
    except OSError as error:
        raise SignatureError(f"cannot read signing key {path}: {error.strerror}") from error
    if mode & 0o077:
        raise SignatureError(f"signing key {path} has mode {mode:03o}; run chmod 600 on it")
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path} is not an unencrypted PEM key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path} is not an Ed25519 key")
    return key


def public_key_of(key: Ed25519PrivateKey) -> str:
    """The public key that ``verify`` wants, as base64."""
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return base64.b64encode(raw).decode("ascii")


def fingerprint(public_key: str) -> str:
    """SHA-256 of a public key, for two people to compare.

    Raises:
        SignatureError: it is no public key.
    """
    return hashlib.sha256(_decoded(public_key, _PUBLIC_KEY_BYTES, "public key")).hexdigest()


def sign(key: Ed25519PrivateKey, payload: bytes) -> str:
    """Sign exactly these bytes; base64."""
    return base64.b64encode(key.sign(payload)).decode("ascii")


def verify(public_key: str, payload: bytes, signature: str) -> None:
    """Accept only a signature that ``public_key`` made over exactly these bytes.

    That the key is one to be trusted is the caller's check, and comes first.

    Raises:
        SignatureError: in every other case.
    """
    raw_key = _decoded(public_key, _PUBLIC_KEY_BYTES, "public key")
    raw_signature = _decoded(signature, _SIGNATURE_BYTES, "signature")
    try:
        Ed25519PublicKey.from_public_bytes(raw_key).verify(raw_signature, payload)
    except InvalidSignature as error:
        raise SignatureError("the signature does not belong to these bytes and this key") from error


def _decoded(text: str, num_bytes: int, what: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SignatureError(f"the {what} is not base64") from error
    if len(raw) != num_bytes:
        raise SignatureError(f"expected a {what} of {num_bytes} bytes, got {len(raw)}")
    if base64.b64encode(raw).decode("ascii") != text:  # unused bits of the last character
        raise SignatureError(f"the {what} is not written as base64 writes it")
    return raw
