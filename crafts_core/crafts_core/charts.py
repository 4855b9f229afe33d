"""Small charts as SVG: bars, dots or curves with intervals, lines, stacked columns.

Every mark carries its number as a title for reading on hover and by screen readers.
"""

from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import NamedTuple

from markupsafe import Markup

from crafts_core.svg import PALETTE, Anchor, svg, text

_WIDTH = 640
_NAMES_A_ROW = 4
MOST_NAMED = 24
"""Sites in a legend: more colours nobody tells apart, and a table has to say what each has."""

Bar = tuple[str, float, tuple[float, float] | None]
Moment = tuple[datetime, float]


def bars(values: Sequence[Bar], *, unit: str, mark: float | None = None) -> Markup:
    """Horizontal bars with their intervals; ``mark`` draws a dashed line at a target.

    Each has its name beside it: where there are more than colours, all have one. Many are low.
    """
    left, (row, thick) = 190, (34, 20) if len(values) <= MOST_NAMED else (17, 11)
    ends = [max(value, interval[1] if interval else value) for _, value, interval in values]
    top = max([*ends, mark or 0.0, 1e-9]) * 1.15
    height = row * len(values) + 30

    def x(value: float) -> float:
        return left + (_WIDTH - left - 70) * max(value, 0.0) / top

    parts: list[str] = []
    for index, (label, value, interval) in enumerate(values):
        y = 8 + row * index
        middle = y + thick // 2
        colour = index if len(values) <= PALETTE else 0
        parts.append(text(left - 8, middle + 4, label, anchor="end"))
        parts.append(
            f'<rect x="{left}" y="{y}" width="{x(value) - left:.1f}" height="{thick}" rx="3" '
            f'fill="var(--c{colour})"><title>{escape(label)}: {value:.4g}</title></rect>'
        )
        end = value
        if interval is not None:
            end = max(value, interval[1])
            parts.append(
                f'<path d="M{x(interval[0]):.1f} {middle}H{x(interval[1]):.1f}'
                f'M{x(interval[0]):.1f} {middle - 5}v10M{x(interval[1]):.1f} {middle - 5}v10" '
                'stroke="var(--ink)" stroke-width="1.5" fill="none"/>'
            )
        parts.append(text(x(end) + 8, middle + 4, f"{value:.3g}"))
    if mark is not None:
        parts.append(
            f'<path d="M{x(mark):.1f} 2V{height - 26}" stroke="var(--ink)" stroke-dasharray="4 4">'
            f"<title>target {mark:g}</title></path>"
        )
    parts.append(text(left, height - 6, unit, muted=True))
    return svg(_WIDTH, height, unit, parts)


def dots(
    values: Sequence[Bar],
    *,
    colours: Sequence[int],
    unit: str,
    band: tuple[float, float] | None,
    told: str = "",
) -> Markup:
    """A dot for each value with its interval, below 0 too.

    Args:
        values: From top to bottom.
        colours: Number of each in the palette.
        unit: Below the axis.
        band: Where ``told`` lies, shaded.
        told: What that is.
    """
    width, left, right, row = 480, 180, 58, 30
    ends: list[float] = [0.0, *(band or ())]
    ends += [end for _, value, interval in values for end in (value, *(interval or ()))]
    low, high = min(ends), max(ends)
    high = max(high, low + 1e-9)
    height = row * len(values) + 34

    def x(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    parts = []
    if band is not None:
        parts.append(
            f'<rect x="{x(band[0]):.1f}" y="2" width="{max(x(band[1]) - x(band[0]), 2):.1f}" '
            f'height="{height - 28}" rx="3" fill="var(--line)"><title>{escape(told)}: '
            f"{band[0]:.4g} to {band[1]:.4g}</title></rect>"
        )
    parts.append(
        f'<path d="M{x(0.0):.1f} 2V{height - 26}" stroke="var(--muted)" stroke-width="1"/>'
    )
    for index, ((label, value, interval), number) in enumerate(zip(values, colours, strict=True)):
        middle, colour = 18 + row * index, f"var(--c{number % PALETTE})"
        within = "" if interval is None else f" ({interval[0]:.4g} to {interval[1]:.4g})"
        parts.append(text(left - 12, middle + 4, label, anchor="end"))
        if interval is not None:
            parts.append(
                f'<path d="M{x(interval[0]):.1f} {middle}H{x(interval[1]):.1f}" '
                f'stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
            )
        parts.append(
            f'<circle cx="{x(value):.1f}" cy="{middle}" r="5.5" fill="{colour}" '
            f'stroke="var(--paper)" stroke-width="1.5"><title>{escape(label)}: {value:.4g}'
            f"{within}</title></circle>"
        )
        parts.append(text(width - 4, middle + 4, f"{value:.3g}", anchor="end"))
    parts.append(text(width - 4, height - 6, unit, anchor="end", muted=True))
    return svg(width, height, unit, parts)


def line(points: Sequence[tuple[int, float]], *, unit: str) -> Markup:
    """A line over rounds."""
    left, bottom, height = 60, 34, 200
    values = [value for _, value in points]
    low, high = min(values), max(values)
    room = max(high - low, 1e-6) * 0.15
    low, high = low - room, high + room
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def place(point: tuple[int, float]) -> tuple[float, float]:
        number, value = point
        x = left + (_WIDTH - left - 20) * (number - first) / (last - first)
        y = 10 + (height - bottom - 10) * (high - value) / (high - low)
        return x, y

    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, points))
    parts = [f'<path d="M{path}" stroke="var(--c1)" stroke-width="2" fill="none"/>']
    for point in points:
        x, y = place(point)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--c1)">'
            f"<title>round {point[0]}: {point[1]:.4f}</title></circle>"
        )
    for value in (min(values), max(values)):
        parts.append(text(left - 8, place((first, value))[1] + 4, f"{value:.3f}", anchor="end"))
    parts.append(text(left, height - 8, unit, muted=True))
    return svg(_WIDTH, height, unit, parts)


