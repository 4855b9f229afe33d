"""The site's table: which file belongs to which patient, and what it shows.

CSV or TSV with a header line. Everything that is wrong with it is found at once, so that it can be
told together with what is wrong with the slides, before any pixel is read.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crafts_client.ingest.errors import IngestError, Problem
from crafts_client.ingest.known_names import identifying_names
from crafts_client.ingest.listed_names import NOBODY, ListedNames
from crafts_client.ingest.named_files import NamedFiles, composed, target
from crafts_client.ingest.patient_names import is_missing, lost_in_a_spreadsheet, participant
from crafts_client.ingest.row_captions import read_caption
from crafts_client.ingest.scrub import Scrubbed
from crafts_client.ingest.slides import MAX_MPP, MIN_MPP
from crafts_client.ingest.table_checks import problems_between
from crafts_core.plan_sections import MODALITIES, Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class TableColumns:
    """Column names. Where several are listed, the first that the table has is used."""

    file: tuple[str, ...] = ("file",)
    patient: tuple[str, ...] = ("patient", "source_tile_group")
    case: tuple[str, ...] = ("case",)
    label: tuple[str, ...] = ("label", "cancer_type", "class")
    caption: tuple[str, ...] = ("caption",)
    mpp: tuple[str, ...] = ("mpp",)
    growth_pattern: tuple[str, ...] = ("growth_pattern",)
    nuclear_grade: tuple[str, ...] = ("nuclear_grade",)
    stroma: tuple[str, ...] = ("stroma",)
    features: tuple[str, ...] = ("features",)
    report: tuple[str, ...] = ("report", "report_text")
    cohort: tuple[str, ...] = ("cohort",)
    nuclei: tuple[str, ...] = ("nuclei",)
    fluorescence: tuple[str, ...] = ("fluorescence",)
    names: tuple[str, ...] = ("names",)
    """People that the row's texts may name: taken out of them, and not kept."""


