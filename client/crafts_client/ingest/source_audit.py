"""What a slide file carries beside its picture that may name somebody, by kind and never by value.

None of it is copied: tiles are pixels. The operator is told, because the same files may go
elsewhere, and because a label can also stand on the glass itself. The words are a closed list;
nothing that is read from a file, be it the name of a field, is repeated.
"""

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers import jpeg_stream
from crafts_client.ingest.readers.dicom_files import WsiDicomFile
from crafts_client.ingest.readers.image_files import FORMATS
from crafts_client.ingest.readers.jpeg_stream import JpegError
from crafts_client.ingest.readers.openslide_files import OpenSlideFile
from crafts_client.ingest.readers.seam import foreign
from crafts_client.ingest.readers.tiff_header import is_tiff, read_tiff_header
from crafts_client.ingest.slides import Slide

UNSEEN = "fields that could not be looked at"
MAX_PAGES = 64
MAX_TEXT = 2**20
MAX_STREAM_BYTES = 2**26

LABEL, MACRO, THUMBNAIL = "a label image", "a macro image, which may show the label", "a thumbnail"
OTHER_PICTURES = "further pictures"
DESCRIPTION, COMMENT = "a description", "comments inside the compressed picture"
PERSON, PATIENT, DATE, TIME = (
    "names or accounts of persons",
    "fields about a patient",
    "a date",
    "a time",
)
DEVICE = "a serial number or name of the scanner"
COMPUTER, INSTITUTION = "a name of a computer", "an institution"
FILE_NAME, TITLE, BARCODE = "a file name", "a title", "a barcode"
CASE = "an accession, case, specimen or slide number"
UNIQUE_ID = "unique numbers that lead back to the image"
FREE_TEXT, PRIVATE = "comments or other free text", "private fields of a vendor"
EXIF, XMP, IPTC = "EXIF fields", "XMP fields", "IPTC or Photoshop fields"
PNG_TEXT, POSITION = "text fields of PNG", "a geographic position"
COPYRIGHT, BURNED_IN = "a copyright notice", "a note that text or a label is in the picture"
PREAMBLE = "data before the DICOM header"
PROFILE = "a colour profile described in words of its own"
_STANDARD_PROFILES = (
    "srgb", "adobe rgb", "display p3", "dci-p3", "prophoto", "rec.", "bt.", "gray", "grey",
    "generic", "dot gain", "u.s. web", "coated", "e-srgb", "built-in",
)  # fmt: skip
"""How the descriptions of profiles begin that come with programs, not with scanners or persons."""

_WORDS: tuple[tuple[str, str], ...] = (
    (r"patient|mrn|birth|gender", PATIENT),
    (r"user|operator|technician|physician|author|artist|experimenter|owner|personname", PERSON),
    (r"serial|scanscopeid|scannerid|deviceid|stationname|instrumentid", DEVICE),
    (r"computer|hostname|machinename|workstation", COMPUTER),
    (r"institution|hospital|laborator|department|address|customer", INSTITUTION),
    (r"barcode|bardcode", BARCODE),
    (r"filename|filepath|originalname|documentname|directory", FILE_NAME),
    (r"title", TITLE),
    (r"accession|caseid|casenumber|caseno|specimen|slideid|slidename|slidenumber|labelid|sampleid"
     r"|studyid|blockid|container|labno", CASE),
    (r"uuid|guid|uid$|imageid|uniqueid|identifier", UNIQUE_ID),
    (r"date", DATE),
    (r"time(?!out|lapse)", TIME),
    (r"comment|remark|annotation|note|description|label(?!image)", FREE_TEXT),
)  # fmt: skip
"""Words in the name of a field, reduced to letters and digits, and what such a field holds."""

_TIFF_TAGS = {
    269: FILE_NAME,
    270: DESCRIPTION,
    285: TITLE,
    306: DATE,
    315: PERSON,
    316: COMPUTER,
    700: XMP,
    33432: COPYRIGHT,
    33723: IPTC,
    34377: IPTC,
    34665: EXIF,
    34853: POSITION,
    37510: FREE_TEXT,
    40091: TITLE,
    40092: FREE_TEXT,
    40093: PERSON,
    42016: UNIQUE_ID,
    42032: PERSON,
    42033: DEVICE,
    50735: DEVICE,
}
_FIRST_PRIVATE_TAG = 65000
_FIELD_NAMES = re.compile(
    r"\bName=\"(\w{1,80})\""  # Philips
    r"|([A-Za-z][\w .-]{0,60}?)\s{0,4}="  # Aperio's and INI's fields, attributes of XML
    r"|<([A-Za-z][\w:.-]{0,60})"  # elements of XML
    r"|\"(\w[\w .-]{0,60})\"\s*:"  # JSON
)
_FLAVORS = {"LABEL": LABEL, "OVERVIEW": MACRO, "LOCALIZER": MACRO, "THUMBNAIL": THUMBNAIL}
_PER_FRAME = 0x52009230


