"""The post office for heads of ledgers: who gets what, and what is not taken."""

from pathlib import Path

import pytest

from crafts_privacy import signing
from crafts_privacy.signed_head import SignedHead
from crafts_privacy.witness import LedgerHead
from crafts_server.errors import EnrolmentError
from crafts_server.registry import Registry
from crafts_server.signed_heads import MAX_HELD, SignedHeads


@pytest.fixture
def heads(database_url: str):
    registry = Registry(database_url)
    yield SignedHeads(registry)
    registry.close()


@pytest.fixture
def head(tmp_path: Path):
    signing.create_signing_key(tmp_path / "key")
    key = signing.load_signing_key(tmp_path / "key")

    def make(site: str, sequence: int, ledger: int = 0) -> SignedHead:
        at = LedgerHead(ledger_id="1" * 32, sequence=sequence, hash=f"{sequence:064x}")
        return SignedHead.sign(key, at, site=site, ledger=f"{ledger:032x}")

    return make


def test_each_gets_the_others_heads_and_what_they_hold_of_it(heads, head) -> None:
    north, south, west = head("north", 4), head("south", 7), head("west", 2)
    assert heads.exchange("north", north, []) == ([], [])
    assert heads.exchange("south", south, []) == ([], [north])
    assert heads.exchange("west", west, [head("north", 3), south]) == ([], [north, south])
    of_north, of_others = heads.exchange("north", head("north", 5), [])
    assert [each.sequence for each in of_north] == [3]
    assert of_others == [south, west]


def test_what_a_site_said_before_is_replaced(heads, head) -> None:
    for sequence in (1, 2, 3):
        heads.exchange("north", head("north", sequence), [head("south", sequence)])
    of_south, of_others = heads.exchange("south", head("south", 9), [])
    assert [each.sequence for each in (*of_south, *of_others)] == [3, 3]


def test_too_many_are_refused(heads, head) -> None:
    mine = head("north", 1)
    many = [head("south", 1, ledger=number) for number in range(MAX_HELD + 1)]
    thrice = [head("south", number) for number in range(3)]
    for held in (many, thrice):
        with pytest.raises(EnrolmentError, match="too many"):
            heads.exchange("north", mine, held)
    heads.exchange("north", mine, many[:-1])


def test_what_a_key_did_not_sign_is_refused(heads, head) -> None:
    invented = head("south", 3).model_copy(update={"sequence": 30})
    with pytest.raises(EnrolmentError, match="not signed by its key"):
        heads.exchange("north", head("north", 1), [invented])
