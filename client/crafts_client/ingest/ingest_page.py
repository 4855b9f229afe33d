"""What ingest did, as a page that a study coordinator reads. It names patients: owner only."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from crafts_client.ingest import ingest_charts
from crafts_client.ingest.caption_notes import CaptionNote
from crafts_client.ingest.errors import grouped
from crafts_client.ingest.pictures import OVERLAY_COLOURS, picture_paths
from crafts_client.ingest.report import IngestReport, SourceOutcome, Stain
from crafts_client.ingest.stain_outliers import far_stains, scanner_of
from crafts_core.durable import write_file
from crafts_core.pages import page_environment

PAGE_NAME = "ingest.html"
PICTURES = "pictures"
REASONS = {
    "background": ("too little tissue", "var(--glass)"),
    "pen": ("marker ink", "var(--c4)"),
    "fold": ("folded tissue", "var(--c2)"),
    "blurred": ("out of focus", "var(--c0)"),
    "unreadable": ("cannot be decoded", "var(--stop)"),
    "not_drawn": ("good, but beyond the tiles wanted per slide", "var(--spare)"),
}
"""Why a place gave no tile, in words, and its colour. Other reasons are shown as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _SlideRow:
    """One slide as the page shows it."""

    source: SourceOutcome
    bar: Markup
    parts: tuple[tuple[str, int, str], ...]
    """Words, number and colour of what became of its places."""
    thumbnail: str | None
    overlay: str | None
    has_far_stain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScannerRow:
    name: str
    colour: str
    num_slides: int
    num_tiles: int
    mpp: str
    hematoxylin: float | None
    eosin: float | None
    profiles: tuple[Markup, ...]
    has_far_stain: bool


