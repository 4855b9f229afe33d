"""What a file carries beside its picture is told by kind, and never by value."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from crafts_client.ingest import source_audit
from crafts_client.ingest.slides import Slide
from crafts_client.ingest.source_audit import audit_image, audit_source
from support.slide_files import write_dicom_slide, write_tiffslide_only, write_tiled_tiff
from support.slides import tissue_image, write_tissue_slide

PLANTED = "ZEBRA"
"""Stands in every planted value and in the names of some fields."""


def _audit(path: Path) -> str:
    with Slide.open(path, mpp=0.5) as slide:
        text = "\n".join(audit_source(path, slide))
    assert PLANTED.lower() not in text.lower()
    return text


@pytest.mark.parametrize(
    "field, kind",
    [
        ("User", source_audit.PERSON),
        ("Date", source_audit.DATE),
        ("Time", source_audit.TIME),
        ("ScanScope ID", source_audit.DEVICE),
        ("Filename", source_audit.FILE_NAME),
        ("Title", source_audit.TITLE),
        ("Barcode", source_audit.BARCODE),
        ("Slide ID", source_audit.CASE),
        ("Patient ID", source_audit.PATIENT),
    ],
)
def test_field_of_aperio_is_told_by_kind(tmp_path: Path, field: str, kind: str) -> None:
    description = (
        f"Aperio Image Library v11\r\n512x512 (64x64) JPEG/RGB Q=90|AppMag = 20|MPP = 0.5"
        f"|{PLANTED} = 1|{field} = {PLANTED}"
    )
    path = write_tiled_tiff(tmp_path / f"{PLANTED}.svs", tissue_image(), description=description)
    assert kind in _audit(path)
    plain = write_tiled_tiff(
        tmp_path / "p.svs", tissue_image(), description=description.rpartition("|")[0]
    )
    assert kind not in _audit(plain)


def test_pictures_beside_the_slide_are_told(tmp_path: Path) -> None:
    text = _audit(write_tissue_slide(tmp_path / f"{PLANTED}.svs", label=PLANTED))
    for kind in (source_audit.LABEL, source_audit.MACRO, source_audit.THUMBNAIL):
        assert kind in text


@pytest.mark.parametrize("write", [write_tiled_tiff, write_tiffslide_only])
def test_plain_slide_carries_nothing(tmp_path: Path, write: Any) -> None:
    assert _audit(write(tmp_path / "s.tif", tissue_image())) == ""


@pytest.mark.parametrize(
    "code, kind",
    [
        (269, source_audit.FILE_NAME),
        (306, source_audit.DATE),
        (315, source_audit.PERSON),
        (316, source_audit.COMPUTER),
        (33432, source_audit.COPYRIGHT),
        (65001, source_audit.PRIVATE),
    ],
)
def test_tag_of_tiff_is_told_by_kind(tmp_path: Path, code: int, kind: str) -> None:
    path = write_tiled_tiff(
        tmp_path / "s.tif", tissue_image(), extratags=[(code, "s", 0, PLANTED, True)]
    )
    assert kind in _audit(path)


def test_xml_and_json_in_a_description_are_looked_through(tmp_path: Path) -> None:
    for number, text in enumerate(
        (
            f"<Scan><OperatorID>{PLANTED}</OperatorID><ScanDate>{PLANTED}</ScanDate></Scan>",
            f'{{"operator": "{PLANTED}", "scan date": "{PLANTED}"}}',
            f'<Attribute Name="OPERATOR">{PLANTED}</Attribute><a scandate="{PLANTED}"/>',
        )
    ):
        path = write_tiled_tiff(tmp_path / f"{number}.tif", tissue_image(), description=text)
        audit = _audit(path)
        for kind in (source_audit.DESCRIPTION, source_audit.PERSON, source_audit.DATE):
            assert kind in audit


def test_comment_in_a_tiles_jpeg_is_told(tmp_path: Path) -> None:
    path = write_tiled_tiff(tmp_path / "s.tif", tissue_image())
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[0]
    comment = b"\xff\xfe\x00\x07" + PLANTED.encode()
    data[offset + 2 : offset + 2 + len(comment)] = comment  # the tile is broken, the comment whole
    path.write_bytes(data)
    assert source_audit.COMMENT in _audit(path)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x013B], exif[0x0132] = PLANTED, PLANTED
    return exif


def test_fields_of_jpeg_are_told(tmp_path: Path) -> None:
    path = tmp_path / "s.jpg"
    Image.fromarray(tissue_image()).save(path, exif=_exif(), comment=PLANTED.encode())
    text = _audit(path)
    assert source_audit.EXIF in text
    assert source_audit.COMMENT in text


def test_fields_of_png_are_told_also_behind_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "s.png"
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", PLANTED)
    info.add_itxt(PLANTED, PLANTED, zip=True)
    Image.fromarray(tissue_image()).save(path, pnginfo=info, exif=_exif())
    text = _audit(path)
    assert source_audit.PNG_TEXT in text
    assert source_audit.EXIF in text
    Image.fromarray(tissue_image()).save(path)
    assert _audit(path) == ""


def test_fields_of_webp_and_plain_tiff_are_told(tmp_path: Path) -> None:
    Image.fromarray(tissue_image()).save(tmp_path / "s.webp", exif=_exif(), xmp=PLANTED.encode())
    text = _audit(tmp_path / "s.webp")
    assert source_audit.EXIF in text
    assert source_audit.XMP in text
    Image.fromarray(tissue_image()).save(tmp_path / "s.tif", tiffinfo={315: PLANTED})
    assert source_audit.PERSON in _audit(tmp_path / "s.tif")


@pytest.mark.parametrize(
    "keyword, value, kind",
    [
        ("PatientName", f"{PLANTED}^JOHN", source_audit.PERSON),
        ("PatientName", f"{PLANTED}^JOHN", source_audit.PATIENT),
        ("PatientID", PLANTED, source_audit.PATIENT),
        ("AccessionNumber", PLANTED, source_audit.CASE),
        ("ContainerIdentifier", PLANTED, source_audit.CASE),
        ("AcquisitionDateTime", "19510203040506", source_audit.DATE),
        ("ContentTime", "040506", source_audit.TIME),
        ("InstitutionName", PLANTED, source_audit.INSTITUTION),
        ("DeviceSerialNumber", PLANTED, source_audit.DEVICE),
        ("StudyDescription", PLANTED, source_audit.FREE_TEXT),
        ("BarcodeValue", PLANTED, source_audit.BARCODE),
        ("BurnedInAnnotation", "YES", source_audit.BURNED_IN),
    ],
)
def test_field_of_dicom_is_told_by_kind(
    tmp_path: Path, keyword: str, value: str, kind: str
) -> None:
    empty = write_dicom_slide(tmp_path / f"{PLANTED}-a", tissue_image(), fields={keyword: ""})
    assert kind not in _audit(empty)
    assert kind in _audit(
        write_dicom_slide(tmp_path / "b", tissue_image(), fields={keyword: value})
    )


def test_label_of_dicom_is_told(tmp_path: Path) -> None:
    path = write_dicom_slide(tmp_path / "s", tissue_image(), flavors=("LABEL", "OVERVIEW"))
    text = _audit(path)
    assert source_audit.LABEL in text
    assert source_audit.MACRO in text


def test_file_that_cannot_be_looked_through_says_so(tmp_path: Path) -> None:
    """Here the audit meets a file that was cut off after the slide was opened."""
    path = write_tiled_tiff(tmp_path / "s.tif", tissue_image())
    with Slide.open(path) as slide:
        path.write_bytes(path.read_bytes()[:200])
        assert audit_source(path, slide)[-1] == source_audit.UNSEEN


def test_pixels_are_no_fields(tmp_path: Path) -> None:
    """A name inside the picture's data is not taken for one of a field."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "BMP")
    (tmp_path / "s.bmp").write_bytes(buffer.getvalue())
    assert _audit(tmp_path / "s.bmp") == ""


