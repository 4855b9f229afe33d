"""What a person asks to be drawn: captions on the command line, a text file, or a table.

A table has one kind of image a row. It is CSV or TSV with a header, or JSON lines, with any of the
columns ``COLUMNS``; everything that is wrong with it is told at once, before anything is drawn.
"""

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crafts_core.attribute_words import ATTRIBUTE_COLUMNS, read_attributes
from crafts_core.errors import CraftsError
from crafts_core.plan_sections import MODALITIES, Modality
from crafts_core.table_lines import table_reader, whole_lines
from crafts_core.vocabulary import PartialAttributes, VocabularyError, label_caption

COLUMNS = (
    "caption", "type", *ATTRIBUTE_COLUMNS, "negative", "count", "seed", "control", "mask"
)  # fmt: skip
MAX_IMAGES = 1_000_000
"""Of one run: more are drawn in several, each into a folder of its own."""
MAX_SEED = 2**63 - 1
_MAX_TOLD, _MOST_SHOWN = 5, 40


class RequestError(CraftsError):
    """What was asked for cannot be drawn; the message says which row and why."""


class _RowError(Exception):
    """A row that cannot even be split into cells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One kind of image."""

    prompt: str
    negative_prompt: str = ""
    count: int = 1
    seed: int | None = None
    """Of its own; otherwise the run's, with the images of all requests numbered through."""
    control: Modality | None = None
    mask: Path | None = None


def read_requests(path: Path, *, count: int) -> list[ImageRequest]:
    """The rows of a table, or the lines of a text file as captions.

    Args:
        path: ``.csv``, ``.tsv``, ``.jsonl`` or ``.txt``. Masks are relative to its folder.
        count: Images of a row that does not say how many.

    Raises:
        RequestError: names all rows that are wrong, or the first few of many.
    """
    problems: list[str] = []
    requests = []
    for place, cells in _rows(path):
        told: list[str] = []
        request = _request(cells, path.parent, count, told)
        problems += [f"row {place}: {problem}" for problem in told]
        if request is not None:
            requests.append(request)
    if problems:
        more = f" (and {len(problems) - _MAX_TOLD} more)" if len(problems) > _MAX_TOLD else ""
        raise RequestError(f"{path}: {'; '.join(problems[:_MAX_TOLD])}{more}")
    if not requests:
        raise RequestError(f"{path} asks for no image; give one row (or line) a kind of image")
    return requests


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    readers: dict[str, Callable[[str], Iterator[tuple[int, Mapping[str, str]]]]] = {
        ".txt": _text_lines,
        ".csv": lambda text: _table_rows(text, ","),
        ".tsv": lambda text: _table_rows(text, "\t"),
        ".jsonl": _json_lines,
    }
    read = readers.get(path.suffix.lower())
    if read is None:
        raise RequestError(f"{path}: expected a file that ends in {', '.join(readers)}")
    try:
        yield from read(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{path} is no UTF-8 text or no table: {error}") from error
    except _RowError as error:
        raise RequestError(f"{path}: {error}") from error


def _text_lines(text: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    for place, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield place, {"caption": line.strip()}


def _table_rows(text: str, delimiter: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    reader = table_reader(text, delimiter)
    names = [name.strip() for name in reader.fieldnames or ()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise _RowError(f"column {twice[0]!r} is there twice")
    for place, cells in whole_lines(reader):
        yield place, {key.strip(): value.strip() for key, value in cells.items()}


def _json_lines(text: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    for place, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _RowError(f"row {place} is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise _RowError(f"row {place} is no JSON object")
        if wrong := [key for key, value in values.items() if not _is_cell(value)]:
            raise _RowError(f"row {place}: {wrong[0]!r} is neither text nor a number nor a list")
        yield place, {key: _cell(value) for key, value in values.items() if value is not None}


def _is_cell(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))
    )


def _cell(value: Any) -> str:
    return ";".join(value) if isinstance(value, list) else str(value).strip()


def _request(
    cells: Mapping[str, str], folder: Path, count: int, problems: list[str]
) -> ImageRequest | None:
    unknown = [key for key in cells if key not in COLUMNS]
    if unknown:
        problems.append(f"unknown column {unknown[0]!r}; known: {', '.join(COLUMNS)}")
    control, mask = _steering(cells, folder, problems)
    request = ImageRequest(
        prompt=_prompt(cells, problems),
        negative_prompt=cells.get("negative", ""),
        count=_whole_number(cells, "count", 1, MAX_IMAGES, problems, otherwise=count),
        seed=_whole_number(cells, "seed", 0, MAX_SEED, problems) if cells.get("seed") else None,
        control=control,
        mask=mask,
    )
    return None if problems else request


def _prompt(cells: Mapping[str, str], problems: list[str]) -> str:
    """The row's own words, or what its type and attributes stand for."""
    attributes = read_attributes(cells, problems)
    caption, label = cells.get("caption", ""), cells.get("type", "")
    if caption:
        if label or attributes != PartialAttributes():
            problems.append("give a caption, or a type with attributes, not both")
        return caption
    if not label:
        problems.append("neither a caption nor a type")
        return ""
    try:
        return label_caption(label, attributes)
    except VocabularyError as error:
        problems.append(str(error))
        return ""


def _steering(
    cells: Mapping[str, str], folder: Path, problems: list[str]
) -> tuple[Modality | None, Path | None]:
    control, mask = cells.get("control", ""), cells.get("mask", "")
    if bool(control) != bool(mask):
        problems.append("control and mask belong together")
    if not (control and mask):
        return None, None
    modality = next((each for each in MODALITIES if each == control), None)
    if modality is None:
        problems.append(f"control must be {' or '.join(MODALITIES)}, got {control!r}")
    path = folder / mask
    if not os.path.isfile(path):  # noqa: PTH113  # also False of a name that is too long for one
        problems.append(f"there is no mask {path}")
    return modality, path


def _whole_number(
    cells: Mapping[str, str],
    column: str,
    least: int,
    most: int,
    problems: list[str],
    *,
    otherwise: int = 0,
) -> int:
    written = cells.get(column, "")
    if not written:
        return otherwise
    is_number = written.isascii() and written.isdigit() and len(written) <= _MOST_SHOWN
    if not is_number or not least <= int(written) <= most:
        told = written[:_MOST_SHOWN]
        problems.append(f"{column} must be a whole number from {least} to {most}, got {told!r}")
        return otherwise
    return int(written)


def num_images(requests: Sequence[ImageRequest]) -> int:
    """How many images they ask for together.

    Raises:
        RequestError: more than one run draws.
    """
    return checked_number(sum(request.count for request in requests))


def checked_number(count: int) -> int:
    """A number of images that one run draws.

    Raises:
        RequestError: it is more.
    """
    if count > MAX_IMAGES:
        raise RequestError(
            f"{count:,} images are more than one run draws ({MAX_IMAGES:,}); draw them in several, "
            "each with a seed and a folder of its own"
        )
    return count
