"""Downstream use for people: verdicts in words, a table for a terminal, and one page."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from crafts_core import __version__, charts
from crafts_core.durable import write_file
from crafts_core.evaluation.downstream.figures import (
    ADDED,
    Downstream,
    Score,
    TaskName,
    Verdict,
)
from crafts_core.evaluation.downstream.pool import Arm, Kind
from crafts_core.evaluation.downstream.tasks import MAIN_MEASURE
from crafts_core.pages import page_environment

TITLES: dict[TaskName, str] = {
    "classification": "Classification of tiles",
    "retrieval": "Finding captions and images",
    "pretraining": "Self-supervised pretraining",
    "questions": "Yes-or-no questions",
}
_TOLD: dict[TaskName, str] = {
    "classification": "Which class? A linear probe of the encoder's features.",
    "retrieval": "A ridge regression from the aligner's image to its text embeddings.",
    "pretraining": "A small network saw the row's images without labels (SimCLR), of all patients "
    "who teach; a linear probe then learnt from so many patients' real tiles.",
    "questions": "A logistic regression of image and question, as the aligner embeds them.",
}
_COLOURS: dict[Kind, int] = {"untrained": 5, "real": 3, "augmented": 4}
_OF_GENERATORS = (1, 2, 0, 7, 6)
_LABEL_WIDTH = 44


class Panel(NamedTuple):
    """One task on the page."""

    title: str
    told: str
    verdicts: list[str]
    curves: Markup
    differences: Markup


class Table(NamedTuple):
    """All rows of one measure: a cell for each number of patients."""

    title: str
    chance: float
    rows: list[tuple[str, list[Score]]]


def label(score: Score) -> str:
    """What an arm learnt from."""
    if score.arm == "both":
        return f"real + images of {score.generator}"
    if score.arm == "synthetic":
        return f"images of {score.generator} only"
    return {"real": "real tiles only", "augmented": "real + variants of them"}.get(
        score.arm, "nothing"
    )


def patients(shot: int | None) -> str:
    """How many patients of each class gave real tiles, in words."""
    if shot is None:
        return "all patients"
    return f"{shot} patient{'s' if shot > 1 else ''} a class"


def headline(result: Downstream) -> list[str]:
    """A sentence for each generator: with the fewest patients, and with all."""
    shots = _shots(result)
    lines = []
    for generator in (each.generator for each in result.generators):
        parts = [
            f"of {patients(shot)} {_summary(result, generator, shot)}"
            for shot in dict.fromkeys((shots[0], shots[-1]))
        ]
        lines.append(f"Adding images of {generator} to real tiles {'; to those '.join(parts)}.")
    return lines


def verdicts(result: Downstream, task: TaskName) -> list[str]:
    """A line for everything that was added to real tiles: what it did, by number of patients."""
    scores = [each for each in _main(result, task) if each.arm in ADDED]
    lines = []
    for arm in dict.fromkeys(_arm(each) for each in scores):
        rows = [each for each in scores if _arm(each) == arm]
        told = "; ".join(
            f"with {patients(each.patients)} {each.verdict} ({_difference(each)})" for each in rows
        )
        lines.append(f"{label(rows[0])}: {told}.")
    return lines


def plain_text(result: Downstream) -> list[str]:
    """Every task for a terminal: a paragraph for each number of patients."""
    lines = []
    for task, shot in ((task, shot) for task in _tasks(result) for shot in _shots(result)):
        scores = [each for each in _main(result, task) if each.patients == shot]
        lines.append(
            f"{TITLES[task]}, {MAIN_MEASURE[task]}, {patients(shot)}; chance {scores[0].chance:.2f}"
        )
        for each in scores:
            difference = "" if each.difference is None else f"  {_difference(each)}"
            told = f"  {each.verdict}" if each.verdict else ""
            lines.append(f"  {label(each):<{_LABEL_WIDTH}}{each.value:.3f}{difference}{told}")
    return [*lines, *headline(result)]


def remarks(result: Downstream) -> list[str]:
    """What a reader of the figures has to know."""
    images = ", ".join(f"{each.images} images of {each.generator}" for each in result.generators)
    return [
        f"{result.tiles} real tiles of {result.patients} patients, {len(result.classes)} classes, "
        f"{images}; encoder {result.encoder} ({result.encoder_hash[:12]})",
        f"{result.splits} random splits: of each class half of the patients are asked about and "
        "teach nobody, not by a caption either; in brackets the difference to real tiles only, "
        "with 90 % intervals over patients and splits",
        *(f"not measured: {reason}" for reason in result.not_measured),
    ]


def write_page(result: Downstream, path: Path, *, subject: str, real: str) -> None:
    """One file that loads nothing: verdicts, plots and tables; no picture of anybody's tissue.

    Figures are of real patients, and classes and questions may be words of their captions: it is
    readable by its owner only.
    """
    page = (
        page_environment("crafts_core")
        .get_template("downstream.html.j2")
        .render(
            result=result,
            subject=subject,
            real=real,
            headline=headline(result),
            panels=[_panel(result, task) for task in _tasks(result)],
            ticks=[patients(shot) for shot in _shots(result)],
            tables=list(_tables(result)),
            remarks=remarks(result),
            created=datetime.now(UTC),
            version=__version__,
        )
    )
    write_file(path, page, mode=0o600)


def _panel(result: Downstream, task: TaskName) -> Panel:
    scores, shots = _main(result, task), _shots(result)
    generators = [each.generator for each in result.generators]
    arms = list(dict.fromkeys(_arm(each) for each in scores))
    drawn = []
    for arm in arms:
        rows = [each for each in scores if _arm(each) == arm]
        drawn.append(
            charts.Curve(
                label(rows[0]),
                _colour(arm, generators),
                arm.kind == "synthetic",
                [(each.value, each.interval) for each in rows],
            )
        )
    curves = charts.curves(
        drawn,
        ticks=["all" if shot is None else str(shot) for shot in shots],
        unit=f"{MAIN_MEASURE[task]}, by patients a class",
        mark=scores[0].chance,
        told="chance",
    )
    added = [each for each in scores if each.arm in ADDED and each.difference is not None]
    differences = charts.dots(
        [
            (f"{_short(each)}, {each.patients or 'all'}", each.difference or 0.0,
             each.difference_interval)
            for each in added
        ],
        colours=[_colour(_arm(each), generators) for each in added],
        unit="difference to real tiles only",
        band=None,
    )  # fmt: skip
    return Panel(
        TITLES[task],
        _TOLD[task],
        verdicts(result, task),
        curves,
        differences,
    )


def _short(score: Score) -> str:
    """Fits beside a dot."""
    return "variants" if score.arm == "augmented" else f"+ {score.generator}"[:20]


def _tables(result: Downstream) -> Iterator[Table]:
    for task, measure in dict.fromkeys((each.task, each.measure) for each in result.scores):
        scores = [s for s in result.scores if (s.task, s.measure) == (task, measure)]
        rows = [
            (label(arm_scores[0]), arm_scores)
            for arm in dict.fromkeys(map(_arm, scores))
            if (arm_scores := [each for each in scores if _arm(each) == arm])
        ]
        yield Table(f"{TITLES[task]}: {measure}", scores[0].chance, rows)


def _summary(result: Downstream, generator: str, shot: int | None) -> str:
    """Tasks by verdict."""
    told: dict[Verdict, list[str]] = {}
    for task in _tasks(result):
        for each in _main(result, task):
            if (each.arm, each.generator, each.patients) == ("both", generator, shot):
                assert each.verdict is not None
                told.setdefault(each.verdict, []).append(f"{task} ({each.difference:+.3f})")
    return ", ".join(f"{verdict} in {' and '.join(tasks)}" for verdict, tasks in told.items())


def _main(result: Downstream, task: TaskName) -> list[Score]:
    """Rows of the measure that the verdict goes by."""
    return [s for s in result.scores if (s.task, s.measure) == (task, MAIN_MEASURE[task])]


def _tasks(result: Downstream) -> list[TaskName]:
    return [task for task in TITLES if _main(result, task)]


def _shots(result: Downstream) -> list[int | None]:
    return list(dict.fromkeys(each.patients for each in result.scores))


def _arm(score: Score) -> Arm:
    return Arm(score.arm, score.generator)


def _colour(arm: Arm, generators: Sequence[str]) -> int:
    if not arm.generator:
        return _COLOURS[arm.kind]
    return _OF_GENERATORS[generators.index(arm.generator) % len(_OF_GENERATORS)]


def _difference(score: Score) -> str:
    assert score.difference is not None
    assert score.difference_interval is not None
    low, high = score.difference_interval
    return f"{score.difference:+.3f}, {low:+.3f} to {high:+.3f}"
