"""What a site keeps of other sites' ledgers, and what raises an alarm."""

from pathlib import Path

import pytest

from crafts_client.errors import EnrolmentError, HomeError
from crafts_client.ledger_witness import check_own_heads
from crafts_client.peer_heads import MAX_LEDGERS, MAX_OF_A_SITE, PeerHeads
from crafts_privacy import signing
from crafts_privacy.errors import LedgerTamperedError
from crafts_privacy.ledger import Ledger
from crafts_privacy.signed_head import SignedHead
from crafts_privacy.witness import LedgerHead


class Peer:
    """Another site, honest or not, that can sign anything about its ledger."""

    def __init__(self, folder: Path, name: str = "south") -> None:
        path = folder / f"{name}{len(list(folder.iterdir()))}.key"
        signing.create_signing_key(path)
        self._key, self._name = signing.load_signing_key(path), name

    def head(
        self,
        sequence: int,
        *,
        history: str = "a",
        ledger_id: str = "1" * 32,
        ledger: str = "3" * 32,
        at: int = 0,
    ) -> SignedHead:
        """``at`` in seconds after or before 2026."""
        head = LedgerHead(ledger_id=ledger_id, sequence=sequence, hash=f"{history}{sequence:063x}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("crafts_privacy.signed_head.datetime", _Clock(1_767_225_600 + at))
            return SignedHead.sign(self._key, head, site=self._name, ledger=ledger)


class _Clock:
    def __init__(self, seconds: int) -> None:
        self._seconds = seconds

    def now(self, _zone: object) -> "_Clock":
        return self

    def timestamp(self) -> float:
        return float(self._seconds)


@pytest.fixture
def peer(tmp_path: Path) -> Peer:
    (tmp_path / "keys").mkdir()
    return Peer(tmp_path / "keys")


@pytest.fixture
def heads(tmp_path: Path) -> PeerHeads:
    return PeerHeads(tmp_path / "peer_heads.json")


def test_the_newest_is_kept_and_a_late_one_is_no_alarm(heads, peer, caplog) -> None:
    old, new = peer.head(5, at=10), peer.head(9, at=20)
    heads.keep([old])
    heads.keep([new])
    heads.keep([old, new])
    assert heads.held() == [new]
    assert "alarm" not in caplog.text


def test_a_clock_that_is_set_back_a_little_is_no_alarm(heads, peer) -> None:
    heads.keep([peer.head(5, at=200), peer.head(6, at=0)])
    assert [head.sequence for head in heads.held()] == [6]


@pytest.mark.parametrize(
    "against",
    [
        {"sequence": 9, "history": "b"},
        {"sequence": 7, "at": 3600},
        {"sequence": 12, "at": -3600},
        {"sequence": 12, "ledger_id": "2" * 32},
    ],
)
def test_a_ledger_that_went_back_or_two_ways_raises_an_alarm_and_both_are_kept(
    heads, peer, caplog, against: dict
) -> None:
    first, second = peer.head(9), peer.head(**against)
    heads.keep([first])
    heads.keep([second])
    heads.keep([first, second])
    assert heads.held() == [first, second]
    assert caplog.text.count("alarm: two ledgers of site=south") == 1


def test_another_key_for_a_known_site_raises_an_alarm(heads, peer, tmp_path, caplog) -> None:
    heads.keep([peer.head(9)])
    heads.keep([Peer(tmp_path / "keys").head(10)])
    assert "alarm" in caplog.text
    assert [head.sequence for head in heads.held()] == [9, 10]


def test_an_alarm_does_not_end_what_is_known(heads, peer) -> None:
    """Of the first ledger newer heads still count; of further contradictions one is enough."""
    heads.keep([peer.head(9), peer.head(9, history="b"), peer.head(9, history="c"), peer.head(11)])
    assert [(head.sequence, head.hash[0]) for head in heads.held()] == [(11, "a"), (9, "b")]


def test_what_the_site_did_not_sign_is_not_kept(heads, peer, caplog) -> None:
    """A coordinator that invents a head has no key for it."""
    heads.keep([peer.head(5).model_copy(update={"sequence": 50})])
    assert heads.held() == []
    assert "was not signed by its key" in caplog.text


def test_only_what_its_own_key_signed_stops_a_site(peer, tmp_path, caplog) -> None:
    """Anybody can make a key and sign a head in another's name."""
    ledger = Ledger(tmp_path / "ledger.db")
    strange = peer.head(5)
    check_own_heads(ledger, "another key", [strange])
    assert "alarm: others hold heads of this site that another key has signed" in caplog.text
    with pytest.raises(LedgerTamperedError, match="a head of 5 entries"):
        check_own_heads(ledger, strange.public_key, [strange])
    forged = strange.model_copy(update={"sequence": 6})
    with pytest.raises(EnrolmentError, match="never signed"):
        check_own_heads(ledger, strange.public_key, [forged])


def test_no_coordinator_fills_the_disk(heads, tmp_path, peer) -> None:
    heads.keep(Peer(tmp_path / "keys", f"s{number}").head(1) for number in range(MAX_LEDGERS + 9))
    assert len(heads.read()) == MAX_LEDGERS


def test_no_hospital_takes_the_room_of_another(heads, tmp_path, peer, caplog) -> None:
    """Its ledger's name is its own word, and a new one at each exchange costs it nothing."""
    evil = Peer(tmp_path / "keys", "evil")
    for number in range(MAX_LEDGERS + 2):
        heads.keep([evil.head(1, ledger=f"{number:032x}")])
    assert len(heads.read()) == MAX_OF_A_SITE
    assert "site=evil shows one ledger too many" in caplog.text
    heads.keep([peer.head(9)])
    heads.keep([peer.head(4, at=1000)])
    assert [each.against is not None for each in heads.read() if each.newest.site == "south"] == [
        True
    ]


def test_the_file_is_the_owners_and_a_damaged_one_is_named(heads, peer, tmp_path) -> None:
    heads.keep([peer.head(5)])
    path = tmp_path / "peer_heads.json"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("[")
    with pytest.raises(HomeError, match=r"cannot read .*peer_heads\.json"):
        heads.held()
