"""One evaluation as one page that loads nothing from anywhere: figures, plots and pictures."""

import errno
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from PIL import Image

from crafts_core import __version__, charts
from crafts_core.durable import write_file
from crafts_core.evaluation.baselines import ArmName
from crafts_core.evaluation.bench import Bench
from crafts_core.evaluation.figures import Arm, Comparison
from crafts_core.evaluation.pictures import Pictures, pictures_of
from crafts_core.evaluation.resampling import Interval
from crafts_core.evaluation.show import Show
from crafts_core.evaluation.table import (
    LABELS,
    cell,
    class_table,
    match,
    match_cell,
    remarks,
    shown_columns,
    shown_matches,
)
from crafts_core.pages import page_environment, png_uri, uri_of_png
from crafts_core.progress import Progress
from crafts_core.provenance import encode_png

Value = tuple[ArmName, float, Interval | None]
_COLOURS: tuple[ArmName, ...] = (
    "foundation", "generator", "reconstruction", "real", "recoloured", "recoloured_by_caption",
    "images", "retrieved", "public_steps",
)  # fmt: skip
"""Places in the page's palette: a row keeps its colour in every plot."""
_FLOOR = "real tiles of other patients"
_DISTANCES = (
    (
        "structure",
        "structure: squared MMD after matching colours",
        "How far the tissue is, each set in the colours of the real images. In the grey band lie "
        "real tiles of other patients: inside it is no difference.",
    ),
    (
        "colour",
        "colour: squared MMD of optical densities",
        "How far the stain is: optical densities alone. What differs here only, a map of colours "
        "mends.",
    ),
)
_SHARES = (
    (
        "coverage",
        "coverage: share of real tiles with an image near",
        "Whether every kind of real tile is there.",
    ),
    (
        "precision",
        "precision: share of images among real tiles",
        "Whether images lie where real tiles do.",
    ),
    (
        "shape_agreement",
        "shape judge: share of images taken for their class",
        "By a classifier of real training tiles that sees no colour.",
    ),
    (
        "drift",
        "drift D: 0 as under own captions, 1 as under wrong ones",
        "By an examiner that no training saw.",
    ),
)
"""Field, unit and caption of a plot."""


class Plot(NamedTuple):
    """One figure of all rows, and what to look for."""

    drawing: Markup
    caption: str


def evaluate_on(
    bench: Bench,
    subject: Path,
    *,
    page: Path | None,
    show: Show,
    progress: Progress | None = None,
) -> Comparison:
    """Measure a subject of the bench, and write the page if there should be one.

    Raises:
        CraftsError: something cannot be read, or there are too few images.
        OSError: the page cannot be written where it should be, which is found before measuring.
    """
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(page.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(page.parent))
    found = bench.measure(subject, progress)
    if page is not None:
        names = {"subject": subject.resolve().name, "real": bench.real.resolve().name}
        write_evaluation_page(found, pictures_of(bench, subject, show), page, **names)
    return found


def write_evaluation_page(
    evaluation: Comparison,
    pictures: Pictures,
    path: Path,
    *,
    subject: str,
    real: str,
) -> None:
    """Write the page. Where a picture may be a patient's, it is readable by its owner only.

    Args:
        evaluation: What was measured.
        pictures: What is shown.
        path: Of the page.
        subject: What was measured, in words.
        real: What it was measured against, in words.
    """
    page = render(evaluation, pictures, subject=subject, real=real)
    write_file(path, page, mode=0o600 if pictures.may_be_patients else 0o644)


def render(evaluation: Comparison, pictures: Pictures, *, subject: str, real: str) -> str:
    """The page as one string: inline style, SVG and images; no script."""
    return (
        page_environment("crafts_core")
        .get_template("evaluation.html.j2")
        .render(
            evaluation=evaluation,
            subject=subject,
            real=real,
            headline=headline(evaluation),
            plots=_plots(evaluation),
            columns=shown_columns(evaluation),
            cell=cell,
            classes=class_table(evaluation),
            matches=shown_matches(evaluation),
            match_cell=match_cell,
            labels=LABELS,
            remarks=remarks(evaluation),
            pictures=_shown(pictures),
            show=pictures.show,
            among=pictures.nearest_among,
            may_be_patients=pictures.may_be_patients,
            created=datetime.now(UTC),
            version=__version__,
        )
    )


def headline(evaluation: Comparison) -> str:
    """The result in a few sentences, structure before colour."""
    floor, subject = evaluation.arms[0], evaluation.arms[-1]
    told = [_against_floor(what, subject, floor) for what in ("structure", "colour")]
    foundation = evaluation.arm("foundation")
    if foundation is not None:
        told.append(
            f"The public foundation is at {foundation.structure:.3f} and {foundation.colour:.3f}."
        )
    return " ".join(told)


def _against_floor(what: str, subject: Arm, floor: Arm) -> str:
    value: float = getattr(subject, what)
    interval: Interval = getattr(subject, f"{what}_interval")
    real: Interval = getattr(floor, f"{what}_interval")
    if interval.high <= real.high:
        verdict = "no farther"
    elif interval.low > real.high:
        verdict = "farther"
    else:
        verdict = "perhaps farther" if value > real.high else "not seen to be farther"
    return (
        f"In {what} the images are {verdict} from the real tiles ({value:.3f}, {interval.low:.3f} "
        f"to {interval.high:.3f}) than real tiles of other patients are ({real.low:.3f} to "
        f"{real.high:.3f})."
    )


def _plots(evaluation: Comparison) -> list[Plot]:
    real, *others = evaluation.arms
    drawn = []
    for field, unit, caption in _DISTANCES:
        band = getattr(real, f"{field}_interval")
        drawn.append(Plot(_dots(_values(others, field), unit, band), caption))
    for field, unit, caption in _SHARES:
        values = _values(evaluation.arms, field)
        if len(values) > 1:
            drawn.append(Plot(_dots(values, unit), caption))
    matched = [
        (arm.name, found.value, found.interval)
        for arm in evaluation.arms
        if (found := match(arm, "correlation")) is not None
    ]
    if len(matched) > 1:
        caption = "Whether an image says what its caption says, by the foundation's aligner."
        drawn.append(Plot(_dots(matched, "image-caption correlation"), caption))
    return drawn


def _values(rows: Sequence[Arm], field: str) -> list[Value]:
    return [
        (arm.name, getattr(arm, field), getattr(arm, f"{field}_interval"))
        for arm in rows
        if getattr(arm, field) is not None
    ]


def _dots(values: list[Value], unit: str, band: Interval | None = None) -> Markup:
    return charts.dots(
        [(LABELS[name], value, interval) for name, value, interval in values],
        colours=[_COLOURS.index(name) for name, _, _ in values],
        unit=unit,
        band=band,
        told=_FLOOR,
    )


def _shown(pictures: Pictures) -> list[dict[str, str | None]]:
    real = [] if pictures.real_NHWC is None else [png_uri(tile) for tile in pictures.real_NHWC]
    rows = zip_longest(pictures.generated_NHWC, pictures.captions, pictures.said, real)
    return [
        {
            "generated": png_uri(image)
            if said is None
            else uri_of_png(encode_png(Image.fromarray(image), said)),
            "caption": caption,
            "real": tile,
        }
        for image, caption, said, tile in rows
        if image is not None
    ]