def write_ingest_page(report: IngestReport, folder: Path) -> Path:
    """Write ``ingest.html`` into a folder, readable by its owner only; gives its path.

    The page needs nothing but itself and the pictures in ``pictures/`` beside it; a slide whose
    pictures are not there is shown without.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    template = page_environment("crafts_client").get_template("ingest.html.j2")
    path = folder / PAGE_NAME
    write_file(path, template.render(_content(report, folder / PICTURES)), mode=0o600)
    return path


def _content(report: IngestReport, pictures: Path) -> dict[str, object]:
    used = [source for source in report.sources if source.skipped is None]
    series = _series(used)
    far_slides, far_scanners = far_stains(used)
    is_slides = report.kind == "slides"
    refused = report.runs[0] if report.runs and report.runs[0].num_problems else None
    return {
        "report": report,
        "used": used,
        "unit": "slide" if is_slides else "image",
        "skipped_reasons": Counter(str(s.skipped) for s in report.skipped).most_common(),
        "num_patients": sum(1 for tiles in report.tiles_per_patient.values() if tiles),
        "copied": sum(source.copied for source in used),
        "refused": refused,
        "to_mend": grouped(refused.problems) if refused else [],
        "rejected": _parts(report.rejected),
        "rejected_bar": ingest_charts.segments(_parts(report.rejected)),
        "conditions": _total(Counter(source.conditions) for source in used),
        "identifiers": _total(Counter(source.identifiers) for source in report.sources),
        "slides": _slide_rows(report.sources, pictures, far_slides) if is_slides else [],
        "patients": _patients(report),
        "patient_chart": ingest_charts.histogram(
            tuple(report.tiles_per_patient.values()), unit="tiles", of="patients"
        ),
        "scanners": [
            _scanner_row(name, number, used, name in far_scanners)
            for name, number in series.items()
        ],
        "stain_chart": _stain_chart(used, series),
        "far_slides": far_slides,
        "far_scanners": far_scanners,
        "scrubbed": _total(Counter(note.found) for note in report.captions),
        "captions": [(note, _marked(note)) for note in report.captions if _is_worth_a_look(note)],
        "overlay_colours": {
            name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in OVERLAY_COLOURS.items()
        },
    }


def _total(counters: Iterable[Counter[str]]) -> list[tuple[str, int]]:
    """All counts together, most frequent first."""
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total.most_common()


def _slide_rows(
    sources: Sequence[SourceOutcome], pictures: Path, far: Sequence[SourceOutcome]
) -> list[_SlideRow]:
    """Slides that were used, and skipped ones of which there is something to see."""
    places = {source.place for source in far}
    rows = [_slide_row(source, pictures, source.place in places) for source in sources]
    return [row for row in rows if row.source.skipped is None or row.overlay is not None]


def _slide_row(source: SourceOutcome, pictures: Path, has_far_stain: bool) -> _SlideRow:
    parts = (("kept", source.num_tiles, "var(--kept)"), *_parts(source.rejected))
    found: list[str | None] = [None, None]
    if source.picture is not None:
        paths = picture_paths(pictures, source.picture)
        found = [f"{PICTURES}/{path.name}" if path.is_file() else None for path in paths]
    return _SlideRow(
        source=source,
        bar=ingest_charts.segments(parts),
        parts=parts,
        thumbnail=found[0],
        overlay=found[1],
        has_far_stain=has_far_stain,
    )


def _parts(rejected: dict[str, int]) -> tuple[tuple[str, int, str], ...]:
    """Words, number and colour of each reason, most frequent first."""
    ordered = sorted(rejected.items(), key=lambda item: -item[1])
    return tuple(
        (words, number, colour)
        for reason, number in ordered
        for words, colour in [REASONS.get(reason, (reason, "var(--other)"))]
    )


def _patients(report: IngestReport) -> list[tuple[str, int, int]]:
    """Patient, sources used and tiles; those with fewest tiles first."""
    num_used = Counter(source.patient for source in report.sources if source.skipped is None)
    rows = [(name, num_used[name], tiles) for name, tiles in report.tiles_per_patient.items()]
    return sorted(rows, key=lambda row: (row[2], row[0]))


def _series(used: Sequence[SourceOutcome]) -> dict[str, int]:
    """Scanners by number of slides, each with the number of its colour."""
    slides = Counter(scanner_of(source) for source in used)
    return {name: number for number, (name, _) in enumerate(slides.most_common())}


def _scanner_row(
    name: str, series: int, used: Sequence[SourceOutcome], has_far_stain: bool
) -> _ScannerRow:
    own = [source for source in used if scanner_of(source) == name]
    mpps = [source.mpp for source in own if source.mpp is not None]
    stains = [source.stain for source in own if source.stain is not None]
    low, high = (f"{min(mpps):.3g}", f"{max(mpps):.3g}") if mpps else ("", "")
    return _ScannerRow(
        name=name,
        colour=ingest_charts.series_colour(series),
        num_slides=len(own),
        num_tiles=sum(source.num_tiles for source in own),
        mpp=low if low == high else f"{low} to {high}",
        hematoxylin=statistics.fmean(s.hematoxylin for s in stains) if stains else None,
        eosin=statistics.fmean(s.eosin for s in stains) if stains else None,
        profiles=_profiles(stains),
        has_far_stain=has_far_stain,
    )


def _profiles(stains: Sequence[Stain]) -> tuple[Markup, ...]:
    """Mean histograms of hematoxylin and eosin."""
    if not stains:
        return ()

    def mean(shares: list[tuple[float, ...]]) -> list[float]:
        return [statistics.fmean(step) for step in zip(*shares, strict=True)]

    return (
        ingest_charts.profile(
            mean([s.hematoxylin_shares for s in stains]), colour="var(--c0)", title="hematoxylin"
        ),
        ingest_charts.profile(
            mean([s.eosin_shares for s in stains]), colour="var(--c1)", title="eosin"
        ),
    )


def _stain_chart(used: Sequence[SourceOutcome], series: dict[str, int]) -> Markup | None:
    dots = [
        (
            source.stain.hematoxylin,
            source.stain.eosin,
            series[scanner_of(source)],
            f"{source.file}: hematoxylin {source.stain.hematoxylin:.3f}, "
            f"eosin {source.stain.eosin:.3f}",
        )
        for source in used
        if source.stain is not None
    ]
    return ingest_charts.scatter(dots) if dots else None


def _is_worth_a_look(note: CaptionNote) -> bool:
    return bool(note.found or note.look_at or note.notes)


def _marked(note: CaptionNote) -> list[tuple[str, bool]]:
    """Caption, label and notes in pieces, and whether each is a mark such as ``[date]``."""
    texts = (note.marked, note.marked_label, *note.notes)
    pieces = re.split(r"(\[[^\[\]]*\])", " · ".join(text for text in texts if text))
    return [(piece, piece.startswith("[") and piece.endswith("]")) for piece in pieces if piece]
