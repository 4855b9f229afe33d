"""What the charts of all pages are made of: a line of text, and the frame around the marks.

Colours are CSS variables of the page (``--ink``, ``--muted``, ``--c0`` to ``--c7``), so charts
follow its light and dark theme.
"""

from collections.abc import Sequence
from typing import Literal

from markupsafe import Markup

PALETTE = 8
"""``--c0`` to ``--c7`` are defined by the page."""

Anchor = Literal["start", "middle", "end"]


def text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: Anchor = "start",
    muted: bool = False,
    bold: bool = False,
) -> Markup:
    """One line; its words are escaped."""
    return Markup(
        '<text x="{:.1f}" y="{:.1f}" text-anchor="{}" font-size="13" fill="{}"{}>{}</text>'
    ).format(
        x,
        y,
        anchor,
        "var(--muted)" if muted else "var(--ink)",
        Markup(' font-weight="600"') if bold else "",
        words,
    )


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> Markup:
    """The marks in their frame; ``parts`` are SVG, whose makers have escaped every word."""
    marks = Markup("".join(parts))  # noqa: S704 - see above
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        width, height, title, marks
    )
