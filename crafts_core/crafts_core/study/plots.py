"""The plots of the analysis as SVG: intervals beside a reference, an ROC curve, shares.

Every mark carries its number as a title for reading on hover and by screen readers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from crafts_core.study.results import Interval
from crafts_core.svg import svg, text

_WIDTH = 500
_LEGEND_COLUMNS, _LEGEND_ROW = 5, 22
_DASHES = ("none", "9 4", "2 4", "12 4 2 4")
"""One for each round through the page's eight colours: 32 curves that differ."""
REAL, SYNTHETIC = "var(--c2)", "var(--c1)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One value with its interval."""

    label: str
    value: float
    interval: Interval | None
    is_mean: bool = False


def intervals(dots: Sequence[Dot], *, reference: float, limits: Interval, title: str) -> Markup:
    """A row for each value, and a dashed line at what guessing gives."""
    left, row = 104, 32
    ends: list[float] = [end for dot in dots for end in (dot.value, *(dot.interval or ()))]
    low, high = min(limits[0], *ends), max(limits[1], *ends)
    bottom = row * len(dots) + 14

    def x(value: float) -> float:
        return left + (_WIDTH - left - 60) * (value - low) / (high - low)

    parts = [
        f'<path d="M{x(reference):.1f} 4V{bottom}" stroke="var(--muted)" stroke-dasharray="4 4"/>',
        text(x(reference), bottom + 16, f"guessing: {reference:g}", anchor="middle", muted=True),
    ]
    for index, dot in enumerate(dots):
        y = 22 + row * index
        colour = "var(--strong)" if dot.is_mean else "var(--c2)"
        parts.append(text(left - 12, y + 5, dot.label, anchor="end", bold=dot.is_mean))
        if dot.interval is not None:
            parts.append(
                f'<path d="M{x(dot.interval[0]):.1f} {y}H{x(dot.interval[1]):.1f}" '
                f'stroke="{colour}" stroke-width="3" stroke-linecap="round" opacity="0.55"/>'
            )
        parts.append(
            f'<circle cx="{x(dot.value):.1f}" cy="{y}" r="6" fill="{colour}">'
            f"<title>{escape(dot.label)}: {dot.value:.3f}</title></circle>"
        )
        parts.append(text(_WIDTH - 4, y + 5, f"{dot.value:.2f}", anchor="end", bold=dot.is_mean))
    return svg(_WIDTH, bottom + 24, title, parts)


def roc(curves: Sequence[tuple[str, Sequence[int], Sequence[int]]], *, title: str) -> Markup:
    """For each reader (label, scores of real images, of synthetic ones) the curve of cuts.

    The legend stands below, in columns: however many readers there are, all of it is seen.
    """
    left, side = 46, 400
    base = 10 + side
    parts = [
        f'<path d="M{left} 10h{side}v{side}h-{side}z" fill="none" stroke="var(--line)"/>',
        f'<path d="M{left} {base}L{left + side} 10" stroke="var(--muted)" stroke-dasharray="4 4"/>',
        text(left, base + 32, "share of real images called synthetic", muted=True),
        f'<g transform="rotate(-90 14 {base})">'
        f"{text(14, base + 4, 'share of synthetic called synthetic', muted=True)}</g>",
    ]
    for value in (0.0, 0.5, 1.0):
        at = left + side * value
        parts.append(text(at, base + 15, f"{value:g}", anchor="middle", muted=True))
        parts.append(
            text(left - 6, base + 4 - side * value, f"{value:g}", anchor="end", muted=True)
        )
    for index, (label, real, synthetic) in enumerate(curves):
        places = [
            (left + side * _above(real, cut), base - side * _above(synthetic, cut))
            for cut in range(len(real), -1, -1)
        ]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        line = (
            f'stroke="var(--c{(index + 1) % 8})" stroke-width="2.5" '
            f'stroke-dasharray="{_DASHES[index // 8 % len(_DASHES)]}"'
        )
        parts.append(f'<path d="M{path}" {line} fill="none"><title>{escape(label)}</title></path>')
        row, column = divmod(index, _LEGEND_COLUMNS)
        x, y = 4 + column * _WIDTH / _LEGEND_COLUMNS, base + 62 + row * _LEGEND_ROW
        parts.append(f'<path d="M{x:.1f} {y - 5}h18" {line}/>')
        parts.append(text(x + 24, y, label))
    rows = -(-len(curves) // _LEGEND_COLUMNS)
    return svg(_WIDTH, base + 50 + rows * _LEGEND_ROW, title, parts)


def paired_columns(
    names: Sequence[str], real: Sequence[float], synthetic: Sequence[float], *, title: str
) -> Markup:
    """For each name two columns: the share of real images, and of synthetic ones."""
    left, height, base = 10, 190, 210
    step = (_WIDTH - 2 * left) / len(names)
    top = max([*real, *synthetic, 1e-9])
    parts = []
    for index, name in enumerate(names):
        for shares, colour, kind, shift in (
            (real, REAL, "real", 0.08),
            (synthetic, SYNTHETIC, "synthetic", 0.52),
        ):
            tall = (height - 20) * shares[index] / top
            x = left + step * (index + shift)
            parts.append(
                f'<rect x="{x:.1f}" y="{base - tall:.1f}" width="{step * 0.4:.1f}" '
                f'height="{tall:.1f}" rx="2" fill="{colour}"><title>{kind} images, '
                f"{escape(name)}: {shares[index]:.0%}</title></rect>"
            )
            parts.append(
                text(x + step * 0.2, base - tall - 5, f"{shares[index]:.0%}", anchor="middle")
            )
        parts.append(text(left + step * (index + 0.5), base + 18, name, anchor="middle"))
    parts.append(f'<path d="M{left} {base}H{_WIDTH - left}" stroke="var(--line)"/>')
    return svg(_WIDTH, base + 28, title, parts)


def _above(counts: Sequence[int], cut: int) -> float:
    """Share of scores above ``cut``."""
    return sum(counts[cut:]) / max(sum(counts), 1)
