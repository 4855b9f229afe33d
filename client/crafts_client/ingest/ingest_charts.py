"""The charts of the ingest page, as SVG text.

``Markup.format`` escapes every text; every mark carries its numbers as a title, for reading on
hover and by screen readers.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup

from crafts_client.ingest.report import MAX_DENSITY
from crafts_core.svg import PALETTE, svg, text

_WIDTH, _HEIGHT = 560, 260
_LEFT, _BOTTOM, _TOP = 46, 44, 12
_MAX_BINS = 16

Dot = tuple[float, float, int, str]
"""Hematoxylin, eosin, number of the series, title."""


def histogram(counts: Sequence[int], *, unit: str, of: str) -> Markup:
    """How many have how many; those with none stand apart on the left."""
    num_none = sum(1 for count in counts if count == 0)
    some = [count for count in counts if count > 0]
    step = max(1, math.ceil(max(some, default=1) / _MAX_BINS))
    bins = [0] * math.ceil(max(some, default=1) / step)
    for count in some:
        bins[(count - 1) // step] += 1
    bars = [("0", num_none), *((_range(i * step + 1, step), n) for i, n in enumerate(bins))]
    top = max(number for _, number in bars) or 1
    room = (_WIDTH - _LEFT - 10) / len(bars)
    scale = (_HEIGHT - _BOTTOM - _TOP - 12) / top
    parts = [_axes()]
    for place, (label, number) in enumerate(bars):
        x, height = _LEFT + place * room, number * scale
        y = _HEIGHT - _BOTTOM - height
        colour = "var(--stop)" if place == 0 else "var(--c0)"
        parts.append(
            Markup(
                '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2" fill="{}">'
                "<title>{} {} with {} {}</title></rect>"
            ).format(x + 2, y, max(room - 4, 1), height, colour, number, of, label, unit)
        )
        if number:
            parts.append(text(x + room / 2, y - 4, f"{number:,}", anchor="middle"))
        if len(bars) <= 9 or place % 3 == 0:
            parts.append(text(x + room / 2, _HEIGHT - _BOTTOM + 16, label, anchor="middle"))
    parts.append(text(_WIDTH - 8, _HEIGHT - 6, unit, anchor="end", muted=True))
    return svg(_WIDTH, _HEIGHT, f"{of} by number of {unit}", parts)


def scatter(dots: Sequence[Dot]) -> Markup:
    """Eosin against hematoxylin, one dot a slide, one colour a series."""
    extent_x = _round_up(max((dot[0] for dot in dots), default=0.1))
    extent_y = _round_up(max((dot[1] for dot in dots), default=0.1))
    width, height = _WIDTH - _LEFT - 14, _HEIGHT - _BOTTOM - _TOP
    parts = [_axes()]
    for part in (0.0, 0.5, 1.0):
        x, y = _LEFT + part * width, _HEIGHT - _BOTTOM - part * height
        parts.append(text(x, _HEIGHT - _BOTTOM + 16, f"{part * extent_x:.3g}", anchor="middle"))
        parts.append(text(_LEFT - 6, y + 4, f"{part * extent_y:.3g}", anchor="end"))
    for hematoxylin, eosin, series, title in dots:
        parts.append(
            Markup(
                '<circle cx="{:.1f}" cy="{:.1f}" r="5" fill="{}" fill-opacity=".75" '
                'stroke="var(--paper)"><title>{}</title></circle>'
            ).format(
                _LEFT + width * hematoxylin / extent_x,
                _HEIGHT - _BOTTOM - height * eosin / extent_y,
                series_colour(series),
                title,
            )
        )
    parts.append(text(_WIDTH - 8, _HEIGHT - 6, "hematoxylin density", anchor="end", muted=True))
    parts.append(text(_LEFT + 8, _TOP + 6, "eosin density", muted=True))
    return svg(_WIDTH, _HEIGHT, "Stain of each slide", parts)


def profile(shares: Sequence[float], *, colour: str, title: str) -> Markup:
    """A tiny histogram of densities, its top scaled to its highest step."""
    width, height = 120, 28
    step, top = width / max(len(shares), 1), max(shares, default=0.0) or 1.0
    parts = []
    for place, share in enumerate(shares):
        tall = height * share / top
        parts.append(
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"/>').format(
                place * step, height - tall, step - 1, tall, colour
            )
        )
    label = f"{title}, density 0 to {MAX_DENSITY:g}"
    return Markup(
        '<svg class="profile" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>'
        '{}<path d="M0 {}.5H{}" stroke="var(--line)"/></svg>'
    ).format(width, height, label, label, Markup("").join(parts), height - 1, width)


def segments(counts: Sequence[tuple[str, int, str]]) -> Markup:
    """One bar cut into the shares of its counts: words, number and colour of each."""
    total, x = sum(number for _, number, _ in counts) or 1, 0.0
    parts = []
    for words, number, colour in counts:
        width = 400 * number / total
        parts.append(
            Markup(
                '<rect x="{:.2f}" width="{:.2f}" height="12" fill="{}"><title>{}: {}</title></rect>'
            ).format(x, width, colour, words, f"{number:,}")
        )
        x += width
    label = ", ".join(f"{words} {number}" for words, number, _ in counts)
    return Markup(
        '<svg class="bar" viewBox="0 0 400 12" preserveAspectRatio="none" role="img" '
        'aria-label="{}">{}</svg>'
    ).format(label, Markup("").join(parts))


def series_colour(number: int) -> str:
    """The CSS colour of a series; beyond the palette all are the same grey."""
    return f"var(--c{number})" if number < PALETTE else "var(--other)"


def _range(first: int, step: int) -> str:
    return str(first) if step == 1 else f"{first}–{first + step - 1}"


def _round_up(value: float) -> float:
    """The next twentieth, so that the axis ends on a short number."""
    return max(0.1, math.ceil(value * 1.05 * 20) / 20)


def _axes() -> Markup:
    bottom = _HEIGHT - _BOTTOM
    return Markup('<path d="M{} {}V{}H{}" stroke="var(--line)" fill="none"/>').format(
        _LEFT, _TOP, bottom, _WIDTH - 8
    )
