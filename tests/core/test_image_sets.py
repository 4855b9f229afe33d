"""Any folder of images: with a table, by class folders, or drawn by ours; and what it lacks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from crafts_core.cli import app
from crafts_core.evaluation.image_sets import ImageSetError, Scale, is_image_folder, read_images
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.foundation import Foundation

SCALE = Scale(told_mpp=None, at_mpp=1.0, largest_px=48, unit_px=4, foundation_hash="f" * 64)
TOLD = replace(SCALE, told_mpp=1.0)


def image(path: Path, *, side: int = 40, value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (value, value, value)).save(path)


def table(folder: Path, *rows: dict[str, object], name: str = "metadata.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(folder: Path, scale: Scale = TOLD, *, most: int = 100, seed: int = 0) -> RealTiles:
    return read_images(folder, scale, most=most, seed=seed)


def test_a_table_says_patient_caption_label_and_scale(tmp_path: Path) -> None:
    """80 px at 0.5 microns are 40 at 1; all get the side that the smallest fills."""
    image(tmp_path / "a.png", side=80)
    image(tmp_path / "b.png", side=47)
    image(tmp_path / "not listed.png")
    table(
        tmp_path,
        {"file_name": "a.png", "patient": "one", "caption": "lung", "label": "LUAD", "mpp": 0.5},
        {"file_name": "b.png", "patient": 2, "caption": "colon"},
    )
    found = read(tmp_path)
    assert found.images_NHWC.shape == (2, 40, 40, 3)
    assert (found.patients.tolist(), found.captions) == (["one", "2"], ["lung", "colon"])
    assert found.classes == ["LUAD", "colon"]
    assert found.says_patients
    assert found.has_captions


def test_as_they_lie_a_label_is_a_folder_and_each_image_a_patient(tmp_path: Path) -> None:
    names = ("LUAD/a.png", "LUAD/b.jpg", "normal/a.png", ".writing/a.png")
    for value, name in enumerate(names):
        image(tmp_path / name, value=value)
    found = read(tmp_path)
    assert found.labels == ["LUAD", "LUAD", "normal"]
    assert len(set(found.patients.tolist())) == 3
    assert not found.says_patients
    assert not found.has_captions


@pytest.mark.parametrize("says_patients", [True, False])
def test_same_pixels_count_as_one_where_nobody_says_whose(
    tmp_path: Path, says_patients: bool
) -> None:
    """Copies of one file, or the pixels in another format, are no second patient."""
    for name in ("a.png", "copy.png", "a.bmp"):
        image(tmp_path / name, value=7)
    image(tmp_path / "b.png", value=8)
    names = ("a.png", "copy.png", "a.bmp", "b.png")
    if says_patients:
        table(tmp_path, *({"file": name, "patient": name} for name in names))
    found = read(tmp_path)
    assert len(set(found.patients.tolist())) == (4 if says_patients else 2)
    assert found.num_repeated == (0 if says_patients else 2)


def test_a_value_may_hold_any_line_separator(tmp_path: Path) -> None:
    caption = "gl\u2028an\x0cds\x85"
    image(tmp_path / "a.png")
    row = json.dumps({"file": "a.png", "caption": caption, "mpp": 1}, ensure_ascii=False)
    (tmp_path / "T.JSONL").write_text(row + "\n", encoding="utf-8")
    assert read(tmp_path).captions == [caption.strip()]
    (tmp_path / "T.JSONL").rename(tmp_path / "kept")
    (tmp_path / "T.CSV").write_text(f'file,caption\na.png,"{caption}\nsheets"\n', encoding="utf-8")
    assert read(tmp_path).captions == [f"{caption}\nsheets"]


def test_a_table_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    image(tmp_path / "patient.png")
    image(tmp_path / "set/below/a.png")
    (tmp_path / "set/link.png").symlink_to(tmp_path / "patient.png")
    for name in ("../patient.png", str(tmp_path / "patient.png"), "link.png", "below/../../x.png"):
        table(tmp_path / "set", {"file": "below/a.png"}, {"file": name})
        with pytest.raises(ImageSetError, match=r"leads outside .*; copy the image there"):
            read(tmp_path / "set")
    table(tmp_path / "set", {"file": "below/../below/a.png"})
    assert len(read(tmp_path / "set")) == 1


def test_what_ours_drew_says_caption_and_scale(foundation: Foundation, tmp_path: Path) -> None:
    """The contact sheet is no image of the set. The scale is said of any foundation."""
    words = ["sample", str(foundation.path), "-p", "tissue with glands", "-p", "lung"]
    drawn = CliRunner().invoke(app, [*words, "--num", "2", "--steps", "1", "--out", str(tmp_path)])
    assert drawn.exit_code == 0, drawn.output
    assert read(tmp_path, SCALE).captions == ["tissue with glands"] * 2 + ["lung"] * 2
    half = replace(SCALE, at_mpp=2 * foundation.manifest.mpp)
    with pytest.raises(ImageSetError, match="at least 32 px at 2 microns per pixel, got 16"):
        read(tmp_path, half)


def test_a_data_set_of_splits_is_read_by_its_tables(tmp_path: Path) -> None:
    for split in ("train", "test"):
        image(tmp_path / "imagefolder" / split / "LUAD/a.png")
        image(tmp_path / "masks" / split / "LUAD/a.png")
        row = {"file_name": "LUAD/a.png", "label": "LUAD", "caption": "x"}
        table(tmp_path / "imagefolder" / split, row)
    assert len(read(tmp_path)) == 2


def test_a_choice_follows_the_seed(tmp_path: Path) -> None:
    for value in range(30):
        image(tmp_path / f"{value:02}.png", value=value)
    one, again, other = (read(tmp_path, most=10, seed=seed).images_NHWC for seed in (0, 0, 1))
    assert len(one) == 10
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"caption": "x"}], "a row has no file or file_name"),
        ([{"file": "a.png", "patient": "p"}, {"file": "b.png"}], "b.png has no patient"),
        ([{"file": "a.png", "caption": "p"}, {"file": "b.png"}], "b.png has no caption"),
        ([{"file": "none.png"}], "none.png cannot be read"),
        (
            [{"file": "a.png", "patient": "p"}, {"file": "./a.png", "patient": "q"}],
            "./a.png is listed for p and for q",
        ),
        ([{"file": "text.png"}], "text.png cannot be read"),
        ([{"file": "deep.png"}], "expected 8 bits"),
        ([{"file": "a.png", "mpp": "wide"}], "microns per pixel from"),
        ([{"file": "a.png", "mpp": 0.5}], "at least 32 px at 1 microns per pixel, got 20"),
        ([{"file": "a.png", "mpp": 1000}], "would become 40000 x 40000; is its scale"),
        ([["a.png"]], "no UTF-8 table"),
        ([], "holds no images"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, rows: list, told: str) -> None:
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / "deep.png")
    table(tmp_path, *rows)
    with pytest.raises(ImageSetError, match=told):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a.png,large, dark nuclei,p1", "line 2: other columns than the header"),
        ("a.png,large", "line 2: other columns than the header"),
        ('a.png,"large,p1\nb.png,small,p2', "unexpected end of data"),
    ],
)
def test_a_line_of_other_cells_gives_no_other_patient(tmp_path: Path, line: str, told: str) -> None:
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    (tmp_path / "t.csv").write_text(f"file,caption,patient\n{line}\n")
    with pytest.raises(ImageSetError, match=told):
        read(tmp_path)


def test_what_is_transparent_is_white_as_a_viewer_shows_it(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 4), dtype=np.uint8)
    pixels[10:30, 10:30] = (190, 110, 170, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read(tmp_path).images_NHWC[0, 0, 0].tolist() == [255, 255, 255]


def test_two_tables_are_one_too_many(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv"):
        table(tmp_path, {"file": "x.png"}, name=name)
    with pytest.raises(ImageSetError, match=r"at most one table, got a\.jsonl, b\.csv"):
        read(tmp_path)


def test_a_folder_without_images_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    assert not is_image_folder(tmp_path)
    image(tmp_path / "below/a.png")
    assert is_image_folder(tmp_path)
    shutil.rmtree(tmp_path / "below")
    table(tmp_path, {"file": "elsewhere.png"})
    assert is_image_folder(tmp_path)
