"""Which library reads a file. The content decides, never the name."""

from pathlib import Path

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers.dicom_files import WsiDicomFile
from crafts_client.ingest.readers.dicom_instances import is_dicom
from crafts_client.ingest.readers.image_files import ImageFile
from crafts_client.ingest.readers.openslide_files import PLAIN_TIFF_VENDORS, OpenSlideFile
from crafts_client.ingest.readers.seam import Reader
from crafts_client.ingest.readers.tiff_files import TiffSlideFile
from crafts_client.ingest.readers.tiff_header import (
    is_beyond_classic,
    is_tiff,
    read_tiff_header,
)
from crafts_client.ingest.readers.tiff_meaning import (
    check_picture,
    check_slide_pixels,
    is_slide,
)


def open_reader(path: Path) -> Reader:
    """Open a slide or image with the first library that knows it.

    Raises:
        SlideError: none does, the header is damaged, or what it says of its pixels is not read.
    """
    if path.is_dir() or is_dicom(path):
        return WsiDicomFile(path)
    if is_tiff(path):
        return _open_tiff(path)
    try:
        return OpenSlideFile(path) if OpenSlideFile.vendor(path) is not None else ImageFile(path)
    except SlideError:
        if not path.is_symlink():
            raise
        # The link alone may have been staged, and what belongs to the slide lies at its target.
        return open_reader(path.resolve())


def _open_tiff(path: Path) -> Reader:
    pages = () if is_beyond_classic(path) else read_tiff_header(path)
    vendor = OpenSlideFile.vendor(path)
    if pages and (vendor is None or vendor in PLAIN_TIFF_VENDORS):
        check_picture(pages)
        if is_slide(pages):
            check_slide_pixels(path, pages)
    if vendor is not None:
        try:
            return OpenSlideFile(path, pages)
        except SlideError:  # it may know the container, but not how the pixels are packed
            if not TiffSlideFile.reads(path):
                raise
    return TiffSlideFile(path, pages) if TiffSlideFile.reads(path) else ImageFile(path, pages)
