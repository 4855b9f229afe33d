"""DICOM whole-slide images: the levels of one series, one file each or several."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers import jpeg_stream
from crafts_client.ingest.readers.dicom_instances import NOT_DICOM, instances
from crafts_client.ingest.readers.scales import number
from crafts_client.ingest.readers.scanners import known_scanner
from crafts_client.ingest.readers.seam import (
    DAMAGED,
    MAX_CHUNK_PX,
    Pixels,
    ReaderName,
    Scale,
    Size,
    foreign,
    pyramid,
)

CACHE_BYTES = 16 * 2**20
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_JPEG_2000 = (
    "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.201",
    "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203",
)  # fmt: skip


class WsiDicomFile:
    """The levels of one series."""

    name: ReaderName = "wsidicom"
    has_plain_tiles: bool = False

    def __init__(self, path: Path) -> None:
        self.files, width = instances(path)
        with foreign(NOT_DICOM), ExitStack() as opened:
            import wsidicom
            from wsidicom.file import WsiDicomFileSource

            settings = wsidicom.Settings(
                strict_tile_size_check=False,  # or a level with tiles of its own is left out
                decoded_frame_cache_size=CACHE_BYTES,
                encoded_frame_cache_size=CACHE_BYTES,
            )
            with wsidicom.use_settings(settings):
                source = opened.enter_context(WsiDicomFileSource.open(self.files))
            self.scales = _take_scales([r for r in source.readers if _is_level(r)])
            self._slide: Any = opened.enter_context(
                wsidicom.WsiDicom(source, source_owned=False, settings=settings)
            )
            if len(self._slide.pyramids) != 1:
                raise SlideError(f"its series holds {len(self._slide.pyramids)} pictures, not one")
            self._pyramid: Any = list(self._slide.pyramids[0])
            for level in self._pyramid:
                _check_level(level)
                self._check_colour(level)
            self.levels = pyramid([_size(level.size) for level in self._pyramid])
            if self.levels[0].width != width:
                raise SlideError(
                    "its finest level cannot be opened, or the pixel spacings of its levels "
                    "contradict their sizes"
                )
            dataset = self._pyramid[0].default_instance.dataset.as_dataset()
            self.scanner = known_scanner(
                dataset.get("Manufacturer"), dataset.get("ManufacturerModelName")
            )
            self.objective_power = _objective_power(dataset)
            self._opened = opened.pop_all()

    def start(self, level: int, corner: Size) -> tuple[float, float]:
        downsample = self.levels[level].downsample
        return corner[0] * downsample, corner[1] * downsample

    def read(self, level: int, corner: Size, extent: Size) -> Pixels:
        with foreign():
            number = self._pyramid[level].level
            region: Pixels = self._slide.read_region(
                corner, number, extent, threads=1, as_array=True
            )
            if region.dtype != np.uint8 or region.shape != (extent[1], extent[0], 3):
                raise SlideError(DAMAGED)
            return region

    def _check_colour(self, level: Any) -> None:
        """Compare what a level says of its colours with how they are stored."""
        said = level.default_instance.dataset.photometric_interpretation
        syntax = level.default_instance.image_data.transfer_syntax
        if said not in _colours_in(syntax):
            raise SlideError(f"its colours, {said}, are not read in this compression; expected RGB")
        if said == "RGB" and syntax in _JPEG and self._stored_colour(level) == "YCbCr":
            raise SlideError(
                "its PhotometricInterpretation says RGB, its JPEG frames YCbCr: the colours would "
                "be wrong; correct it: dcmodify -m PhotometricInterpretation=YBR_FULL_422 FILE"
            )

    def _stored_colour(self, level: Any) -> str | None:
        """What the first frame of JPEG says; None where it says nothing or is damaged."""
        try:
            with foreign():
                frame: bytes = self._slide.read_encoded_tile(
                    level.level, (0, 0), crop_to_image_boundary=False
                )
                return jpeg_stream.stored_colour(frame)
        except SlideError:  # others may be whole
            return None

    def close(self) -> None:
        with foreign():
            self._opened.close()


def _colours_in(syntax: str) -> tuple[str, ...]:
    """What decoders turn into RGB; anything else they pass on as it is."""
    if syntax in _JPEG:
        return "RGB", "YBR_FULL", "YBR_FULL_422"
    return ("RGB", "YBR_RCT", "YBR_ICT") if syntax in _JPEG_2000 else ("RGB",)


def _is_level(reader: Any) -> bool:
    return str(reader.image_type.value) == "VOLUME"


def _check_level(level: Any) -> None:
    dataset = level.default_instance.dataset
    if dataset.samples_per_pixel != 3 or dataset.bits != 8:
        raise SlideError("not a picture of 8 bits of red, green and blue")
    width, height = _size(dataset.tile_size)
    if not 0 < width * height <= MAX_CHUNK_PX:
        raise SlideError(NOT_DICOM)


def _size(size: Any) -> Size:
    return int(size.width), int(size.height)


# ---- scale ----------------------------------------------------------------------------------


def _take_scales(levels: Sequence[Any]) -> tuple[Scale, ...]:
    """What the finest of some open files says of its scale; those without one get one that fits.

    wsidicom orders levels by their spacing, and does not open a slide that has none.
    """
    if not levels:
        raise SlideError(NOT_DICOM)
    finest = max(levels, key=lambda level: level.dataset.image_size.width)
    scales = tuple(_scales(finest))
    mpp_x, mpp_y = scales[0][1:] if scales else (1.0, 1.0)
    for level in levels:
        if level.dataset.pixel_spacing is None or level.dataset.mm_size is None:
            _set_scale(level.dataset, finest.dataset.image_size, (mpp_x, mpp_y))
    return scales


def _set_scale(dataset: Any, whole: Any, mpp: tuple[float, float]) -> None:
    from wsidicom.geometry import SizeMm

    size = dataset.image_size
    width, height = mpp[0] * whole.width / 1e3, mpp[1] * whole.height / 1e3
    # Both are computed once and kept: here they are before anybody asks.
    dataset.pixel_spacing = SizeMm(width / size.width, height / size.height)
    dataset.mm_size = SizeMm(width, height)


def _scales(level: Any) -> Iterator[Scale]:
    """PixelSpacing (rows first), wherever it stands, and the volume that all pixels cover."""
    dataset = level.dataset
    size, spacing, volume = dataset.image_size, dataset.pixel_spacing, dataset.mm_size
    if spacing is not None:
        yield Scale("its PixelSpacing", spacing.width * 1e3, spacing.height * 1e3)
    else:
        yield from _spacings_elsewhere(str(level.filepath))
    if volume is not None and volume.width > 0 and volume.height > 0:
        mpp_x, mpp_y = volume.width / size.width * 1e3, volume.height / size.height * 1e3
        yield Scale("its ImagedVolumeWidth", mpp_x, mpp_y)


def _spacings_elsewhere(path: str) -> Iterator[Scale]:
    """In the groups of the first frame, or at the top, where radiology keeps it."""
    import pydicom

    tags = ["PerFrameFunctionalGroupsSequence", "PixelSpacing"]
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    measures = frames[0].get("PixelMeasuresSequence", []) if frames else []
    for holder in (*measures[:1], header):
        rows, columns = (number(n) for n in (holder.get("PixelSpacing") or (None, None)))
        if rows is not None and columns is not None:
            yield Scale("its PixelSpacing", columns * 1e3, rows * 1e3)


def _objective_power(dataset: Any) -> float | None:
    powers = {
        number(path.get("ObjectiveLensPower")) for path in dataset.get("OpticalPathSequence", [])
    }
    return powers.pop() if len(powers) == 1 else None
