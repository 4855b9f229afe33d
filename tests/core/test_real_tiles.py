"""The order of real tiles follows from what they show, never from a site's secret salt."""

from pathlib import Path

import numpy as np
import pytest

from crafts_core.evaluation.real_tiles import RealTiles, rows_by_content
from support.salts import SALTS, write_salted


def tiles(patients: list[str]) -> RealTiles:
    """Two tiles each, all different."""
    images = np.arange(2 * len(patients), dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 4, 4, 3), np.uint8
    )
    return RealTiles(
        images_NHWC=images,
        patients=np.repeat(patients, 2),
        captions=[f"caption {row}" for row in range(len(images))],
        labels=["x", ""] * len(patients),
    )


def same(first: RealTiles, second: RealTiles) -> bool:
    return (
        np.array_equal(first.images_NHWC, second.images_NHWC)
        and first.patients.tolist() == second.patients.tolist()
        and list(first.captions) == list(second.captions)
    )


def test_two_salts_give_one_order_and_one_numbering_of_patients(tmp_path: Path) -> None:
    stores = [write_salted(tmp_path / names[0], names, tile_px=16) for names in SALTS]
    raw = [RealTiles.read(store, np.arange(10)) for store in stores]
    assert not same(*raw)
    assert same(*(each.in_order_of_content() for each in raw))
    some = [RealTiles.read(store, rows_by_content(store, 4, seed=1)) for store in stores]
    assert len(some[0]) == 4
    assert same(*(each.in_order_of_content() for each in some))


def test_a_choice_of_rows_depends_on_the_seed_and_has_no_row_twice(tmp_path: Path) -> None:
    store = write_salted(tmp_path / "a", [f"{place:02}" for place in range(20)], tile_px=16)
    first, second = (rows_by_content(store, 20, seed=seed).tolist() for seed in (1, 2))
    assert first != second
    assert len(set(first)) == 20
    assert rows_by_content(store, 99, seed=1).tolist() == list(range(40))


def test_rows_stay_together_in_the_new_order() -> None:
    before = tiles(["p", "q", "r"])
    after = before.in_order_of_content()
    for row, image in enumerate(after.images_NHWC):
        was = int(image[0, 0, 0])
        assert after.captions[row] == before.captions[was]
        assert after.labels[row] == before.labels[was]
    patient_of = dict(zip(before.captions, before.patients.tolist(), strict=True))
    groups = {
        (patient_of[caption], name)
        for caption, name in zip(after.captions, after.patients.tolist(), strict=True)
    }
    assert len(groups) == 3


def test_patients_with_a_tile_in_common_are_told_apart_by_their_others() -> None:
    """The shared tile is the first of both; the second decides who comes first."""
    image = np.zeros((4, 2, 2, 3), np.uint8)
    image[1], image[3] = 1, 2
    sides = [
        RealTiles(images_NHWC=image[rows], patients=np.array(list("aabb")), captions=["c"] * 4)
        for rows in ([0, 1, 2, 3], [2, 3, 0, 1])
    ]
    assert same(*(side.in_order_of_content() for side in sides))


def test_a_class_is_the_label_or_else_the_caption() -> None:
    assert tiles(["p"]).classes == ["x", "caption 1"]
    unlabelled = RealTiles(
        images_NHWC=np.zeros((1, 2, 2, 3), np.uint8), patients=np.array(["p"]), captions=["c"]
    )
    assert unlabelled.classes == ["c"]
    with pytest.raises(ValueError):
        RealTiles.cat([tiles(["p"]), unlabelled]).classes  # noqa: B018
