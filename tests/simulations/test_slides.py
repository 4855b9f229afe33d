"""Synthetic slides: a reader takes them for a scanner's."""

from pathlib import Path

import numpy as np
import openslide
import pytest

from crafts_simulations.slides import write_slide
from support.slides import tissue_image


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "s.svs"
    write_slide(path, tissue_image(1024), mpp=0.25, label="DOE")
    return path


def test_openslide_takes_it_for_aperio_with_scale(path: Path) -> None:
    with openslide.OpenSlide(path) as slide:
        assert openslide.OpenSlide.detect_format(path) == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.25
        assert slide.properties["aperio.AppMag"] == "40"


def test_it_is_a_pyramid_with_label_and_macro(path: Path) -> None:
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((1024, 1024), (256, 256))
        assert set(slide.associated_images) == {"label", "macro", "thumbnail"}


def test_pixels_survive_in_every_level(path: Path) -> None:
    truth = tissue_image(1024).astype(float)
    with openslide.OpenSlide(path) as slide:
        fine = np.asarray(slide.read_region((0, 0), 0, (1024, 1024)).convert("RGB"))
        coarse = np.asarray(slide.read_region((0, 0), 1, (256, 256)).convert("RGB"))
    assert np.abs(fine - truth).mean() < 3
    assert np.abs(coarse - truth.reshape(256, 4, 256, 4, 3).mean(axis=(1, 3))).mean() < 3


def test_same_slide_is_the_same_to_the_byte(path: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "again.svs", tissue_image(1024), mpp=0.25, label="DOE")
    assert (tmp_path / "again.svs").read_bytes() == path.read_bytes()


def test_slide_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
        write_slide(tmp_path / "s.svs", tissue_image(256), mpp=0, label="x")
    assert not (tmp_path / "s.svs").exists()
