"""Conditions are what slow loops say, survive being stored, and come only from fitting files."""

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from crafts_core.plan_sections import Modality
from crafts_core.tiles.conditions import (
    ConditionError,
    check_condition_file,
    decode_condition,
    encode_condition,
    fluorescence_condition,
    nuclei_condition,
    read_condition,
    to_bytes,
    to_floats,
)

LABELS = hnp.arrays(
    np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.integers(0, 3)
)


def slow_nuclei_condition(labels: np.ndarray) -> np.ndarray:
    """Pixel by pixel, straight from the definition."""
    height, width = labels.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    result = np.zeros((3, height, width))
    far: dict[int, float] = {}
    for y, x in pixels:
        own = labels[y, x]
        if own == 0:
            continue
        result[0, y, x] = 1
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            if (y + dy, x + dx) in pixels and labels[y + dy, x + dx] != own:
                result[1, y, x] = 1
        strangers = [math.hypot(y - v, x - u) for v, u in pixels if labels[v, u] != own]
        result[2, y, x] = min(strangers, default=1.0)
        far[own] = max(far.get(own, 0.0), result[2, y, x])
    for y, x in pixels:
        if labels[y, x]:
            result[2, y, x] /= far[labels[y, x]]
    return result


@settings(max_examples=60, deadline=None)
@given(labels=LABELS)
def test_nuclei_are_what_the_slow_loop_says(labels: np.ndarray) -> None:
    np.testing.assert_allclose(nuclei_condition(labels), slow_nuclei_condition(labels), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(labels=LABELS, turns=st.integers(0, 3))
def test_a_turned_map_gives_the_turned_condition(labels: np.ndarray, turns: int) -> None:
    turned = np.rot90(nuclei_condition(labels), turns, axes=(1, 2))
    np.testing.assert_allclose(nuclei_condition(np.rot90(labels, turns)), turned, atol=1e-6)


def test_numbers_of_nuclei_make_no_difference() -> None:
    labels = np.array([[0, 1, 1], [2, 2, 1], [2, 0, 0]])
    other = np.array([0, 65_000, 7])[labels]
    assert np.array_equal(nuclei_condition(labels), nuclei_condition(other))


def test_fluorescence_is_what_the_slow_loop_says() -> None:
    rng = np.random.default_rng(0)
    bright, flat, absent = rng.gamma(2, 300, (9, 8)), np.full((9, 8), 5.0), np.zeros((9, 8))
    found = fluorescence_condition([bright, flat, absent])
    low, high = np.quantile(bright, [0.01, 0.995])
    for y in range(9):
        for x in range(8):
            expected = min(max((bright[y, x] - low) / (high - low), 0.0), 1.0)
            assert found[0, y, x] == pytest.approx(expected, abs=1e-6)
    assert not found[1:4].any()
    assert found[4:].mean(axis=(1, 2)).tolist() == [1, 1, 0, 0]


def test_fluorescence_forgets_gain_and_offset() -> None:
    channel = np.random.default_rng(1).gamma(2, 300, (16, 16))
    one, other = fluorescence_condition([channel]), fluorescence_condition([3 * channel + 7])
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_sparse_light_is_not_lost() -> None:
    channel = np.full((40, 40), 3.0)
    channel[5, 5] = 9
    assert fluorescence_condition([channel])[0, 5, 5] == 1


@pytest.mark.parametrize("channels", [[], [np.ones((2, 2))] * 5, [np.array([[np.nan]])]])
def test_impossible_channels_are_refused(channels: list[np.ndarray]) -> None:
    with pytest.raises(ValueError):
        fluorescence_condition(channels)


@pytest.mark.parametrize("modality", ["nuclei", "fluorescence"])
def test_stored_conditions_come_back(modality: str) -> None:
    rng = np.random.default_rng(2)
    condition = (
        nuclei_condition(rng.integers(0, 4, (12, 12)))
        if modality == "nuclei"
        else fluorescence_condition(
            [rng.gamma(2, 5, (12, 12)), np.zeros((12, 12)), np.ones((12, 12))]
        )
    )
    stored = to_bytes(condition, modality)
    png = encode_condition(stored, modality)
    assert np.array_equal(decode_condition(png, modality, 12), stored)
    np.testing.assert_allclose(to_floats(stored, modality), condition, atol=0.5 / 254 + 1e-6)
    assert np.array_equal(to_floats(stored[None], modality)[0], to_floats(stored, modality))
    for bad in (png[:40], b"", encode_condition(stored[:, :6, :6], modality)):
        with pytest.raises(ConditionError):
            decode_condition(bad, modality, 12)


# ---- files ---------------------------------------------------------------------------------------


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize(
    "suffix, dtype",
    [
        ("png", np.uint8),
        ("png", np.uint16),
        ("tif", np.uint8),
        ("tif", np.uint16),
        ("tif", np.int32),
    ],
)
def test_labels_of_every_width_read_the_same(tmp_path: Path, suffix: str, dtype: type) -> None:
    labels = np.zeros((8, 8), dtype=dtype)
    labels[1:4, 1:4], labels[5:, 5:] = 1, 200
    path = save(tmp_path / f"m.{suffix}", labels)
    found = read_condition(path, "nuclei", tile_px=8, size=(8, 8))
    assert np.array_equal(found, to_bytes(nuclei_condition(labels), "nuclei"))


def test_big_endian_labels_are_read(tmp_path: Path) -> None:
    labels = np.tri(8, dtype=np.uint16) * 300
    big = Image.frombytes("I;16B", (8, 8), labels.astype(">u2").tobytes())
    big.save(tmp_path / "m.tif")
    found = read_condition(tmp_path / "m.tif", "nuclei", tile_px=8)
    assert np.array_equal(found, to_bytes(nuclei_condition(labels), "nuclei"))


def test_labels_are_resampled_before_they_are_measured(tmp_path: Path) -> None:
    labels = np.zeros((6, 4), np.uint8)
    labels[2:4, 1:3] = 9
    path = save(tmp_path / "m.png", np.kron(labels, np.ones((3, 3), np.uint8)))
    found = read_condition(path, "nuclei", tile_px=4)  # the central square, 12 px wide
    assert np.array_equal(found, to_bytes(nuclei_condition(labels[1:5]), "nuclei"))


def test_pages_and_bands_are_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    pages = [rng.integers(1, 60_000, (8, 8)).astype(np.uint16) for _ in range(2)]
    first, *rest = [Image.fromarray(page) for page in pages]
    first.save(tmp_path / "f.tif", save_all=True, append_images=rest)
    found = read_condition(tmp_path / "f.tif", "fluorescence", tile_px=8)
    assert np.array_equal(found, to_bytes(fluorescence_condition(pages), "fluorescence"))
    bands = rng.integers(1, 255, (8, 8, 3), dtype=np.uint8)
    found = read_condition(save(tmp_path / "f.png", bands), "fluorescence", tile_px=8)
    assert (found[:3] > 0).all()
    assert not found[3].any()


def test_counts_of_32_bits_are_not_negative(tmp_path: Path) -> None:
    counts = np.arange(64, dtype=np.uint32).reshape(8, 8) << 26
    tifffile.imwrite(tmp_path / "f.tif", counts, photometric="minisblack")
    found = read_condition(tmp_path / "f.tif", "fluorescence", tile_px=8)
    assert np.array_equal(found, to_bytes(fluorescence_condition([counts]), "fluorescence"))


@pytest.mark.parametrize("num_bands", [1, 3])
def test_opaque_alpha_is_no_channel(tmp_path: Path, num_bands: int) -> None:
    """Most programs write it; a picture of what fluoresces has none."""
    bands = np.random.default_rng(2).integers(1, 255, (8, 8, num_bands), dtype=np.uint8)
    plain = save(tmp_path / "f.png", bands.squeeze())
    alpha = np.full((8, 8, 1), 255, np.uint8)
    layered = save(tmp_path / "a.png", np.concatenate([bands, alpha], axis=2))
    found, expected = (read_condition(path, "fluorescence", tile_px=8) for path in (layered, plain))
    assert np.array_equal(found, expected)
    assert not found[num_bands:].any()


def test_alpha_that_hides_is_neither_channel_nor_dropped(tmp_path: Path) -> None:
    bands = np.random.default_rng(2).integers(1, 255, (8, 8, 4), dtype=np.uint8)
    with pytest.raises(ConditionError, match=r"f.png is transparent in places; save what is"):
        read_condition(save(tmp_path / "f.png", bands), "fluorescence", tile_px=8)


def test_colour_that_would_lose_bits_or_samples_is_named(tmp_path: Path) -> None:
    deep = np.random.default_rng(3).integers(0, 4096, (8, 8, 5)).astype(np.uint16)
    for name, pixels in (("deep.tif", deep[..., :3]), ("five.tif", deep.astype(np.uint8))):
        tifffile.imwrite(tmp_path / name, pixels, photometric="rgb", metadata=None)
        with pytest.raises(ConditionError, match=rf"{name} has .*-bit pixels of several samples"):
            check_condition_file(tmp_path / name, "fluorescence", (8, 8))


def test_nothing_but_pixels_is_kept(tmp_path: Path) -> None:
    note = PngInfo()
    note.add_text("Patient", "DOE JANE")
    path = save(tmp_path / "m.png", np.tri(8, dtype=np.uint16) * 4711, pnginfo=note)
    assert b"DOE" in path.read_bytes()
    png = encode_condition(read_condition(path, "nuclei", tile_px=8), "nuclei")
    assert b"DOE" not in png
    assert b"tEXt" not in png


def test_what_is_no_label_image_is_named(tmp_path: Path) -> None:
    blobs = np.zeros((20, 20), np.uint8)
    blobs[2::5, 2::5] = 255
    negative = np.full((8, 8), -1, np.int32)
    for name, pixels, text in (
        ("colour.png", np.zeros((8, 8, 3), np.uint8), "not an integer label image"),
        ("float.tif", np.zeros((8, 8), np.float32), "not an integer label image"),
        ("binary.png", blobs, "binary mask"),
        ("negative.tif", negative, "negative labels"),
    ):
        with pytest.raises(ConditionError, match=text) as error:
            read_condition(save(tmp_path / name, pixels), "nuclei", tile_px=8)
        assert name in str(error.value)


def test_what_does_not_fit_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = save(tmp_path / "m.png", np.random.default_rng(0).integers(0, 9, (64, 64), np.uint8))
    with pytest.raises(ConditionError, match="64x64 pixels, its tile 32x64"):
        check_condition_file(whole, "nuclei", (32, 64))
    torn = tmp_path / "torn.png"
    torn.write_bytes(whole.read_bytes()[:700])
    check_condition_file(torn, "nuclei", (64, 64))  # its header says nothing
    with pytest.raises(ConditionError, match=r"torn.png is damaged"):
        read_condition(torn, "nuclei", tile_px=8)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ConditionError, match=r"text.png is not a readable image"):
        read_condition(tmp_path / "text.png", "fluorescence", tile_px=8)
    pages = [Image.fromarray(np.ones((8, 8), np.uint8))] * 5
    pages[0].save(tmp_path / "many.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ConditionError, match="5 channels"):
        check_condition_file(tmp_path / "many.tif", "fluorescence", (8, 8))


@pytest.mark.parametrize("modality", ["nuclei", "fluorescence"])
def test_a_damaged_header_is_named_whatever_pillow_makes_of_it(
    tmp_path: Path, modality: Modality
) -> None:
    path = tmp_path / "m.tif"
    Image.fromarray(np.ones((32, 32), np.uint16)).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    start = int.from_bytes(whole[4:8], "little")
    for _ in range(300):
        torn = bytearray(whole)
        torn[start + rng.integers(len(whole) - start)] = rng.integers(256)
        path.write_bytes(torn)
        for look in (
            lambda: check_condition_file(path, modality, (32, 32)),
            lambda: read_condition(path, modality, tile_px=8),
        ):
            with contextlib.suppress(ConditionError):
                look()
    path.write_bytes(whole[: start + 3] + b"\2" + whole[start + 4 :])  # no width
    with pytest.raises(ConditionError, match=r"m\.tif"):
        check_condition_file(path, modality, (32, 32))


def test_pages_of_two_places_and_numbers_from_white_are_refused(tmp_path: Path) -> None:
    small, large = (Image.fromarray(np.ones((px, px), np.uint8)) for px in (8, 16))
    small.save(tmp_path / "pages.tif", save_all=True, append_images=[large])
    with pytest.raises(ConditionError, match=r"page 2 of fluorescence .* is 16x16"):
        check_condition_file(tmp_path / "pages.tif", "fluorescence", (8, 8))
    small.save(tmp_path / "white.tif", tiffinfo={262: 0})
    with pytest.raises(ConditionError, match="counts from white"):
        check_condition_file(tmp_path / "white.tif", "nuclei", (8, 8))
