"""What a page shows of an image is its pixels and nothing else."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crafts_core.study.lookalikes import lookalikes, sentence_on, thumbnail
from crafts_core.study.pictures import blinded, choose_pictures, common_size, traces
from crafts_core.study.questions import StudyError
from support.reader_studies import write_real, write_synthetic


def chosen(folder: Path, count: int, *, is_synthetic: bool, seen: set[bytes] | None = None):
    rng = np.random.default_rng(0)
    return choose_pictures(
        folder, count, rng, is_synthetic=is_synthetic, seen=set() if seen is None else seen
    )


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return write_real(tmp_path / "real", 8)


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    return write_synthetic(tmp_path / "synthetic", 8)


def test_nothing_but_pixels_is_left(real: Path, synthetic: Path) -> None:
    """Flat images and noise: compressed, their lengths would tell them apart."""
    shown = []
    for folder, is_synthetic in ((real, False), (synthetic, True)):
        for picture in chosen(folder, 4, is_synthetic=is_synthetic):
            png = blinded(picture, (24, 24), None)
            with Image.open(io.BytesIO(png)) as image, Image.open(picture.path) as stored:
                image.load()
                assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})
                assert np.array_equal(np.asarray(image), np.asarray(stored))
            for told in (b"Doe", b"synthetic", b"tEXt", b"iTXt", b"pHYs", b"eXIf", b"iCCP"):
                assert told not in png
            shown.append(png)
    assert len({len(png) for png in shown}) == 1
    assert len({png[:40] for png in shown}) == 1


def test_contact_sheets_are_passed_over(synthetic: Path) -> None:
    names = [picture.source for picture in chosen(synthetic, 8, is_synthetic=True)]
    assert sorted(names) == [f"tile-{index:04d}.png" for index in range(8)]
    with pytest.raises(StudyError, match="expected 9 images, calibration included, found 8"):
        chosen(synthetic, 9, is_synthetic=True)


def test_masks_of_a_data_set_are_not_images(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "set/imagefolder/train/COAD", 5)
    write_synthetic(tmp_path / "set/masks/train/COAD", 5, px=12)
    assert {p.size for p in chosen(tmp_path / "set", 5, is_synthetic=True)} == {(24, 24)}


def test_a_synthetic_image_is_not_taken_for_real(synthetic: Path) -> None:
    with pytest.raises(StudyError, match="says that it is synthetic; expected real images"):
        chosen(synthetic, 2, is_synthetic=False)


def test_the_same_pixels_are_chosen_once(real: Path) -> None:
    seen: set[bytes] = set()
    first = chosen(real, 5, is_synthetic=False, seen=seen)
    first[0].path.with_name("copy.png").write_bytes(first[0].path.read_bytes())
    rest = chosen(real, 3, is_synthetic=False, seen=seen)
    assert not {p.source for p in first} & {p.source for p in rest}
    assert "copy.png" not in {p.path.name for p in rest}


def test_types_are_those_of_captions_and_of_folders(real: Path, synthetic: Path) -> None:
    for folder, is_synthetic in ((real, False), (synthetic, True)):
        kinds = [picture.type for picture in chosen(folder, 8, is_synthetic=is_synthetic)]
        assert sorted(str(kind) for kind in kinds) == ["COAD"] * 4 + ["normal lung"] * 4


def test_sizes_that_differ_are_refused_until_somebody_says_how(tmp_path: Path) -> None:
    pictures = chosen(write_real(tmp_path / "a", 2, px=24), 2, is_synthetic=False)
    pictures += chosen(write_synthetic(tmp_path / "b", 2, px=32), 2, is_synthetic=True)
    with pytest.raises(StudyError, match="24 x 24, 32 x 32"):
        common_size(pictures, None)
    size = common_size(pictures, "crop")
    with Image.open(pictures[-1].path) as stored:
        middle = np.asarray(stored)[4:28, 4:28]
    with Image.open(io.BytesIO(blinded(pictures[-1], size, "crop"))) as cropped:
        assert np.array_equal(np.asarray(cropped), middle)
    with Image.open(io.BytesIO(blinded(pictures[-1], size, "scale"))) as scaled:
        assert scaled.size == (24, 24)


def test_traces_that_pixels_may_carry_are_told(tmp_path: Path, synthetic: Path) -> None:
    drawn = chosen(synthetic, 4, is_synthetic=True)
    photo = tmp_path / "real/COAD/x.jpg"
    photo.parent.mkdir(parents=True)
    Image.new("RGB", (32, 24), (200, 120, 180)).save(photo)
    told = " ".join(traces(chosen(tmp_path / "real", 1, is_synthetic=False), drawn))
    assert "real images are JPEG, synthetic ones PNG" in told
    assert "sizes differ" in told
    assert "tissue type normal lung" in told
    assert not list(traces(drawn, drawn))


def tissue(seed: int) -> Image.Image:
    """Smooth blobs of two colours, 64 px."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).resize((64, 64))
    return Image.merge("RGB", (blobs.point(lambda v: v // 2 + 100), blobs, blobs.rotate(180)))


def changed(image: Image.Image, how: str) -> Image.Image:
    if how == "stored again":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=30)
        return Image.open(buffer)
    if how == "recoloured":
        return image.point([min(255, value // 2 + 60) for value in range(256)] * 3)
    if how == "moved":
        return image.crop((1, 0, 64, 63))
    return image.rotate(270).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@pytest.mark.parametrize("how", ["stored again", "recoloured", "turned and mirrored", "moved"])
def test_one_picture_again_is_found_among_others(how: str) -> None:
    images = [tissue(seed) for seed in range(30)]
    images.insert(7, changed(images[20], how))
    seen = np.stack([thumbnail(image) for image in images])
    assert lookalikes(seen) == [(7, 21)]


def test_flat_images_are_not_taken_for_each_other() -> None:
    seen = np.stack([thumbnail(Image.new("RGB", (24, 24), (value,) * 3)) for value in (9, 10)])
    assert not lookalikes(seen)
    assert not list(sentence_on([]))


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_an_image_without_colours_is_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (24, 24)).save(tmp_path / "x.png")
    with pytest.raises(StudyError, match="expected a colour image"):
        chosen(tmp_path, 1, is_synthetic=False)


def test_a_torn_image_is_refused(real: Path) -> None:
    path = real / "COAD/doe-0.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(StudyError, match=r"doe-0\.png is no image that can be read"):
        chosen(real, 8, is_synthetic=False)
