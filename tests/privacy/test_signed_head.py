"""A head is its site's own word: nobody else can say it, and none of it can be changed."""

import pytest
from pydantic import ValidationError

from crafts_privacy import signing
from crafts_privacy.signed_head import SignedHead
from crafts_privacy.signing import SignatureError
from crafts_privacy.witness import LedgerHead

HEAD = LedgerHead(ledger_id="1" * 32, sequence=7, hash="2" * 64)


@pytest.fixture
def key(tmp_path):
    signing.create_signing_key(tmp_path / "site.key")
    return signing.load_signing_key(tmp_path / "site.key")


def signed(key, **about: str) -> SignedHead:
    return SignedHead.sign(key, HEAD, **({"site": "north", "ledger": "3" * 32} | about))


def test_what_a_site_signed_is_accepted_and_says_what_it_was(key) -> None:
    head = signed(key)
    head.check()
    assert head.head == HEAD
    assert head.fingerprint == signing.fingerprint(signing.public_key_of(key))
    again = SignedHead.model_validate_json(head.model_dump_json())
    again.check()
    assert SignedHead.of(again) == head


@pytest.mark.parametrize(
    "change",
    [
        *({"site": "south"}, {"ledger": "4" * 32}, {"ledger_id": "4" * 32}, {"sequence": 6}),
        *({"hash": "4" * 64}, {"signed_at": 1}),
    ],
)
def test_no_field_can_be_changed(key, change: dict) -> None:
    with pytest.raises(SignatureError):
        signed(key).model_copy(update=change).check()


def test_another_key_cannot_sign_for_it(key, tmp_path) -> None:
    signing.create_signing_key(tmp_path / "other.key")
    other = signed(signing.load_signing_key(tmp_path / "other.key"))
    with pytest.raises(SignatureError):
        other.model_copy(update={"public_key": signing.public_key_of(key)}).check()


@pytest.mark.parametrize("field", ["public_key", "signature"])
def test_base64_has_one_spelling(key, field: str) -> None:
    """The last character before the padding has bits that say nothing."""
    head = signed(key)
    text = getattr(head, field)
    body, padding = text.rstrip("="), text[len(text.rstrip("=")) :]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = body[:-1] + letters[letters.index(body[-1]) ^ 1] + padding
    with pytest.raises(SignatureError, match="as base64 writes it"):
        head.model_copy(update={field: other}).check()


@pytest.mark.parametrize(
    "change", [{"sequence": -1}, {"sequence": "7"}, {"site": "../x"}, {"hash": "2" * 63}]
)
def test_what_cannot_be_a_head_is_none(key, change: dict) -> None:
    with pytest.raises(ValidationError):
        SignedHead.model_validate(signed(key).model_dump() | change)