def timeline(
    lines: Sequence[tuple[str, Sequence[Moment]]],
    *,
    until: datetime,
    unit: str,
    mark: float | None = None,
    told: str = "",
) -> Markup:
    """Steps over time from 0: each line keeps a value until its next point, the last to ``until``.

    Args:
        lines: Name and points of each, in order of time; one point at least in all.
        until: The right end, no earlier than any point.
        unit: Below the axis.
        mark: Where a dashed line is.
        told: What that is.
    """
    left, top, plot, row = 60, 16, 170, 22
    first = min(at for _, points in lines for at, _ in points)
    long_s = max((until - first).total_seconds(), 1.0)
    highest = max([mark or 0.0, 1e-9, *(value for _, points in lines for _, value in points)])

    def x(at: datetime) -> float:
        return left + (_WIDTH - left - 20) * (at - first).total_seconds() / long_s

    def y(value: float) -> float:
        return top + plot * (1 - value / (1.08 * highest))

    parts = [f'<path d="M{left} {y(0.0):.1f}H{_WIDTH - 20}" stroke="var(--line)"/>']
    if mark is not None:
        parts.append(
            f'<path d="M{left} {y(mark):.1f}H{_WIDTH - 20}" stroke="var(--ink)" '
            f'stroke-dasharray="4 4"><title>{escape(told)} {mark:g}</title></path>'
        )
    for number, (name, points) in enumerate(lines):
        steps = "".join(f"H{x(at):.1f}V{y(value):.1f}" for at, value in points)
        parts.append(
            f'<path d="M{x(points[0][0]):.1f} {y(0.0):.1f}{steps}H{x(until):.1f}" fill="none" '
            f'stroke="{_colour(number)}" stroke-width="2"/>'
        )
        for at, value in points:
            when = at.strftime("%Y-%m-%d %H:%M")
            parts.append(
                f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="3" fill="{_colour(number)}">'
                f"<title>{escape(name)}, {when}: {value:.4g}</title></circle>"
            )
        parts += _legend(number, name, left, top + plot + 34 + row * number)
    for value in {0.0, highest}:
        parts.append(text(left - 8, y(value) + 4, f"{value:.3g}", anchor="end"))
    days: list[tuple[float, Anchor, datetime]] = [
        (left, "start", first),
        (_WIDTH - 20, "end", until),
    ]
    for at_x, anchor, day in days:
        parts.append(text(at_x, y(0.0) + 18, day.strftime("%Y-%m-%d"), anchor=anchor, muted=True))
    height = top + plot + 34 + row * len(lines) + 22
    parts.append(text(left, height - 6, unit, muted=True))
    return svg(_WIDTH, height, unit, parts)


class Curve(NamedTuple):
    """Values with their intervals, one for each tick."""

    label: str
    colour: int
    """Number in the palette."""
    is_dashed: bool
    points: Sequence[tuple[float, tuple[float, float]]]


