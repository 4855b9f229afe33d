"""Slides and ready tiles become a tile store. Nothing that names a patient comes along."""

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
