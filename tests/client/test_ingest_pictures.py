"""Pictures of a slide: they show what was taken, and only their owner may read them."""

import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crafts_client.ingest.pictures import (
    OVERLAY_COLOURS,
    draw_overlay,
    stain_densities,
    write_pictures,
)
from crafts_client.ingest.tissue import TissueMask, find_tissue
from crafts_core.stains import STAIN_SC
from support.slides import tissue_image

FRAMES = np.array([[200, 200, 100, 100], [300, 200, 100, 100], [0, 0, 100, 100]], dtype=float)
"""Two places on tissue and one on glass, where ten level-0 pixels make one of the thumbnail."""


def mask_of(thumbnail: np.ndarray) -> TissueMask:
    height, width = thumbnail.shape[:2]
    return find_tissue(thumbnail, mpp=8.0, slide_px=(width * 10, height * 10))


def overlay(kept: list[bool]) -> np.ndarray:
    thumbnail = tissue_image(128, margin=16)
    return np.asarray(draw_overlay(thumbnail, mask_of(thumbnail), FRAMES, np.array(kept)))


def colour_at(picture: np.ndarray, x: int, y: int) -> tuple[int, ...]:
    """Of a thumbnail's pixel, in a picture that is four times as large."""
    return tuple(picture[4 * y + 1, 4 * x + 8].tolist())


def test_kept_and_rejected_places_differ_and_glass_is_not_marked() -> None:
    picture = overlay([True, False, False])
    assert picture.shape == (512, 512, 3)
    assert colour_at(picture, 20, 20) == OVERLAY_COLOURS["kept"]
    assert colour_at(picture, 30, 20) == OVERLAY_COLOURS["rejected"]
    assert min(colour_at(picture, 0, 0)) > 240


def test_tissue_is_outlined() -> None:
    picture = overlay([False] * 3)
    is_outline = (picture == OVERLAY_COLOURS["tissue"]).all(axis=2)
    assert is_outline[:, 80:430].any(axis=0).all()
    assert not is_outline[200:300, 200:300].any()


def test_ink_and_folds_are_tinted() -> None:
    thumbnail = tissue_image(128, margin=16)
    thumbnail[60:70, 30:100] = (60, 170, 140)
    mask = mask_of(thumbnail)
    picture = np.asarray(draw_overlay(thumbnail, mask, FRAMES, np.zeros(3, dtype=bool)))
    red, green, blue = picture[4 * 65, 4 * 60].tolist()
    assert min(red, green) > 150 > blue


def test_a_large_picture_is_not_enlarged() -> None:
    thumbnail = np.full((40, 1024, 3), 244, dtype=np.uint8)
    no_frames = np.zeros((0, 4))
    picture = draw_overlay(thumbnail, mask_of(thumbnail), no_frames, np.zeros(0, dtype=bool))
    assert picture.size == (1024, 40)


def stained(hematoxylin: float, eosin: float) -> np.ndarray:
    rows = STAIN_SC / np.linalg.norm(STAIN_SC, axis=1, keepdims=True)
    density = hematoxylin * rows[0] + eosin * rows[1]
    return np.broadcast_to(np.rint(255 * 10**-density), (32, 32, 3)).astype(np.uint8)


def test_known_stain_comes_back() -> None:
    stain = stain_densities(stained(0.42, 0.2), np.ones((32, 32), dtype=bool))
    assert stain is not None
    assert stain.hematoxylin == pytest.approx(0.42, abs=0.01)
    assert stain.eosin == pytest.approx(0.2, abs=0.01)
    assert stain.hematoxylin_shares[8] == 1.0
    assert sum(stain.eosin_shares) == pytest.approx(1)


def test_stain_is_of_tissue_only_and_glass_has_none() -> None:
    thumbnail = np.full((32, 64, 3), 244, dtype=np.uint8)
    thumbnail[:, :32] = stained(0.42, 0.2)
    is_tissue = np.zeros((32, 64), dtype=bool)
    assert stain_densities(thumbnail, is_tissue) is None
    is_tissue[:, :32] = True
    assert stain_densities(thumbnail, is_tissue) == stain_densities(
        stained(0.42, 0.2), np.ones((32, 32), dtype=bool)
    )


def test_pictures_are_small_jpegs_for_the_owner_only(tmp_path: Path) -> None:
    thumbnail = np.full((600, 2000, 3), 200, dtype=np.uint8)
    folder = tmp_path / "pictures"
    paths = write_pictures(folder, "0a1b", thumbnail, Image.fromarray(thumbnail))
    assert sorted(path.name for path in folder.iterdir()) == ["0a1b-overlay.jpg", "0a1b.jpg"]
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (1024, 307))
            assert not image.getexif()