def _profile(description: bytes) -> bytes:
    """sRGB that calls itself otherwise, in as many letters."""
    profile: bytes = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    place = profile.find("sRGB built-in".encode("utf-16-be"))
    text = description.decode().ljust(13)[:13].encode("utf-16-be")
    assert place > 0
    return profile[:place] + text + profile[place + len(text) :]


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_ready_tile_is_audited_as_a_slide_is(tmp_path: Path, ending: str) -> None:
    exif = Image.Exif()
    exif[0x013B] = PLANTED
    image = Image.fromarray(tissue_image(64, margin=0))
    path = tmp_path / f"a.{ending}"
    image.save(path, exif=exif, icc_profile=_profile(PLANTED.encode()))
    found = audit_image(path)
    assert source_audit.PROFILE in found
    assert {source_audit.EXIF, source_audit.PERSON} & set(found)
    assert PLANTED not in "".join(found)
    plain = tmp_path / f"plain.{ending}"
    image.save(plain, icc_profile=_profile(b"sRGB built-in"))
    assert set(audit_image(plain)) <= {source_audit.EXIF}


def test_png_text_and_comments_of_a_ready_tile_are_told(tmp_path: Path) -> None:
    image = Image.fromarray(tissue_image(64, margin=0))
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", PLANTED)
    image.save(tmp_path / "a.png", pnginfo=text)
    image.save(tmp_path / "a.jpg", comment=PLANTED.encode())
    assert audit_image(tmp_path / "a.png") == (source_audit.PNG_TEXT,)
    assert audit_image(tmp_path / "a.jpg") == (source_audit.COMMENT,)
    (tmp_path / "b.png").write_bytes(b"no image")
    assert audit_image(tmp_path / "b.png") == (source_audit.UNSEEN,)
