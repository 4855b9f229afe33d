"""``sweep.html``: what differs between arms, to look at."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from crafts_core import charts
from crafts_core.pages import page_environment
from crafts_simulations.sweep_report import HEADINGS, SweepReport, SweepRow

_PLOTTED = {
    "structure": "Structure distance: below 0 is nearer to real tiles than the baseline.",
    "colour": "Colour distance: below 0 is nearer.",
    "shape_agreement": "Shape judge: above 0 more images show the class that was asked for.",
    "drift": "Drift: below 0 images keep closer to their words.",
}
Links = Mapping[str, Sequence[tuple[int, str]]]


class _Plot(NamedTuple):
    drawing: Markup
    caption: str


def render(report: SweepReport, runs: Links) -> str:
    """The whole page.

    Args:
        report: What is shown.
        runs: For each arm its finished seeds and the address of that run's own page.
    """
    template = page_environment("crafts_simulations").get_template("sweep.html.j2")
    compared = [row for row in report.arms if row.differences]
    return template.render(
        report=report,
        rows=(*report.beside, *report.arms),
        compared=compared,
        headings=HEADINGS,
        headline=headline(report),
        plots=[_plot(compared, field) for field in _PLOTTED if _all_have(compared, field)],
        runs=runs,
        number=lambda value: "" if value is None else f"{value:.4f}",
    )


def headline(report: SweepReport) -> str:
    """Which arms are nearer in structure than the baseline, in a sentence."""
    differences = {row.name: row.differences["structure"] for row in report.arms if row.differences}
    if not report.has_baseline:
        return f"No run of {_names([report.baseline])} finished: there is nothing to compare with."
    if not differences:
        return "One arm: there is nothing to compare it with."
    if not report.tells_of_chance:
        best = min(differences, key=lambda name: differences[name].mean)
        return f"With this one seed “{best}” differs most towards real structure."
    away = {name: each for name, each in differences.items() if each.is_away_from_zero}
    nearer = [name for name, each in away.items() if each.mean < 0]
    farther = [name for name in away if name not in nearer]
    told = [
        f"{_names(names)} {'is' if len(names) == 1 else 'are'} {what} {_names([report.baseline])}"
        for names, what in ((nearer, "nearer to real structure than"), (farther, "farther than"))
        if names
    ]
    if not told:
        return f"No arm differs from {_names([report.baseline])} in structure."
    return "; ".join(told) + "."


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"“{name}”" for name in names)


def _all_have(rows: Sequence[SweepRow], field: str) -> bool:
    return bool(rows) and all(field in row.differences for row in rows)


def _plot(rows: Sequence[SweepRow], field: str) -> _Plot:
    values = [
        (row.name, row.differences[field].mean, row.differences[field].interval) for row in rows
    ]
    drawing = charts.dots(values, colours=range(len(values)), unit=HEADINGS[field], band=None)
    return _Plot(drawing, _PLOTTED[field])
