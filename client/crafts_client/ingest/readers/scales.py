"""How large a pixel is, wherever a file says it: each statement with the name of where it stands.

A file can say it several times and not mean the same; ``slides`` decides what to make of that.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from crafts_client.ingest.readers.seam import Scale
from crafts_client.ingest.readers.tiff_header import TiffPage

_MICRONS: Mapping[str, float] = {
    "pm": 1e-6, "å": 1e-4, "nm": 1e-3, "nanometer": 1e-3, "μm": 1.0, "um": 1.0, "micron": 1.0,
    "micrometer": 1.0, "mm": 1e3, "millimeter": 1e3, "cm": 1e4, "centimeter": 1e4, "dm": 1e5,
    "m": 1e6, "meter": 1e6, "in": 25_400.0, "inch": 25_400.0, "inche": 25_400.0,
    "thou": 25.4, "mil": 25.4, "ft": 304_800.0, "pt": 25_400.0 / 72,
}  # fmt: skip
"""In one of each unit that OME-XML and ImageJ know."""
_TAG_UNITS = {2: 25_400.0, 3: 1e4, 4: 1e3, 5: 1.0}
_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b([^>]{1,4000})>")
_ATTRIBUTE = re.compile(r"\b(\w{1,40})\s{0,9}=\s{0,9}[\"']([^\"']{0,200})[\"']")
_MAGNIFICATION = re.compile(r"\bNominalMagnification=[\"']([^\"']{0,40})[\"']")
_IMAGEJ_UNIT = re.compile(r"^unit=(.{1,40})$", re.MULTILINE)


def tiff_scales(pages: Sequence[TiffPage]) -> tuple[Scale, ...]:
    """What a TIFF's first page says: OME-XML, ImageJ's fields, resolution tags, in this order."""
    if not pages:
        return ()
    first = pages[0]
    ours = [*_ome_scales(first), *_imagej_scale(first)]
    unit = _TAG_UNITS.get(first.resolution_unit)
    if unit is not None and first.resolution is not None:
        mpp_x, mpp_y = (unit / resolution for resolution in first.resolution)
        ours.append(Scale("its resolution tags", mpp_x, mpp_y))
    return tuple(ours)


def objective_power(pages: Sequence[TiffPage]) -> float | None:
    """The magnification that OME-XML names, if it is one."""
    found = {number(text) for text in _MAGNIFICATION.findall(pages[0].description if pages else "")}
    return found.pop() if len(found) == 1 else None


def number(text: object) -> float | None:
    """A finite number above zero, or None."""
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _ome_scales(page: TiffPage) -> Iterator[Scale]:
    """Of every picture in OME-XML that has the size of the page."""
    for element in _PIXELS.findall(page.description):
        fields = dict(_ATTRIBUTE.findall(element))
        if (fields.get("SizeX"), fields.get("SizeY")) != (str(page.width), str(page.length)):
            continue
        mpp_x, mpp_y = (_microns(fields, axis) for axis in "XY")
        if mpp_x is not None and mpp_y is not None:
            yield Scale("its OME-XML", mpp_x, mpp_y)


def _microns(fields: Mapping[str, str], axis: str) -> float | None:
    size = number(fields.get(f"PhysicalSize{axis}"))
    unit = _unit(fields.get(f"PhysicalSize{axis}Unit", "um"))
    return None if size is None or unit is None else size * unit


def _imagej_scale(page: TiffPage) -> Iterator[Scale]:
    """ImageJ writes pixels per its own unit, and no unit that TIFF knows."""
    found = _IMAGEJ_UNIT.search(page.description)
    if not page.description.startswith("ImageJ=") or found is None or page.resolution is None:
        return
    unit = _unit(found[1])
    if unit is not None:
        yield Scale("its ImageJ fields", *(unit / resolution for resolution in page.resolution))


def _unit(text: str) -> float | None:
    """Microns in a unit, in any of its spellings: ``µm`` has two letters in Unicode."""
    written = text.replace("\\u00B5", "µ").strip()
    plain = unicodedata.normalize("NFKC", written)
    word = plain.casefold().replace("metre", "meter")
    if plain == "Mm":  # a megametre is no millimetre
        return None
    return _MICRONS.get(word) or _MICRONS.get(word.removesuffix("s"))
