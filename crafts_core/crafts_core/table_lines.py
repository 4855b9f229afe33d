"""Lines of CSV and TSV tables, whole or refused.

A comma too many moves a line's cells on, so that words of a caption become its patient; a quote
that never ends takes the lines after it into one cell. Neither is an error to Python's reader.
"""

import csv
import io
from collections.abc import Iterator


def table_reader(text: str, delimiter: str) -> "csv.DictReader[str]":
    """A table whose first line names its columns."""
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def whole_lines(reader: "csv.DictReader[str]") -> Iterator[tuple[int, dict[str, str]]]:
    """Each line with its number.

    Raises:
        csv.Error: the first line that is none, with its number.
    """
    try:
        for cells in reader:
            if None in cells or None in cells.values():
                raise csv.Error("other columns than the header")
            yield reader.line_num, cells
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from error