def audit_source(path: Path, slide: Slide) -> tuple[str, ...]:
    """Each kind of identifying thing in a file, such as "a date"; ingest copies none of them.

    Args:
        path: What ``slide`` was opened from.
        slide: Open.

    Returns:
        Words for the operator, in a fixed order. They hold no value and no name of a field.
        Where the file could not be looked through, the last says so.
    """
    return _found(_looks(path, slide))


def audit_image(path: Path) -> tuple[str, ...]:
    """The same for an image file that is no slide: a tile that somebody else cut."""
    return _found(
        [partial(_tiff_kinds if is_tiff(path) else _image_kinds, path), partial(_profile, path)]
    )


def _found(looks: Iterable[Callable[[], set[str]]]) -> tuple[str, ...]:
    kinds: set[str] = set()
    is_whole = True
    for look in looks:
        try:
            with foreign():
                kinds.update(look())
        except SlideError:
            is_whole = False
    return (*sorted(kinds), *(() if is_whole else (UNSEEN,)))


def _looks(path: Path, slide: Slide) -> Iterator[Callable[[], set[str]]]:
    """What is to be looked at; each may fail by itself."""
    source = slide.source
    if isinstance(source, WsiDicomFile):
        yield from (partial(_dicom_kinds, file) for file in source.files)
        return
    if isinstance(source, OpenSlideFile):
        yield lambda: _picture_kinds(source.associated_images())
        yield lambda: _named_kinds(source.property_names())
    if is_tiff(path):
        yield partial(_tiff_kinds, path)
    elif slide.reader == "image":
        yield partial(_image_kinds, path)
    if slide.reader == "image":
        yield partial(_profile, path)


def _picture_kinds(names: Iterable[str]) -> set[str]:
    kinds = {"label": LABEL, "macro": MACRO, "thumbnail": THUMBNAIL}
    return {kinds.get(name.lower(), OTHER_PICTURES) for name in names}


def _named_kinds(names: Iterable[str]) -> set[str]:
    """What fields of these names hold. OpenSlide's own are left out but for the comment."""
    kinds = set()
    for name in names:
        if name.startswith("openslide."):
            kinds |= {DESCRIPTION} if name == "openslide.comment" else set()
        else:
            kinds |= _word_kinds(name.partition(".")[2] or name)
    return kinds


def _word_kinds(name: str) -> set[str]:
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return {kind for words, kind in _WORDS if re.search(words, letters)}


def _text_kinds(text: str) -> set[str]:
    """What the fields in a description hold, be it Aperio's, XML or JSON."""
    names = {next(filter(None, found.groups())) for found in _FIELD_NAMES.finditer(text[:MAX_TEXT])}
    return set().union(*map(_word_kinds, names))


def _tiff_kinds(path: Path) -> set[str]:
    read_tiff_header(path)
    import tifffile

    kinds: set[str] = set()
    with tifffile.TiffFile(path) as file:
        for number, page in enumerate(file.pages[:MAX_PAGES]):
            for tag in page.tags:
                kinds |= _tiff_tag_kinds(tag)
            kinds |= _tiff_stream_kinds(file.filehandle, page)
            if number and not page.is_tiled:
                kinds |= _page_name_kinds(str(page.description), int(page.subfiletype))
        if len(file.pages) > MAX_PAGES:
            raise SlideError("too many pages to look at")
    return kinds


def _tiff_tag_kinds(tag: Any) -> set[str]:
    if tag.count == 0 or tag.value in ("", b"", 0):
        return set()
    kinds = {_TIFF_TAGS[tag.code]} if tag.code in _TIFF_TAGS else set()
    if tag.code == 270:
        kinds |= _text_kinds(str(tag.value))
    if tag.code == 34675:
        kinds |= _profile_kinds(bytes(tag.value))
    if tag.code >= _FIRST_PRIVATE_TAG:
        kinds |= {PRIVATE}
    if tag.code == 34665 and isinstance(tag.value, dict):
        kinds |= set().union(*(_word_kinds(str(name)) for name in tag.value))
    return kinds


def _page_name_kinds(description: str, subfile: int) -> set[str]:
    """What an untiled page is, in the way that scanners mark it."""
    kinds = {kind for word, kind in (("label", LABEL), ("macro", MACRO)) if word in description}
    if "->" in description:
        kinds |= {THUMBNAIL}
    return kinds or ({MACRO} if subfile == 9 else {OTHER_PICTURES})