_SHOWN_COLUMNS, _SHOWN_LETTERS = 20, 40
_UNSEEN = "\ufeff\u200b"
_MAY_SAY_MISSING = ("patient", "case", "label", "caption", "report", "cohort", "names", *MODALITIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One slide or ready tile. Names its patient: never leaves the site."""

    line: int
    name: str
    """The file as the table has it, in one Unicode form: what its id is made from."""
    path: Path
    """A file, or the folder of a DICOM series; a link as it is."""
    patient: str
    """As the table has it; of a barcode, the participant whose sample it is."""
    case: str
    label: str
    """A word of the vocabulary, or scrubbed free text."""
    caption: str
    """Scrubbed, or composed from the vocabulary."""
    mpp: float | None
    """Overrides what the file says about its scale, in microns per level-0 pixel."""
    scrubbed: Scrubbed | None = None
    """What scrubbing did to the caption; None for a composed one."""
    scrubbed_label: Scrubbed | None = None
    unread: str = ""
    """The end of the caption that the foundation's text tower does not read."""
    notes: tuple[str, ...] = ()
    """What the operator should know of the row although it is not wrong."""
    conditions: Mapping[Modality, Path] = field(default_factory=dict)
    """Images that lie over a ready tile."""

    @property
    def target(self) -> Path:
        """What the path leads to."""
        return target(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReading:
    """A table as far as it can be read."""

    rows: tuple[TableRow, ...]
    """Those whose file is there; captions come scrubbed."""
    problems: tuple[Problem, ...]
    """Everything that is wrong with the table: while there is one, nothing may be cut."""


def read_table(
    path: Path,
    *,
    root: Path | None = None,
    columns: TableColumns | None = None,
    cohort: str | None = None,
) -> tuple[TableRow, ...]:
    """The rows of a table that has nothing wrong with it; see ``examine_table``.

    Raises:
        IngestError: with one line for everything that is wrong.
    """
    reading = examine_table(path, root=root, columns=columns, cohort=cohort)
    if reading.problems:
        raise IngestError.at_lines(reading.problems)
    return reading.rows


def examine_table(
    path: Path,
    *,
    root: Path | None = None,
    columns: TableColumns | None = None,
    cohort: str | None = None,
    listed: ListedNames = NOBODY,
) -> TableReading:
    """Read a table and find everything that is wrong with it.

    Args:
        path: ``.csv`` (comma, semicolon or tab) or ``.tsv``.
        root: What relative file names are relative to; the table's own folder if absent.
        columns: Column names, where they differ from the known ones.
        cohort: The site's own; a row that names another is wrong. None: a table may name any one.
        listed: Names to be taken out of all its texts.

    Raises:
        IngestError: it cannot be read as a table of files at all.
    """
    header, lines = _read_lines(path)
    found, problems = _find_columns(header, columns or TableColumns())
    if not lines:
        problems.append((1, "a header, but no row follows"))
    if "file" not in found:  # what its rows are about cannot be known
        raise IngestError.at_lines(problems)
    files = NamedFiles(path.parent if root is None else root)
    rows: list[TableRow] = []
    is_there: set[int] = set()
    cohorts: dict[int, str] = {}
    for number, cells in lines:
        if len(cells) != len(header):
            problems.append((number, f"expected {len(header)} cells, got {len(cells)}"))
            continue
        values = {key: _filled(key, cells[place]) for key, place in found.items()}
        file, missing = files.find(values["file"])
        over, unfit = _find_conditions(values, files)
        row, wrong = _read_row(number, values, file, over, listed)
        problems += [(number, problem) for problem in (*filter(None, [missing]), *unfit, *wrong)]
        rows.append(row)
        if missing is None:
            is_there.add(number)
        cohorts[number] = values.get("cohort", "")
    problems += problems_between(rows, cohorts, cohort=cohort)
    problems += _shared_conditions(rows)
    return TableReading(
        rows=tuple(row for row in rows if row.line in is_there), problems=tuple(problems)
    )


def write_template(path: Path, slides: Sequence[Path]) -> None:
    """A table with a line for each slide, for a person to fill in whose it is and what it shows.

    Args:
        path: A new ``.csv`` or ``.tsv``; files below its folder are named relative to it.
        slides: Files, as ``find_slides`` gives them.

    Raises:
        IngestError: there is no slide, the table exists, or it cannot be written.
    """
    if not slides:
        raise IngestError("no slide was found there; is it the right folder?")
    base = path.parent.absolute()
    names = [slide.absolute() for slide in slides]
    lines = [name.relative_to(base) if name.is_relative_to(base) else name for name in names]
    odd = [line for line in lines if not _is_text(line)]
    if odd:
        raise IngestError(f"rename {len(odd)} files whose names are not UTF-8, such as {odd[0]!r}")
    columns = TableColumns()
    keys = [key for key in TableColumns.__dataclass_fields__ if key not in MODALITIES]
    header = [getattr(columns, key)[0] for key in keys]
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=_delimiter(path, ","))
            writer.writerow(header)
            writer.writerows([line, *[""] * (len(header) - 1)] for line in lines)
    except FileExistsError as error:
        raise IngestError(f"{path} exists; choose another name or remove it first") from error
    except OSError as error:
        raise IngestError(f"cannot write {path}: {error.strerror}") from error


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header cells, and each later line that is not empty with its line number."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=_delimiter(path, first), strict=True)
            table = [(reader.line_num, cells) for cells in reader if any(cells)]
    except UnicodeDecodeError as error:
        raise IngestError(_how_to_encode(path)) from error
    except (OSError, csv.Error) as error:
        raise IngestError(f"cannot read table {path}: {error}") from error
    if not table:
        raise IngestError(f"{path} is empty; its first line must name the columns")
    # A program that adds a mark of UTF-8 to a file that has one makes it a part of the name.
    header = [cell.strip().strip(_UNSEEN) for cell in table[0][1]]
    return header, table[1:]


def _how_to_encode(path: Path) -> str:
    """Guessing would turn one name into another: whoever has the table says it."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        place, encoding = "it begins as UTF-16 does", "UTF-16"
    else:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            place, encoding = f"byte {data[error.start]:#04x} on line {line}", "WINDOWS-1252"
    return (
        f"cannot read table {path}: it is not UTF-8 ({place}); save it from the spreadsheet as "
        f'"CSV UTF-8", or run: iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}'
    )


def _delimiter(path: Path, header: str) -> str:
    """The separator that the header line uses most; tab for ``.tsv``."""
    if path.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    return max((",", ";", "\t"), key=header.count)


def _find_columns(
    header: Sequence[str], columns: TableColumns
) -> tuple[dict[str, int], list[Problem]]:
    """The place of each column that is there, and what is wrong with the header."""
    found: dict[str, int] = {}
    problems = _odd_names(header, columns)
    for key in TableColumns.__dataclass_fields__:
        names: tuple[str, ...] = getattr(columns, key)
        present = [name for name in names if name in header]
        if present:
            found[key] = header.index(present[0])
    problems += [
        f"no column {' or '.join(getattr(columns, key))} ({purpose}); it has: {_few(header)}"
        for key, purpose in (
            ("file", "the slide or tile"),
            ("patient", "whose tissue it is: privacy is promised to patients"),
        )
        if key not in found
    ]
    if not found.keys() & {"caption", "label", "report"}:
        wanted = " or ".join((*columns.caption, *columns.label))
        problems.append(f"no column {wanted} (what is shown; a report will do)")
    return found, [(1, problem) for problem in problems]


def _few(header: Sequence[str]) -> str:
    """Enough to know it by: what is no table may be one line of a megabyte."""
    more = ", ..." if len(header) > _SHOWN_COLUMNS else ""
    return ", ".join(name[:_SHOWN_LETTERS] for name in header[:_SHOWN_COLUMNS]) + more


def _odd_names(header: Sequence[str], columns: TableColumns) -> list[str]:
    """Columns that would be passed over without a word although their names are known here."""
    known = [name for key in TableColumns.__dataclass_fields__ for name in getattr(columns, key)]
    by_small_letters = {name.casefold(): name for name in known}
    problems = [
        f"column {name} is there {number} times; keep one, or give the others other names"
        for name, number in Counter(header).items()
        if number > 1 and name in known
    ]
    problems += [
        f"column {name} is not read; write it {by_small_letters[name.casefold()]}"
        for name in dict.fromkeys(header)
        if name not in known and name.casefold() in by_small_letters
    ]
    return problems


def _filled(key: str, cell: str) -> str:
    """What a cell says. In a closed list of words ``none`` may mean something, and is told."""
    return "" if key in _MAY_SAY_MISSING and is_missing(cell) else cell.strip()


def _read_row(
    number: int,
    values: Mapping[str, str],
    path: Path,
    over: Mapping[Modality, Path],
    listed: ListedNames,
) -> tuple[TableRow, list[str]]:
    """The row as far as it can be read, and what is wrong with it beside its files."""
    name, patient, case = (values.get(key, "") for key in ("file", "patient", "case"))
    problems = [] if patient or "patient" not in values else ["no patient"]
    lost = {what: lost_in_a_spreadsheet(values.get(what, "")) for what in ("patient", "case")}
    problems += [
        f"{what} {values[what]} {why}; format the column as text, enter it again, and export"
        for what, why in lost.items()
        if why is not None
    ]
    known = identifying_names(patient=patient, case=case, file=name, names=values.get("names", ""))
    shown = read_caption(values, known, listed)
    problems += shown.problems
    mpp, problem = _mpp(values.get("mpp", ""))
    problems += [problem] if problem else []
    row = TableRow(
        line=number,
        name=composed(name),
        path=path,
        patient=participant(patient),
        case=case,
        label=shown.label,
        caption=shown.caption,
        mpp=mpp,
        scrubbed=shown.scrubbed,
        scrubbed_label=shown.scrubbed_label,
        notes=tuple(shown.notes),
        conditions=over,
    )
    return row, problems


def _find_conditions(
    values: Mapping[str, str], files: NamedFiles
) -> tuple[dict[Modality, Path], list[str]]:
    """The images that lie over a tile and can be read, and what is wrong with the others."""
    named = {modality: values[modality] for modality in MODALITIES if values.get(modality)}
    found = {modality: _find_condition(modality, text, files) for modality, text in named.items()}
    paths = {modality: path for modality, (path, problem) in found.items() if problem is None}
    return paths, [problem for _, problem in found.values() if problem]


def _find_condition(modality: Modality, name: str, files: NamedFiles) -> tuple[Path, str | None]:
    """Where the image over a tile is, and what is wrong with it."""
    path, problem = files.find(name)
    if problem is not None:
        return path, f"{modality} {problem}"
    path = target(path)
    if not path.is_relative_to(target(files.base)):
        return path, f"{modality} file {name} leaves {files.base}; copy it there, or set --root"
    if not path.is_file():
        return path, f"{modality} file {name} is a folder, not an image"
    return path, None


def _shared_conditions(rows: Sequence[TableRow]) -> Iterator[tuple[int, str]]:
    """One image over two tiles is a mistake, and would mix their patients; so is a tile itself."""
    first: dict[Path, int] = {}
    tiles = {row.target: row.line for row in rows if row.name}
    for row in rows:
        for modality, path in row.conditions.items():
            if path in tiles:
                yield row.line, f"{modality} file {path.name} is the tile of line {tiles[path]}"
            line = first.setdefault(path, row.line)
            if line != row.line:
                yield row.line, f"{modality} file {path.name} is also that of line {line}"


def _mpp(text: str) -> tuple[float | None, str | None]:
    if not text:
        return None, None
    try:
        mpp = float(text)
    except ValueError:
        return None, f"mpp {text!r} is not a number"
    if not (math.isfinite(mpp) and mpp > 0):
        return None, f"mpp must be above zero, got {text}"
    if not MIN_MPP <= mpp <= MAX_MPP:
        return None, (
            f"mpp {text} cannot be right: microns per pixel, from {MIN_MPP:g} to {MAX_MPP:g}"
        )
    return mpp, None
