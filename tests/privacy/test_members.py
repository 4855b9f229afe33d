"""An announcement is believed only as a whole: whatever is changed in it is refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crafts_core.exchange import (
    MAX_ANNOUNCEMENT_CHARS,
    Announcement,
    ExchangeError,
    ReadyReply,
)
from crafts_core.roster import Roster
from crafts_privacy.secure_aggregation.members import (
    Members,
    MembersError,
    announce,
    members_hash,
    verify_members,
)
from crafts_privacy.secure_aggregation.shares import NOISE_TOLERANCE, is_same_noise
from support.sums import NOISE, SumSite, announcement_of, flipped, roster_of, sum_sites

SITES = sum_sites(5)
NAMES = sorted(SITES)
OWN = SITES[NAMES[1]].ready


def verify(announcement: Announcement, *, roster: Roster | None = None, least: int = 3) -> Members:
    return verify_members(announcement, roster or roster_of(SITES), OWN, min_members=least)


def with_member(place: int, **changes: object) -> Announcement:
    good = announcement_of(SITES, NAMES)
    members = list(good.members)
    members[place] = members[place].model_copy(update=changes)
    return good.model_copy(update={"members": tuple(members)})


def test_an_honest_announcement_is_verified() -> None:
    members = verify(announcement_of(SITES, NAMES))
    assert members.declared_patients == sum(site.declared_patients for site in SITES.values())
    assert list(members.keys) == NAMES
    assert members.hash == members_hash(announcement_of(SITES, list(reversed(NAMES))))


@settings(max_examples=60, deadline=None)
@given(
    place=st.integers(0, 4),
    field=st.sampled_from(["key", "signature"]),
    byte=st.integers(0, 31),
)
def test_every_flipped_bit_is_found(place: int, field: str, byte: int) -> None:
    word = announcement_of(SITES, NAMES).members[place]
    changed = with_member(place, **{field: flipped(getattr(word, field), byte)})
    with pytest.raises(MembersError):
        verify(changed)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize(
    "changes",
    [
        {"declared_patients": 7},
        {"noise_multiplier": 1.001 * NOISE},
        {"request_hash": "2" * 64},
        {"site": "stranger"},
    ],
)
def test_every_altered_word_is_found(place: int, changes: dict[str, object]) -> None:
    with pytest.raises(MembersError):
        verify(with_member(place, **changes))


def test_a_member_that_signs_another_size_is_refused() -> None:
    """Its own key vouches for its word, not for its size: with more patients others count less."""
    sites = sum_sites(5)
    sites[NAMES[3]].declared_patients = 20_000
    sites[NAMES[3]].ready = sites[NAMES[3]].word()
    with pytest.raises(MembersError, match="in the roster, not as 20000"):
        verify(announcement_of(sites, NAMES))


def test_members_come_in_order_and_once() -> None:
    good = announcement_of(SITES, NAMES)
    first, second, *rest = good.members
    for members in ((second, first, *rest), (first, first, second, *rest)):
        with pytest.raises(MembersError, match="each once"):
            verify(good.model_copy(update={"members": members}))


def test_a_ghost_that_nobody_approved_is_refused() -> None:
    """The coordinator enrols a site of its own and announces it, with a valid signature."""
    ghost = SumSite("zz-ghost", 99)
    announcement = announce([SITES[name].ready for name in NAMES] + [ghost.ready])
    with pytest.raises(MembersError, match="not in the approved roster"):
        verify(announcement)
    roster = roster_of(SITES | {"zz-ghost": ghost})  # the control: somebody approved it
    assert len(verify(announcement, roster=roster)) == 6


def test_a_swapped_key_is_refused() -> None:
    """With a key of its own in a member's place the coordinator would know that member's masks."""
    mine = SumSite("mine", 98)
    with pytest.raises(MembersError, match="did not sign"):
        verify(with_member(0, key=mine.mask_key.public_key))


def test_a_word_signed_by_another_key_is_refused() -> None:
    forger = SumSite(NAMES[0], 97, declared_patients=SITES[NAMES[0]].declared_patients)
    with pytest.raises(MembersError, match="did not sign"):
        verify(announce([forger.ready, *(SITES[name].ready for name in NAMES[1:])]))


def test_the_own_word_must_be_there_as_it_was_given() -> None:
    with pytest.raises(MembersError, match="own word"):
        verify(announcement_of(SITES, [name for name in NAMES if name != NAMES[1]]))
    again = SITES[NAMES[1]].word(key=SumSite("other", 77).mask_key.public_key)  # its own, older
    others = [SITES[name].ready for name in NAMES if name != NAMES[1]]
    with pytest.raises(MembersError, match="own word"):
        verify(announce([*others, again]))


def test_an_announcement_of_another_request_is_refused() -> None:
    replayed = sum_sites(5, request="2" * 64)
    with pytest.raises(MembersError, match="another request"):
        verify(announcement_of(replayed, NAMES))


def test_two_members_with_one_key_are_refused() -> None:
    """Their mask would be one that a third could not tell from its own pair's."""
    sites = sum_sites(5)
    sites[NAMES[3]].ready = sites[NAMES[3]].word(key=sites[NAMES[2]].mask_key.public_key)
    announcement = announcement_of(sites, NAMES)
    with pytest.raises(MembersError, match="one key"):
        verify(announcement)