def _tiff_stream_kinds(file: Any, page: Any) -> set[str]:
    """Comments in the JPEG stream of a page's tables and of its first tile."""
    if page.compression != 7:
        return set()
    kinds = _stream_kinds(bytes(page.jpegtables)) if page.jpegtables is not None else set()
    if page.databytecounts and 0 < page.databytecounts[0] <= MAX_STREAM_BYTES:
        file.seek(page.dataoffsets[0])
        kinds |= _stream_kinds(file.read(page.databytecounts[0]))
    return kinds


def _stream_kinds(jpeg: bytes) -> set[str]:
    """What the segments of a JPEG stream hold; a damaged stream as far as it goes."""
    kinds = set()
    try:
        for segment in jpeg_stream.segments(jpeg):
            if segment.marker == jpeg_stream.COM:
                kinds |= {COMMENT}
            elif segment.marker == 0xE1:
                kinds |= {XMP} if b"adobe.com/xap" in segment.payload[:64] else {EXIF}
            elif segment.marker == 0xED:
                kinds |= {IPTC}
    except JpegError:
        pass
    return kinds


def _image_kinds(path: Path) -> set[str]:
    with path.open("rb") as file:
        data = file.read(MAX_STREAM_BYTES)
    if data.startswith(b"\x89PNG"):
        chunks = {b"tEXt": PNG_TEXT, b"zTXt": PNG_TEXT, b"iTXt": PNG_TEXT, b"eXIf": EXIF,
                  b"tIME": DATE}  # fmt: skip
        return {chunks[name] for name in _chunk_names(data[8:], ">I4s", 12, 1) if name in chunks}
    if data.startswith(b"RIFF"):
        chunks = {b"EXIF": EXIF, b"XMP ": XMP}
        return {chunks[name] for name in _chunk_names(data[12:], "<4sI", 8, 2) if name in chunks}
    return _stream_kinds(data)


def _profile(path: Path) -> set[str]:
    with Image.open(path, formats=FORMATS) as image:
        return _profile_kinds(image.info.get("icc_profile") or b"")


def _profile_kinds(profile: bytes) -> set[str]:
    """A colour profile whose description no program comes with can name a scanner or a person."""
    text = _profile_description(profile).strip("\0 ").lower()
    return {PROFILE} if profile and not text.startswith(_STANDARD_PROFILES) else set()


def _profile_description(profile: bytes) -> str:
    """What an ICC profile calls itself (tag ``desc``, of versions 2 and 4); empty if nothing."""
    (num_tags,) = struct.unpack_from(">I", profile, 128) if len(profile) >= 132 else (0,)
    for number in range(min(num_tags, 100)):
        tag, start, length = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if tag == b"desc":
            value = profile[start : start + length]
            if value[:4] == b"mluc":
                num_bytes, offset = struct.unpack_from(">II", value, 20)
                return value[offset : offset + num_bytes].decode("utf-16-be", "replace")
            (num_bytes,) = struct.unpack_from(">I", value, 8)
            return value[12 : 12 + num_bytes].decode("latin-1")
    return ""


def _chunk_names(data: bytes, head: str, overhead_bytes: int, alignment: int) -> Iterator[bytes]:
    """Names of the chunks of a PNG or RIFF file, whose head has a length and a name."""
    place, head_bytes = 0, struct.calcsize(head)
    while place + head_bytes <= len(data):
        fields = struct.unpack_from(head, data, place)
        name, length = sorted(fields, key=lambda field: isinstance(field, int))
        yield name
        place += overhead_bytes + -(-length // alignment) * alignment


def _dicom_kinds(path: Path) -> set[str]:
    import pydicom

    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    flavors = dataset.get("ImageType") or ()
    kinds = {kind for flavor, kind in _FLAVORS.items() if flavor in flavors}
    kinds |= {PREAMBLE} if any(dataset.preamble or b"") else set()
    for element in _elements(dataset):
        kinds |= _dicom_element_kinds(element)
    return kinds


def _elements(dataset: Any) -> Iterator[Any]:
    """Every element that has a value, those of sequences too, but not those of single frames."""
    for tag in sorted(dataset.keys()):
        if tag == _PER_FRAME:
            continue
        element = dataset[tag]
        if element.VR == "SQ":
            for item in element.value:
                yield from _elements(item)
        elif not element.is_empty:
            yield element


def _dicom_element_kinds(element: Any) -> set[str]:
    if element.tag.is_private:
        return {PRIVATE}
    if element.keyword in ("BurnedInAnnotation", "SpecimenLabelInImage"):
        return {BURNED_IN} if element.value == "YES" else set()
    by_type = {"PN": PERSON, "DA": DATE, "DT": DATE, "TM": TIME, "UI": UNIQUE_ID}
    kinds = _word_kinds(element.keyword) - {DATE, TIME}
    kinds |= {by_type[element.VR]} if element.VR in by_type else set()
    return kinds
