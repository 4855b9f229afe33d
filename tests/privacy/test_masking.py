"""Masks cancel over exactly the set that every member was shown, and hide a vector in any other."""

import base64
import hashlib
import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from crafts_privacy.secure_aggregation.masking import Group, MaskKey, add_masks_, add_up_
from crafts_privacy.secure_aggregation.members import Members, MembersError
from support.sums import SumSite, members_of, sum_sites

RFC7748_ALICE = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
RFC7748_BOB = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
RFC7748_SHARED = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
RFC8439_ZERO_KEY = (  # A.1, test vector 1
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)


def members_with(keys: dict[str, str], digest: str = "5" * 64) -> Members:
    return Members(hash=digest, keys=keys, declared_patients=1, noise_multiplier=1.0)


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, written down once more."""
    block, output = b"", b""
    extracted = hmac.digest(salt, secret, "sha256")
    while len(output) < length:
        counter = bytes([len(output) // 32 + 1])
        block = hmac.digest(extracted, block + info + counter, "sha256")
        output += block
    return output[:length]


def masked(site: SumSite, members: Members, vector_D: Group) -> Group:
    result_D = vector_D.copy()
    add_masks_(result_D, site.mask_key.pair_keys(site.name, members))
    return result_D


def zeros(num: int) -> Group:
    return np.zeros(num, dtype=np.uint32)


def is_uniform(words: Group) -> bool:
    """Mean and mean square of uniform words, each within five standard errors."""
    unit = words.astype(np.float64) / 2.0**32
    root = len(unit) ** 0.5
    mean_z = abs(unit.mean() - 0.5) / (1 / 12) ** 0.5 * root
    square_z = abs((unit**2).mean() - 1 / 3) / (4 / 45) ** 0.5 * root
    return bool(mean_z < 5 and square_z < 5)


def test_the_key_of_a_pair_is_made_as_the_rfcs_say() -> None:
    """RFC 7748, section 6.1, then RFC 5869, whose first vector checks the oracle."""
    vector = hkdf(bytes([0x0B] * 22), bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert vector.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    alice = MaskKey(X25519PrivateKey.from_private_bytes(bytes.fromhex(RFC7748_ALICE)))
    bob = base64.b64encode(bytes.fromhex(RFC7748_BOB)).decode()
    members = members_with({"alice": alice.public_key, "bob": bob})
    info = b"crafts-mask-v1|alice|bob"
    expected = hkdf(bytes.fromhex(RFC7748_SHARED), bytes.fromhex("5" * 64), info, 32)
    assert alice.pair_keys("alice", members) == [(expected, True)]


def test_a_mask_is_the_key_stream_of_rfc_8439() -> None:
    words = np.frombuffer(bytes.fromhex(RFC8439_ZERO_KEY), dtype="<u4")
    added, taken = zeros(16), zeros(16)
    add_masks_(added, [(bytes(32), True)])
    add_masks_(taken, [(bytes(32), False)])
    np.testing.assert_array_equal(added, words)
    np.testing.assert_array_equal(added + taken, zeros(16))


def test_golden_vector() -> None:
    """Three sites with the keys of ``support.sums``; frozen from the format's second version."""
    sites = sum_sites(3)
    names = sorted(sites)
    members = members_of(sites, names, names[0])
    plain = np.arange(0, 5000, 1000, dtype=np.uint32)
    vectors = {name: masked(sites[name], members, plain) for name in names}
    assert members.hash[:12] == "9b0ef5979c79"
    assert hashlib.sha256(vectors[names[0]].tobytes()).hexdigest()[:12] == "4d7f3540caa5"
    total = zeros(5)
    for vector_D in vectors.values():
        add_up_(total, vector_D)
    assert total.tolist() == [0, 3000, 6000, 9000, 12000]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_members_in_any_order_of_arrival_give_the_exact_sum(data: st.DataObject) -> None:
    sites = sum_sites(8)
    names = data.draw(st.lists(st.sampled_from(sorted(sites)), min_size=2, unique=True))
    length = data.draw(st.sampled_from([1, 5, 65_536, 65_537]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    draw = np.random.default_rng(seed)
    plain = {name: draw.integers(0, 2**32, length, dtype=np.uint32) for name in names}
    total, expected = zeros(length), zeros(length)
    for name in data.draw(st.permutations(names)):
        members = members_of(sites, names, name)
        add_up_(total, masked(sites[name], members, plain[name]))
        expected += plain[name]
    np.testing.assert_array_equal(total, expected)


def test_one_vector_alone_and_all_but_one_are_uniform() -> None:
    """Whatever they hide: here zeros. The control, the whole sum, is not."""
    sites = sum_sites(5)
    names, total = sorted(sites), zeros(40_000)
    for number, name in enumerate(names, start=1):
        vector_D = masked(sites[name], members_of(sites, names, name), zeros(40_000))
        assert is_uniform(vector_D)
        add_up_(total, vector_D)
        assert is_uniform(total) == (number < len(names))


@pytest.mark.parametrize(
    "views",
    [
        {"site-01": [1, 2, 3], "site-02": [1, 2, 3], "site-03": [1, 2, 3, 4]},
        {"site-01": [1, 2, 3], "site-02": [1, 2, 4], "site-03": [1, 2, 3]},
        {"site-01": [1, 2], "site-02": [1, 2, 3], "site-03": [1, 2, 3]},
    ],
)
def test_split_views_open_nothing(views: dict[str, list[int]]) -> None:
    """A coordinator shows its members different sets and adds up whatever it gets."""
    sites = sum_sites(4)
    total = zeros(40_000)
    for name, numbers in views.items():
        names = [f"site-{number:02d}" for number in numbers]
        add_up_(total, masked(sites[name], members_of(sites, names, name), zeros(40_000)))
    assert is_uniform(total)


def test_the_same_keys_under_another_announcement_have_unrelated_masks() -> None:
    first, again = sum_sites(3), sum_sites(3, request="2" * 64)  # the same keys
    names = sorted(first)
    one = masked(first[names[0]], members_of(first, names, names[0]), zeros(40_000))
    other = masked(again[names[0]], members_of(again, names, names[0]), zeros(40_000))
    assert first[names[0]].mask_key.public_key == again[names[0]].mask_key.public_key
    assert is_uniform(one - other)


def test_a_key_answers_one_announcement() -> None:
    sites = sum_sites(4)
    names = sorted(sites)
    members = members_of(sites, names, names[0])
    key = sites[names[0]].mask_key
    assert key.pair_keys(names[0], members) == key.pair_keys(names[0], members)
    with pytest.raises(MembersError, match="another announcement"):
        key.pair_keys(names[0], members_of(sites, names[:3], names[0]))


@pytest.mark.parametrize("key", [bytes(32), bytes([1]) + bytes(31), bytes(31)])
def test_a_key_of_low_order_is_refused(key: bytes) -> None:
    """With it everybody would know the mask."""
    own = MaskKey()
    keys = {"a": own.public_key, "b": base64.b64encode(key).decode()}
    with pytest.raises(MembersError, match="X25519"):
        own.pair_keys("a", members_with(keys))


def test_vectors_of_another_length_do_not_add() -> None:
    with pytest.raises(ValueError, match="expected"):
        add_up_(zeros(3), zeros(4))


def test_keys_are_fresh() -> None:
    assert MaskKey().public_key != MaskKey().public_key