def test_a_key_that_makes_no_mask_is_refused_before_any_is_made() -> None:
    """A member with it could otherwise void an attempt that all others are charged for."""
    sites = sum_sites(5)
    sites[NAMES[3]].ready = sites[NAMES[3]].word(key=f"{'A' * 43}=")
    with pytest.raises(MembersError, match="no X25519 key"):
        verify(announcement_of(sites, NAMES))


@pytest.mark.parametrize("factor", [0.5, 0.994, 1.006, 2.0])
def test_a_member_that_calibrated_another_noise_is_refused(factor: float) -> None:
    """One with less would make everybody's promise weaker without a word."""
    sites = sum_sites(5)
    sites[NAMES[3]].noise_multiplier = factor * OWN.noise_multiplier
    sites[NAMES[3]].ready = sites[NAMES[3]].word()
    with pytest.raises(MembersError, match="calibrated the plan's noise"):
        verify(announcement_of(sites, NAMES))


@pytest.mark.parametrize("factor", [0.996, 1.0, 1.004])
def test_what_another_version_calibrates_is_close_and_the_largest_counts(factor: float) -> None:
    """So the tolerance takes nothing from whoever calibrated more."""
    sites = sum_sites(5)
    sites[NAMES[3]].noise_multiplier = factor * OWN.noise_multiplier
    sites[NAMES[3]].ready = sites[NAMES[3]].word()
    members = verify(announcement_of(sites, NAMES))
    assert members.noise_multiplier == max(factor, 1.0) * OWN.noise_multiplier


def test_no_two_whom_a_third_finds_close_are_too_far_from_each_other() -> None:
    """A coordinator that takes half the tolerance announces nobody whom a member refuses."""
    half = NOISE_TOLERANCE / 2
    low, high = math.exp(-0.999 * half), math.exp(0.999 * half)
    assert is_same_noise(low, 1.0, half)
    assert is_same_noise(high, 1.0, half)
    assert is_same_noise(low, high, NOISE_TOLERANCE)
    assert not is_same_noise(low, high, half)
    assert not is_same_noise(0.0, 0.0, half)


def test_too_few_members_are_refused() -> None:
    announcement = announcement_of(SITES, NAMES[:3])
    assert len(verify(announcement, least=3)) == 3
    with pytest.raises(MembersError, match="3 members"):
        verify(announcement, least=4)


def test_a_roster_without_identities_knows_no_member() -> None:
    with pytest.raises(MembersError, match="not in the approved roster"):
        verify(announcement_of(SITES, NAMES), roster=Roster.of("a" * 64, {NAMES[0]: 21}))


def test_everything_of_the_announcement_is_in_the_hash() -> None:
    good = announcement_of(SITES, NAMES)
    changed = [
        with_member(0, declared_patients=7),
        with_member(0, noise_multiplier=1.001 * NOISE),
        with_member(0, key=SITES[NAMES[1]].mask_key.public_key),
        with_member(0, signature=flipped(good.members[0].signature, 0)),
        with_member(0, site="other"),
        good.model_copy(update={"request_hash": "3" * 64}),
        good.model_copy(update={"members": good.members[:-1]}),
    ]
    assert len({members_hash(each) for each in (good, *changed)}) == 8


def test_an_announcement_travels_as_text() -> None:
    good = announcement_of(SITES, NAMES)
    assert Announcement.parse(good.to_json()) == good
    long = good.to_json() + " " * MAX_ANNOUNCEMENT_CHARS
    for text in ("{", "{}", good.to_json().replace("request_hash", "other", 1), long):
        with pytest.raises(ExchangeError):
            Announcement.parse(text)
    with pytest.raises(ExchangeError):
        ReadyReply.from_scalars(OWN.to_scalars() | {"count": 3})
