"""Signatures belong to exact bytes and one key; key files are for their owner only."""

import base64
from pathlib import Path

import pytest

from crafts_privacy.signing import (
    SignatureError,
    create_signing_key,
    load_signing_key,
    public_key_of,
    sign,
    verify,
)

PAYLOAD = b'{"study":"small"}'


@pytest.fixture
def key_path(tmp_path: Path) -> Path:
    create_signing_key(tmp_path / "key")
    return tmp_path / "key"


def test_a_signature_is_accepted(key_path: Path) -> None:
    key = load_signing_key(key_path)
    verify(public_key_of(key), PAYLOAD, sign(key, PAYLOAD))


@pytest.mark.parametrize("position", range(len(PAYLOAD)))
def test_any_flipped_byte_is_refused(key_path: Path, position: int) -> None:
    key = load_signing_key(key_path)
    changed = bytearray(PAYLOAD)
    changed[position] ^= 1
    with pytest.raises(SignatureError):
        verify(public_key_of(key), bytes(changed), sign(key, PAYLOAD))


def test_another_key_is_refused(key_path: Path, tmp_path: Path) -> None:
    other = create_signing_key(tmp_path / "other")
    with pytest.raises(SignatureError):
        verify(other, PAYLOAD, sign(load_signing_key(key_path), PAYLOAD))


@pytest.mark.parametrize("text", ["", "no base64!", "é", base64.b64encode(b"short").decode()])
def test_malformed_keys_and_signatures_are_refused(key_path: Path, text: str) -> None:
    key = load_signing_key(key_path)
    with pytest.raises(SignatureError):
        verify(text, PAYLOAD, sign(key, PAYLOAD))
    with pytest.raises(SignatureError):
        verify(public_key_of(key), PAYLOAD, text)


def test_a_key_file_is_private_and_never_overwritten(key_path: Path) -> None:
    assert key_path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        create_signing_key(key_path)


def test_a_key_that_others_can_read_is_refused(key_path: Path) -> None:
    key_path.chmod(0o640)
    with pytest.raises(SignatureError, match="chmod 600"):
        load_signing_key(key_path)


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(SignatureError, match="cannot read"):
        load_signing_key(path)
    path.write_text("not a key")
    path.chmod(0o600)
    with pytest.raises(SignatureError, match="PEM"):
        load_signing_key(path)
