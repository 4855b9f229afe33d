"""Slides and ready tiles become a tile store. Nothing that names a patient comes along."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crafts_client.ingest.deidentify import Salt
    from crafts_client.ingest.errors import IngestError
    from crafts_client.ingest.folder_search import FoundSlides, find_slides
    from crafts_client.ingest.ingest import ingest_slides, ingest_tiles
    from crafts_client.ingest.report import IngestReport, SourceOutcome
    from crafts_client.ingest.store_update import content_key, remove_patient, remove_slides
    from crafts_client.ingest.table import (
        TableColumns,
        TableReading,
        TableRow,
        examine_table,
        read_table,
        write_template,
    )
    from crafts_client.ingest.tiling import TilingOptions

_OF_TABLES = ("examine_table", "read_table", "write_template")
_MODULES = {
    "deidentify": ("Salt",),
    "errors": ("IngestError",),
    "folder_search": ("FoundSlides", "find_slides"),
    "ingest": ("ingest_slides", "ingest_tiles"),
    "report": ("IngestReport", "SourceOutcome"),
    "store_update": ("content_key", "remove_patient", "remove_slides"),
    "table": ("TableColumns", "TableReading", "TableRow", *_OF_TABLES),
    "tiling": ("TilingOptions",),
}
"""What comes from where: imported when it is asked for, as readers of slides take a second."""

__all__ = [
    "FoundSlides",
    "IngestError",
    "IngestReport",
    "Salt",
    "SourceOutcome",
    "TableColumns",
    "TableReading",
    "TableRow",
    "TilingOptions",
    "content_key",
    "examine_table",
    "find_slides",
    "ingest_slides",
    "ingest_tiles",
    "read_table",
    "remove_patient",
    "remove_slides",
    "write_template",
]


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(name)
