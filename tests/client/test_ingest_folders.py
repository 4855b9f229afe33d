"""Folders and links as file servers, Macs, data managers and workflow engines make them."""

import os
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pydicom
import pytest
from PIL import Image

from crafts_client.ingest.deidentify import SALT_BYTES, Salt
from crafts_client.ingest.errors import IngestError, SlideError
from crafts_client.ingest.folder_search import find_slides
from crafts_client.ingest.readers.image_files import ImageFile
from crafts_client.ingest.readers.tiff_header import TiffPage
from crafts_client.ingest.slides import Slide
from crafts_client.ingest.store_update import Source
from crafts_client.ingest.table import TableRow, read_table, write_template
from support.slide_files import write_dicom_slide
from support.slides import tissue_image, write_table, write_tissue_slide

tissue = cache(tissue_image)
"""Drawn once; not to be written to."""
SALT = Salt(bytes(SALT_BYTES))
LEFT_BEHIND = (
    "@eaDir/l0.dcm@SynoEAStream", "#recycle/old.svs", "@Recycle/old.svs", ".@__thumb/s.tif",
    ".DS_Store", "._series1-level0.dcm", "Thumbs.db", ".snapshot/daily/s.svs", "__MACOSX/s.svs",
    "$RECYCLE.BIN/s.svs", ".Trash-1000/s.svs",
)  # fmt: skip
"""By Synology, QNAP, NetApp, Macs, Windows and Linux."""


def leave_behind(folder: Path) -> None:
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not a slide")


def key_of(path: Path) -> str:
    """What decides whether a slide is read again."""
    row = TableRow(line=2, name="s", path=path, patient="p", case="", label="", caption="",
                   mpp=None)  # fmt: skip
    return Source.of(row, SALT, {}).key


def in_store(file: Path, store: Path, number: int) -> None:
    """Move a file to a store of contents and leave a link, as git-annex does."""
    held = store / f"x{number}" / "object"
    held.parent.mkdir(parents=True)
    file.rename(held)
    file.symlink_to(os.path.relpath(held, file.parent))


# ---- folders --------------------------------------------------------------------------------


def test_what_a_file_server_leaves_in_a_slide_is_no_part_of_it(tmp_path: Path) -> None:
    folder = write_dicom_slide(tmp_path / "s", tissue())
    before = key_of(folder)
    leave_behind(folder)
    assert key_of(folder) == before
    with Slide.open(folder) as slide:
        assert slide.size_px == (512, 512)


def test_plan_table_lists_no_recycle_bins_and_no_unfinished_copies(tmp_path: Path) -> None:
    write_tissue_slide(tmp_path / "a.svs")
    leave_behind(tmp_path)
    write_tissue_slide(tmp_path / "#recycle" / "old.svs")
    write_tissue_slide(tmp_path / "b.svs.part")
    found = find_slides(tmp_path)
    assert [path.name for path in found.paths] == ["a.svs"]
    assert [(path.name, why) for path, why in found.left_out] == [
        ("b.svs.part", "an unfinished copy")
    ]
    assert found.num_housekeeping == len(LEFT_BEHIND)


def test_a_slide_is_known_again_whatever_its_times_say(tmp_path: Path) -> None:
    path = write_tissue_slide(tmp_path / "a.svs")
    before = key_of(path)
    os.utime(path, (1, 1))
    assert key_of(path) == before
    write_tissue_slide(path, seed=1)
    assert key_of(path) != before


# ---- links ----------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["series1-level0.dcm", "series1-level1.dcm", ""])
def test_levels_behind_links_are_one_slide(tmp_path: Path, named: str) -> None:
    folder = write_dicom_slide(tmp_path / "s", tissue())
    for number, file in enumerate(sorted(folder.iterdir())):
        in_store(file, tmp_path / "store", number)
    table = write_table(tmp_path / "t.csv", "file,patient,label", [f"s/{named},p,COAD"])
    [row] = read_table(table)
    with Slide.open(row.path) as slide:
        assert (slide.size_px, slide.mpp_x) == ((512, 512), pytest.approx(0.5))


def test_a_link_that_was_staged_alone_brings_its_levels_along(tmp_path: Path) -> None:
    """Nextflow links the file that a task names, not what lies beside it."""
    folder = write_dicom_slide(tmp_path / "s", tissue())
    staged = tmp_path / "work" / "in.dcm"
    staged.parent.mkdir()
    staged.symlink_to(folder / "series1-level1.dcm")
    with Slide.open(staged) as slide:
        assert slide.size_px == (512, 512)


@pytest.mark.parametrize("named", ["", "series1-level1.dcm"])
def test_a_level_that_was_not_fetched_refuses_the_slide(tmp_path: Path, named: str) -> None:
    folder = write_dicom_slide(tmp_path / "s", tissue())
    (folder / "series1-level0.dcm").unlink()
    (folder / "series1-level0.dcm").symlink_to("../.git/annex/objects/gone")
    with pytest.raises(SlideError, match=r"lead to nothing \(series1-level0.dcm\).*git annex get"):
        Slide.open(folder / named)