def curves(
    drawn: Sequence[Curve], *, ticks: Sequence[str], unit: str, mark: float, told: str
) -> Markup:
    """Curves over the same few ticks, side by side so that intervals can be told apart.

    Args:
        drawn: In the order of the legend below.
        ticks: Below the axis.
        unit: Of the values.
        mark: A dashed line at this value.
        told: What that is.
    """
    width, left, plot, row = 480, 44, 220, 20
    ends = [end for each in drawn for _, interval in each.points for end in interval]
    low, high = min([*ends, mark]), max([*ends, mark])
    room = max(high - low, 1e-6) * 0.06
    low, high = low - room, high + room
    step = (width - left - 10) / len(ticks)

    def y(value: float) -> float:
        return 10 + plot * (high - value) / (high - low)

    parts = [
        f'<path d="M{left} {y(mark):.1f}H{width - 10}" stroke="var(--muted)" '
        f'stroke-dasharray="2 4"><title>{escape(told)}: {mark:.4g}</title></path>'
    ]
    parts += [
        text(left - 6, y(value) + 4, f"{value:.2f}", anchor="end", muted=True)
        for value in (low + room, high - room)
    ]
    for place, tick in enumerate(ticks):
        middle = left + step * (place + 0.5)
        parts.append(text(middle, plot + 28, tick, anchor="middle", muted=True))
    for number, each in enumerate(drawn):
        colour = f"var(--c{each.colour % PALETTE})"
        dashes = ' stroke-dasharray="5 4"' if each.is_dashed else ""
        aside = step * 0.6 * ((number + 0.5) / len(drawn) - 0.5)
        xs = [left + step * (place + 0.5) + aside for place in range(len(ticks))]
        path = "L".join(f"{x:.1f} {y(v):.1f}" for x, (v, _) in zip(xs, each.points, strict=True))
        parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2" fill="none"{dashes}/>')
        for x, (value, (bottom, top)), tick in zip(xs, each.points, ticks, strict=True):
            parts.append(
                f'<path d="M{x:.1f} {y(bottom):.1f}V{y(top):.1f}" stroke="{colour}" '
                f'stroke-width="1.5"/><circle cx="{x:.1f}" cy="{y(value):.1f}" r="4" '
                f'fill="{colour}"><title>{escape(each.label)}, {escape(tick)}: {value:.3f} '
                f"({bottom:.3f} to {top:.3f})</title></circle>"
            )
        line_y = plot + 62 + row * number
        parts.append(
            f'<path d="M{left} {line_y - 4}h22" stroke="{colour}" stroke-width="2"{dashes}/>'
        )
        parts.append(text(left + 30, line_y, each.label))
    parts.append(text(width - 10, plot + 44, unit, anchor="end", muted=True))
    return svg(width, plot + 62 + row * len(drawn), unit, parts)


def stacked(
    columns: Sequence[tuple[int, Sequence[float]]], names: Sequence[str], *, unit: str
) -> Markup:
    """One column per round, cut into the sites' shares; every part says whose it is on hover.

    Few sites have a legend; many lie in the order of ``names``, the first at the bottom.
    """
    left, plot, row = 60, 154, 22
    named = list(enumerate(names)) if len(names) <= MOST_NAMED else []
    legend = row * -(-len(named) // _NAMES_A_ROW)
    step = (_WIDTH - left - 20) / max(len(columns), 1)
    parts = []
    for place, (number, shares) in enumerate(columns):
        y = 10.0 + plot
        for index, share in enumerate(shares):
            y -= plot * share
            parts.append(
                f'<rect x="{left + place * step:.1f}" y="{y:.1f}" width="{step * 0.8:.1f}" '
                f'height="{plot * share:.1f}" fill="{_colour(index)}">'
                f"<title>round {number}, {escape(names[index])}: {share:.3f}</title></rect>"
            )
    for index, name in named:
        x = left + 140 * (index % _NAMES_A_ROW)
        y = 10 + plot + 8 + row * (index // _NAMES_A_ROW)
        parts += _legend(index, name, x, y)
    height = 10 + plot + legend + 34
    told = unit if named else f"{unit}; {len(names)} sites in their order, from the bottom up"
    parts.append(text(left, height - 6, told, muted=True))
    return svg(_WIDTH, height, unit, parts)


def _legend(index: int, name: str, x: float, y: float) -> tuple[str, str]:
    """What a colour means."""
    square = f'<rect x="{x}" y="{y}" width="12" height="12" rx="2" fill="{_colour(index)}"/>'
    return square, text(x + 18, y + 11, name)


def _colour(index: int) -> str:
    """The palette's, then hues that are far from their neighbours'."""
    if index < PALETTE:
        return f"var(--c{index})"
    return f"hsl({(index * 137.5) % 360:.0f} 45% 52%)"
