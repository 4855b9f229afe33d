"""Small slides of every format that ingest reads, with names planted where scanners put them."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit

Pixels = npt.NDArray[np.uint8]
WHOLE_SLIDE_SOP = "1.2.840.10008.5.1.4.1.1.77.1.6"
_ROOT_UID = "1.2.826.0.1.3680043.8.498."


def write_tiled_tiff(
    path: Path,
    image: Pixels,
    *,
    mpp: float | None = 0.5,
    tile_px: int = 64,
    num_levels: int = 1,
    **options: Any,
) -> Path:
    """A plain tiled JPEG TIFF; each level halves the one before it."""
    written: dict[str, Any] = {
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": 90},
        "tile": (tile_px, tile_px),
        "metadata": None,
        "software": False,
    } | options
    if mpp is not None:
        written |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        for level in range(num_levels):
            writer.write(halved(image, level), subfiletype=1 if level else 0, **written)
    return path


def write_tiffslide_only(path: Path, image: Pixels, *, mpp: float | None = 0.5) -> Path:
    """A pyramid that OpenSlide takes for a slide and then cannot open: JPEG 2000 in plain TIFF."""
    options: dict[str, Any] = {"compression": "jpeg2000", "compressionargs": None}
    return write_tiled_tiff(path, image, mpp=mpp, num_levels=2, **options)


def set_tile_tag(path: Path, name: str, number: int, value: int) -> None:
    """Change one number of a tag of level 0, such as ``TileOffsets``."""
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags[name]
        code, start = {3: "H", 4: "I"}[int(tag.dtype)], tag.valueoffset
    with path.open("r+b") as file:
        file.seek(start + number * struct.calcsize(code))
        file.write(struct.pack(f"<{code}", min(value, 2 ** (8 * struct.calcsize(code)) - 1)))


def halved(image: Pixels, times: int) -> Pixels:
    """The image, box-reduced by 2 ** times."""
    height, width = (length >> times for length in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def write_dicom_slide(
    folder: Path,
    image: Pixels,
    *,
    mpp: float = 0.5,
    num_levels: int = 2,
    tile_px: int = 64,
    series: int = 1,
    fields: dict[str, Any] | None = None,
    flavors: Sequence[str] = (),
) -> Path:
    """A folder of instances, one for each level and one for each of ``flavors`` (LABEL, ...)."""
    folder.mkdir(parents=True, exist_ok=True)
    for level in range(num_levels):
        instance = _instance(halved(image, level), mpp * 2**level, tile_px, series, level + 1)
        instance.ImageType = ["ORIGINAL" if level == 0 else "DERIVED", "PRIMARY", "VOLUME", "NONE"]
        _save(instance, folder / f"series{series}-level{level}.dcm", fields)
    for number, flavor in enumerate(flavors, start=num_levels + 1):
        instance = _instance(image[:tile_px, :tile_px], mpp, tile_px, series, number)
        instance.ImageType = ["ORIGINAL", "PRIMARY", flavor, "NONE"]
        _save(instance, folder / f"series{series}-{flavor.lower()}.dcm", fields)
    return folder


def _instance(image: Pixels, mpp: float, tile_px: int, series: int, number: int) -> FileDataset:
    """A TILED_FULL instance with JPEG frames."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = WHOLE_SLIDE_SOP
    meta.MediaStorageSOPInstanceUID = f"{_ROOT_UID}{series}.9.{number}"
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = WHOLE_SLIDE_SOP
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = f"{_ROOT_UID}{series}.1"
    dataset.SeriesInstanceUID = f"{_ROOT_UID}{series}.2"
    dataset.FrameOfReferenceUID = f"{_ROOT_UID}{series}.3"
    dataset.Modality, dataset.InstanceNumber = "SM", number
    dataset.Manufacturer, dataset.ManufacturerModelName = "Hamamatsu", "C13220"
    height, width = image.shape[:2]
    dataset.TotalPixelMatrixColumns, dataset.TotalPixelMatrixRows = width, height
    dataset.ImagedVolumeWidth, dataset.ImagedVolumeHeight = width * mpp / 1e3, height * mpp / 1e3
    dataset.ImagedVolumeDepth, dataset.FocusMethod = 0.001, "AUTO"
    dataset.SpecimenLabelInImage, dataset.ExtendedDepthOfField = "NO", "NO"
    dataset.Rows = dataset.Columns = tile_px
    dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
    dataset.PhotometricInterpretation = "YBR_FULL_422"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "01"
    dataset.DimensionOrganizationType = "TILED_FULL"
    dataset.NumberOfOpticalPaths, dataset.TotalPixelMatrixFocalPlanes = 1, 1
    dataset.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 0, 0
    dataset.TotalPixelMatrixOriginSequence = [origin]
    path = Dataset()
    path.OpticalPathIdentifier = "0"
    dataset.OpticalPathSequence = [path]
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1e3, mpp / 1e3], 0.001
    shared.PixelMeasuresSequence = [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = list(_tiles(image, tile_px))
    dataset.NumberOfFrames = len(frames)
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return dataset


def _save(dataset: FileDataset, path: Path, fields: dict[str, Any] | None) -> None:
    for keyword, value in (fields or {}).items():
        setattr(dataset, keyword, value)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def _tiles(image: Pixels, tile_px: int) -> list[bytes]:
    """JPEG tiles in rows, those at the edge filled up with white."""
    rows, columns = (-(-length // tile_px) for length in image.shape[:2])
    padded = np.full((rows * tile_px, columns * tile_px, 3), 255, dtype=np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    tiles = []
    for row in range(rows):
        for column in range(columns):
            buffer = io.BytesIO()
            place = np.s_[row * tile_px : (row + 1) * tile_px]
            across = np.s_[column * tile_px : (column + 1) * tile_px]
            Image.fromarray(padded[place, across]).save(buffer, "JPEG", quality=90)
            tiles.append(buffer.getvalue())
    return tiles
