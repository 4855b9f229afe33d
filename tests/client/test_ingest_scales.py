"""The size of a pixel: read wherever a file says it, and refused where it says it twice."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.slides import MissingScaleError, Slide
from support.slide_files import write_dicom_slide, write_tiled_tiff
from support.slides import tissue_image

tissue = cache(tissue_image)
"""Drawn once; not to be written to."""
OME = (
    '<?xml version="1.0"?><OME><Image ID="Image:0"><Pixels SizeX="512" SizeY="512" {}/></Image>'
    '<Image ID="Image:1" Name="label"><Pixels SizeX="90" SizeY="40" PhysicalSizeX="9" '
    'PhysicalSizeY="9"/></Image></OME>'
)


def write_ome(path: Path, fields: str, *, mpp: float | None = None, **options: Any) -> Path:
    """A tiled slide of 512 px with this about its pixels in OME-XML, and with resolution tags."""
    description = OME.format(fields).encode()
    return write_tiled_tiff(path, tissue(), mpp=mpp, description=description, **options)


def physical(size: float, unit: str | None) -> str:
    units = "" if unit is None else f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    return f'PhysicalSizeX="{size}" PhysicalSizeY="{size}"{units}'


@pytest.mark.parametrize(
    ("size", "unit"),
    [(0.5, None), (0.5, "µm"), (0.5, "μm"), (0.5, "um"), (500, "nm"), (5e5, "pm"), (5000, "Å"),
     (5e-4, "mm"), (5e-5, "cm"), (5e-7, "m"), (0.5 / 25400, "in"), (0.5 / 25.4, "thou")],
)  # fmt: skip
def test_ome_xml_is_read_in_any_unit(tmp_path: Path, size: float, unit: str | None) -> None:
    with Slide.open(write_ome(tmp_path / "s.ome.tif", physical(size, unit))) as slide:
        assert (slide.mpp_x, slide.mpp_y) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("unit", ["pixel", "reference frame", "parsec"])
def test_a_unit_that_is_no_length_is_no_scale(tmp_path: Path, unit: str) -> None:
    with pytest.raises(MissingScaleError, match="no microns per pixel; give them in column mpp"):
        Slide.open(write_ome(tmp_path / "s.ome.tif", physical(0.5, unit)))


def test_ome_xml_and_tags_that_agree_are_one_scale(tmp_path: Path) -> None:
    with Slide.open(write_ome(tmp_path / "s.ome.tif", physical(0.5, "µm"), mpp=0.501)) as slide:
        assert slide.mpp_x == pytest.approx(0.5)


def test_scales_that_contradict_each_other_need_the_table(tmp_path: Path) -> None:
    path = write_ome(tmp_path / "s.ome.tif", physical(0.25, "µm"), mpp=0.635)
    told = r"OME-XML says 0.25 microns per pixel, its resolution tags 0.635; give .* column mpp"
    with pytest.raises(MissingScaleError, match=told):
        Slide.open(path)
    with Slide.open(path, mpp=0.25) as slide:
        assert slide.mpp_x == 0.25


@pytest.mark.parametrize("dpi", [72, 96, 300, 600])
def test_a_printer_s_resolution_contradicts_nothing(tmp_path: Path, dpi: int) -> None:
    tags: dict[str, Any] = {"resolution": (dpi, dpi), "resolutionunit": "INCH"}
    with Slide.open(write_ome(tmp_path / "s.ome.tif", physical(0.25, None), **tags)) as slide:
        assert slide.mpp_x == pytest.approx(0.25)
    with pytest.raises(MissingScaleError, match="cannot be right; give the true value"):
        Slide.open(write_tiled_tiff(tmp_path / "t.tif", tissue(), mpp=None, **tags))


def test_imagej_s_own_unit_is_read(tmp_path: Path) -> None:
    for unit, per_unit in (("micron", 2.0), ("\\u00B5m", 2.0), ("nm", 0.002), ("mm", 2000.0)):
        path = tmp_path / "s.tif"
        tifffile.imwrite(path, tissue(), description=f"ImageJ=1.53k\nunit={unit}\n",
                         resolution=(per_unit, per_unit), resolutionunit="NONE", metadata=None,
                         photometric="rgb")  # fmt: skip
        with Slide.open(path) as slide:
            assert (slide.reader, slide.mpp_x) == ("image", pytest.approx(0.5, rel=1e-3))


@pytest.mark.parametrize("mpp", [0.025, 0.05, 0.0559])
def test_a_tenth_of_a_microscope_s_scale_is_refused(tmp_path: Path, mpp: float) -> None:
    path = write_tiled_tiff(tmp_path / "s.tif", tissue(), mpp=mpp)
    with pytest.raises(MissingScaleError, match=r"cannot be right; give the true .* column mpp"):
        Slide.open(path)


@pytest.mark.parametrize(("power", "mpp"), [(20, 0.08), (40, 2.5)])
def test_a_scale_that_the_objective_cannot_have_is_refused(
    tmp_path: Path, power: int, mpp: float
) -> None:
    about = f"Aperio Image Library v12\n512x512 (64x64) JPEG/RGB|AppMag = {power}|MPP = {mpp}"
    path = write_tiled_tiff(tmp_path / "s.svs", tissue(), mpp=None, description=about)
    with pytest.raises(MissingScaleError, match=rf"cannot be right with an objective of {power}x"):
        Slide.open(path)
    right = write_tiled_tiff(
        tmp_path / "t.svs", tissue(), mpp=None,
        description=about.replace(f"MPP = {mpp}", f"MPP = {10 / power}"),
    )  # fmt: skip
    with Slide.open(right) as slide:
        assert slide.mpp_x == pytest.approx(10 / power)


# ---- DICOM ----------------------------------------------------------------------------------


def rewrite(folder: Path, change: Any) -> Path:
    """Change every instance in a folder."""
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        change(dataset)
        pydicom.dcmwrite(path, dataset)
    return folder


def without_spacing(dataset: Dataset) -> None:
    del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence


def without_scale(dataset: Dataset) -> None:
    del dataset.SharedFunctionalGroupsSequence
    del dataset.ImagedVolumeWidth
    del dataset.ImagedVolumeHeight


def spacing_per_frame(dataset: Dataset) -> None:
    frame = Dataset()
    frame.PixelMeasuresSequence = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    without_scale(dataset)
    dataset.PerFrameFunctionalGroupsSequence = Sequence([frame])


def spacing_at_the_top(dataset: Dataset) -> None:
    [measures] = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    dataset.PixelSpacing = measures.PixelSpacing
    without_scale(dataset)


@pytest.mark.parametrize("change", [without_spacing, spacing_per_frame, spacing_at_the_top])
def test_dicom_says_its_scale_in_several_places(tmp_path: Path, change: Any) -> None:
    path = rewrite(write_dicom_slide(tmp_path / "s", tissue()), change)
    with Slide.open(path) as slide:
        assert (slide.mpp_x, slide.mpp_y) == pytest.approx((0.5, 0.5))
        assert [level.downsample for level in slide.source.levels] == [1, 2]
        assert slide.read((0, 0, 64, 64), (64, 64)).shape == (64, 64, 3)


def test_dicom_without_a_scale_takes_that_of_the_table(tmp_path: Path) -> None:
    path = rewrite(write_dicom_slide(tmp_path / "s", tissue()), without_scale)
    with pytest.raises(MissingScaleError, match="no microns per pixel; give them in column mpp"):
        Slide.open(path)
    with Slide.open(path, mpp=0.5) as slide:
        found = slide.read((100, 140, 200, 200), (100, 100))
    truth = tissue()[140:340, 100:300].reshape(100, 2, 100, 2, 3).mean((1, 3))
    assert np.abs(found - truth).mean() < 6


def test_dicom_spacing_that_its_volume_contradicts_is_refused(tmp_path: Path) -> None:
    fields = {"ImagedVolumeWidth": 2.56, "ImagedVolumeHeight": 2.56}
    path = write_dicom_slide(tmp_path / "s", tissue(), num_levels=1, fields=fields)
    with pytest.raises(MissingScaleError, match=r"PixelSpacing says 0.5 .* ImagedVolumeWidth 5"):
        Slide.open(path)


def test_a_finest_level_that_cannot_be_opened_is_no_reason_for_a_coarser_one(
    tmp_path: Path,
) -> None:
    folder = write_dicom_slide(tmp_path / "s", tissue())
    finest = pydicom.dcmread(folder / "series1-level0.dcm")
    finest.PlanarConfiguration = 1  # which wsidicom passes over
    pydicom.dcmwrite(folder / "series1-level0.dcm", finest)
    with pytest.raises(SlideError, match="its finest level cannot be opened"):
        Slide.open(folder)