def test_a_level_that_is_still_being_copied_refuses_the_slide(tmp_path: Path) -> None:
    folder = write_dicom_slide(tmp_path / "s", tissue())
    (folder / "series1-level0.dcm").rename(folder / "series1-level0.dcm.part")
    with pytest.raises(SlideError, match=r"series1-level0.dcm.part .* unfinished copy; copy it"):
        Slide.open(folder)


def test_a_reduced_level_alone_is_no_slide(tmp_path: Path) -> None:
    folder = write_dicom_slide(tmp_path / "s", tissue())
    (folder / "series1-level0.dcm").unlink()
    coarse = pydicom.dcmread(folder / "series1-level1.dcm")
    coarse.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
    pydicom.dcmwrite(folder / "series1-level1.dcm", coarse)
    with pytest.raises(SlideError, match=r"finest level is a reduced copy \(RESAMPLED\)"):
        Slide.open(folder)


def test_links_that_lead_nowhere_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "gone.svs").symlink_to(".git/annex/objects/gone")
    (tmp_path / "a.svs").symlink_to("b.svs")
    (tmp_path / "b.svs").symlink_to("a.svs")
    rows = ["gone.svs,p,COAD", "a.svs,p,COAD"]
    with pytest.raises(IngestError) as error:
        read_table(write_table(tmp_path / "t.csv", "file,patient,label", rows))
    assert error.value.problems == (
        "line 2: file gone.svs is a link to nothing; fetch what it leads to (git annex get, dvc "
        "pull), or mend the link",
        "line 3: file a.svs is a link that leads back to itself",
    )


@pytest.mark.parametrize(
    "content", ["/annex/objects/SHA256E-s5--1.svs\n", "version https://git-lfs.github.com/spec/v1"]
)
def test_a_pointer_is_named_as_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "s.svs").write_text(content)
    with pytest.raises(SlideError, match=r"a pointer to the file, .* git annex get, or git lfs"):
        Slide.open(tmp_path / "s.svs", mpp=0.5)


def test_what_belongs_to_a_staged_link_may_lie_at_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MIRAX and the like: the format is known only where its companions are."""
    held = tmp_path / "held" / "s.png"
    held.parent.mkdir()
    Image.fromarray(tissue()).save(held)
    (held.parent / "s").mkdir()
    (tmp_path / "s.png").symlink_to(held)
    opened = ImageFile.__init__

    def with_companion(self: ImageFile, path: Path, pages: Sequence[TiffPage] = ()) -> None:
        if not path.with_suffix("").is_dir():
            raise SlideError("its companions are not there")
        opened(self, path, pages)

    monkeypatch.setattr(ImageFile, "__init__", with_companion)
    with Slide.open(tmp_path / "s.png", mpp=0.5) as slide:
        assert slide.size_px == (512, 512)


def test_a_link_that_was_copied_as_text_is_named_as_one(tmp_path: Path) -> None:
    """Git writes links so where a file system has none."""
    folder = write_dicom_slide(tmp_path / "store", tissue())
    (tmp_path / "s").mkdir()
    for file in folder.iterdir():
        (tmp_path / "s" / file.name).write_text(f"../store/{file.name}")
    with pytest.raises(SlideError, match="a link that was copied as text; make it a link again"):
        Slide.open(tmp_path / "s" / "series1-level0.dcm", mpp=0.5)


def test_plan_table_names_links_not_what_they_lead_to(tmp_path: Path) -> None:
    slide = write_tissue_slide(tmp_path / "slides" / "a.svs")
    in_store(slide, tmp_path / "store", 1)
    write_template(tmp_path / "t.csv", find_slides(tmp_path / "slides").paths)
    assert (tmp_path / "t.csv").read_text().splitlines()[1].startswith("slides/a.svs,")


# ---- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_is_found_in_any_form_of_unicode(
    tmp_path: Path, on_disk: str, in_table: str
) -> None:
    name = "Prüfung é/Gewebe ö.png"
    path = tmp_path / unicodedata.normalize(on_disk, name)
    path.parent.mkdir()
    Image.fromarray(tissue_image(64, margin=8)).save(path)
    row = f"{unicodedata.normalize(in_table, name)},p,COAD"
    [found] = read_table(write_table(tmp_path / "t.csv", "file,patient,label", [row]))
    assert found.path.samefile(path)
    assert found.name == name  # one name makes one id


def test_two_names_that_differ_in_their_form_only_are_told(tmp_path: Path) -> None:
    rows = []
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "ö.png")
        Image.fromarray(tissue_image(64, margin=8)).save(tmp_path / name)
        rows.append(f"{name},p,COAD")
    with pytest.raises(IngestError, match=r"form of its letters in Unicode from ö.png on line 2"):
        read_table(write_table(tmp_path / "t.csv", "file,patient,label", rows))


def test_a_name_that_is_nearly_there_is_shown(tmp_path: Path) -> None:
    write_tissue_slide(tmp_path / "in" / "a.SVS")
    rows = ["in/a.svs,p,COAD", "in\\a.SVS,p,COAD"]
    with pytest.raises(IngestError) as error:
        read_table(write_table(tmp_path / "t.csv", "file,patient,label", rows))
    first, second = error.value.problems
    assert first.endswith("; there is a.SVS: write it so")
    assert second.endswith("; write / for \\")
