"""Which library reads a file. The content decides, never the name."""

from pathlib import Path

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers.dicom_files import WsiDicomFile, is_dicom
from crafts_client.ingest.readers.image_files import ImageFile
from crafts_client.ingest.readers.openslide_files import OpenSlideFile
from crafts_client.ingest.readers.seam import Reader
from crafts_client.ingest.readers.tiff_files import TiffSlideFile
from crafts_client.ingest.readers.tiff_header import (
    check_tiff_header,
    is_beyond_classic,
    is_tiff,
)


def open_reader(path: Path) -> Reader:
    """Open a slide or image with the first library that knows it.

    Raises:
        SlideError: none does, or the header is damaged.
    """
    if path.is_dir() or is_dicom(path):
        return WsiDicomFile(path)
    if is_tiff(path) and not is_beyond_classic(path):
        check_tiff_header(path)
    if OpenSlideFile.reads(path):
        try:
            return OpenSlideFile(path)
        except SlideError:  # it may know the container, but not how the pixels are packed
            if not _tiffslide_reads(path):
                raise
    return TiffSlideFile(path) if _tiffslide_reads(path) else ImageFile(path)


def _tiffslide_reads(path: Path) -> bool:
    return is_tiff(path) and TiffSlideFile.reads(path)
