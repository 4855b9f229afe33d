"""What the pages of a TIFF file mean: which one is the picture, and what its numbers stand for.

Libraries answer these questions each in its own way, and most without a word: the first page is
the slide, the first sample red, the fourth alpha, sixteen bits their upper eight, and a tag that
turns the picture is passed over, or turns each tile by itself. What all of them read in one way is
let through here; everything else is refused, with the command that mends the file.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers import jpeg_stream
from crafts_client.ingest.readers.tiff_header import TiffPage

_HEAD_BYTES, _HEAD_CHARACTERS = 2**16, 200
_JPEG = 7
_GREYS, _RGB, _YCBCR = (0, 1), 2, 6
_REDUCED, _MASK, _MACRO = 1, 4, 9
"""Of the subfile type: two bits, and the number that Aperio gives its macro image."""
_ASSOCIATED, _UNASSOCIATED = 1, 2
_NO_SLIDES = re.compile(
    r"[\W_]*(?:[^\W_]+[\W_]+){0,3}?(label|macro|thumbnail|overview|localizer|barcode)(?![^\W_]|-free)",
    re.IGNORECASE,
)
"""Among the first words of a description or page name."""
_APERIO = re.compile(r"Aperio[^\n]*\n(?P<about>.*)", re.DOTALL)
_FIRST_IMAGE = re.compile(r"<(?:\w+:)?Image\b[^>]*>")
_NAME = re.compile(r"\bName=\"([^\"]{0,200})\"")
_AKOYA = re.compile(r"<ImageType>(\w{1,40})<")
_MOST_ASPECT = 0.05


def check_picture(pages: Sequence[TiffPage]) -> None:
    """Make sure that the first page is the picture, as every reader here takes it to be.

    Raises:
        SlideError: it is a label, macro image or thumbnail, another page is larger or may as well
            be the picture, or the picture is spread over several pages.
    """
    first, *others = pages
    rivals = [page for page in others if not (_named(page) or page.subfile & (_REDUCED | _MASK))]
    if what := _named(first) or ("a reduced copy" if first.subfile & _REDUCED else ""):
        raise SlideError(f"its first page is {what}, not the slide{_how_to_take(pages, rivals)}")
    if any(_size(page) == _size(first) for page in rivals):
        number = 1 + sum(_size(page) == _size(first) for page in rivals)
        raise SlideError(
            f"its colours, channels or focal planes are {number} separate pages of one size; write "
            "one page of 8-bit RGB, for example with QuPath's export of the rendered RGB"
        )
    if any(page.num_px > first.num_px for page in rivals):
        raise SlideError(f"its first page is not the largest{_how_to_take(pages, rivals)}")
    is_alike = [first.is_tiled == page.is_tiled for page in rivals]
    if not first.is_tiled and not all(is_alike):
        raise SlideError(f"its first page is in strips and another in tiles, as a slide is"
                         f"{_how_to_take(pages, rivals)}")  # fmt: skip
    if any(
        alike and not _has_shape_of(first, page)
        for alike, page in zip(is_alike, rivals, strict=True)
    ):
        raise SlideError(
            "which of its pages is the picture cannot be told; write that page alone to a file: "
            "tiffcp FILE,0 NEW"
        )


def check_slide_pixels(path: Path, pages: Sequence[TiffPage]) -> None:
    """Make sure that the slide's pages are 8-bit colour that all readers take for the same.

    Raises:
        SlideError: what a page says of its pixels is not read here, or its data say otherwise.
    """
    for page in pages:
        if page is pages[0] or (page.is_tiled and not _named(page)):
            _check_pixels(page)
            check_stored_colour(path, page)


def is_slide(pages: Sequence[TiffPage]) -> bool:
    """Whether a TIFF is laid out as a slide rather than as a plain image: tiles, or levels."""
    return (
        pages[0].is_tiled
        or pages[0].has_sub_directories
        or any(page.subfile & _REDUCED for page in pages[1:])
    )


def check_stored_colour(path: Path, page: TiffPage) -> None:
    """Compare what the tags say of colour with the marks in the first piece of JPEG.

    Raises:
        SlideError: they contradict each other.
    """
    if page.compression != _JPEG or page.first_piece is None or page.samples != 3:
        return
    if page.is_planar:  # each sample is a grey stream of its own
        return
    offset, num_bytes = page.first_piece
    with path.open("rb") as file:
        file.seek(offset)
        stored = jpeg_stream.stored_colour(file.read(min(num_bytes, _HEAD_BYTES)))
    said = {_RGB: "RGB", _YCBCR: "YCbCr"}.get(page.photometric or 0)
    if stored is not None and said is not None and stored != said:
        raise SlideError(
            f"its tags say {said}, its JPEG data {stored}: the colours would be wrong; correct the "
            f"tag: tiffset -s 262 {_YCBCR if stored == 'YCbCr' else _RGB} FILE"
        )


def check_bits(page: TiffPage) -> None:
    """Make sure that a page has whole numbers of at most 8 bits: of others libraries take a part.

    Raises:
        SlideError: it has not.
    """
    if max(page.bits) > 8:
        raise SlideError(
            f"{max(page.bits)} bits a sample; expected 8 bits of red, green and blue: write them "
            "so, from the range that the camera filled"
        )
    if any(kind != 1 for kind in page.sample_formats):
        raise SlideError("signed samples; expected 8 bits, without a sign, of red, green and blue")


def _check_pixels(page: TiffPage) -> None:
    check_bits(page)
    if page.photometric in _GREYS and page.samples == 1:
        raise SlideError("a grey picture; expected 8 bits of red, green and blue")
    if page.photometric not in (_RGB, _YCBCR):
        raise SlideError(
            f"its tags say that its {page.samples} samples are not RGB (photometric "
            f"interpretation {page.photometric}); write 8 bits of red, green and blue, or, where "
            "they are that, correct the tag: tiffset -s 262 2 FILE"
        )
    if page.samples - len(page.extra_samples) != 3 and page.samples != 3:
        raise SlideError(_too_many(page))
    if page.samples != 3 and (
        page.extra_samples not in ((_ASSOCIATED,), (_UNASSOCIATED,)) or page.compression == _JPEG
    ):
        raise SlideError(_too_many(page))
    if 2 <= page.orientation <= 8:
        raise SlideError(
            f"its Orientation tag says that it is turned or mirrored ({page.orientation}), which "
            "readers do each in another way; write it upright: vips autorot FILE NEW.tif[tile]"
        )


def _too_many(page: TiffPage) -> str:
    return (
        f"{page.samples} samples a pixel, of which the last are no alpha of RGB; write three: "
        "vips extract_band FILE NEW.tif[tile] 0 --n 3"
    )


def _named(page: TiffPage) -> str:
    """What a page is that names itself as something beside the slide; else empty."""
    text = page.description.lstrip()
    if aperio := _APERIO.match(text):
        text = aperio["about"]
        if "->" in text.partition("|")[0]:
            return "a thumbnail"
    elif text.startswith("<"):
        image = _FIRST_IMAGE.search(text)
        found = _NAME.search(image.group()) if image else _AKOYA.search(text)
        text = found[1] if found else ""
    for words in (text, page.page_name):
        if found := _NO_SLIDES.match(words[:_HEAD_CHARACTERS]):
            return f"a {found[1].lower()}"
    return "a macro image" if page.subfile == _MACRO else ""


def _how_to_take(pages: Sequence[TiffPage], rivals: Sequence[TiffPage]) -> str:
    """Which page is the slide, if one can be."""
    if not rivals:
        return ""
    largest = max(rivals, key=lambda page: (page.is_tiled, page.num_px))
    number = next(n for n, page in enumerate(pages) if page is largest)
    return f"; if page {number + 1} is the slide, write it alone: tiffcp FILE,{number} NEW"


def _size(page: TiffPage) -> tuple[int, int]:
    return page.width, page.length


def _has_shape_of(first: TiffPage, page: TiffPage) -> bool:
    """Whether a page may be the first one at another scale."""
    width = first.width * page.length / first.length
    return abs(width - page.width) <= max(2.0, _MOST_ASPECT * page.width)
