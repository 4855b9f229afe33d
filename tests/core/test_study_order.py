"""In which order readers see images."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from crafts_core.study.presentation import Showing, reading_order

orders = st.builds(
    lambda real, synthetic, share, seed: (
        [False] * real + [True] * synthetic,
        share,
        np.random.default_rng(seed),
    ),
    st.integers(5, 60),
    st.integers(5, 60),
    st.floats(0, 0.5),
    st.integers(0, 1000),
)


@settings(max_examples=60, deadline=None)
@given(orders)
def test_every_image_is_shown_once_and_repeats_once_more(made) -> None:
    kinds, share, rng = made
    order = reading_order(kinds, share, rng)
    first = [each.image for each in order if not each.is_repeat]
    again = [each.image for each in order if each.is_repeat]
    assert sorted(first) == list(range(len(kinds)))
    assert (
        len(set(again))
        == len(again)
        <= round(share * kinds.count(False)) + round(share * kinds.count(True))
    )


@settings(max_examples=60, deadline=None)
@given(orders)
def test_a_repeat_comes_about_half_of_all_images_later(made) -> None:
    kinds, share, rng = made
    order = reading_order(kinds, share, rng)
    for image in (each.image for each in order if each.is_repeat):
        between = order[order.index(Showing(image, False)) + 1 : order.index(Showing(image, True))]
        distance = sum(not each.is_repeat for each in between)
        assert distance >= len(kinds) // 2 - 3


@settings(max_examples=60, deadline=None)
@given(orders)
def test_each_half_of_a_session_holds_its_half_of_both_kinds(made) -> None:
    """Of a shuffle this is not true."""
    kinds, _, rng = made
    order = [kinds[each.image] for each in reading_order(kinds, 0.0, rng)]
    for kind in (False, True):
        assert abs(2 * order[: len(order) // 2].count(kind) - kinds.count(kind)) <= 2


def test_the_images_so_far_say_little_of_the_next() -> None:
    """Whoever knew them all and named the rarer kind would be right 3 times in 4 in pairs."""
    kinds = [False] * 50 + [True] * 50
    right = []
    for seed in range(100):
        order = [
            kinds[each.image] for each in reading_order(kinds, 0.0, np.random.default_rng(seed))
        ]
        for place, kind in enumerate(order):
            surplus = 2 * sum(order[:place]) - place
            right.append(0.5 if surplus == 0 else float(kind == (surplus < 0)))
    assert np.mean(right) < 0.6  # 0.58 for halves of 25 and 25 (Blackwell and Hodges 1957)


def test_an_image_is_as_often_followed_by_its_own_kind() -> None:
    kinds = [False] * 50 + [True] * 50
    alike = []
    for seed in range(100):
        order = [
            kinds[each.image] for each in reading_order(kinds, 0.2, np.random.default_rng(seed))
        ]
        alike += [one == two for one, two in zip(order[:50:2], order[1:50:2], strict=True)]
    assert 0.45 < np.mean(alike) < 0.53


def test_repeats_are_of_both_kinds() -> None:
    kinds = [False] * 40 + [True] * 20
    order = reading_order(kinds, 0.3, np.random.default_rng(3))
    repeated = [kinds[each.image] for each in order if each.is_repeat]
    assert (repeated.count(False), repeated.count(True)) == (12, 6)


def test_order_is_the_seeds() -> None:
    kinds = [False] * 20 + [True] * 20
    orders = [reading_order(kinds, 0.2, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
