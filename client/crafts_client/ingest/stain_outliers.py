"""Which slides, and which scanners, are stained unlike the others. For the site's own eyes."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from crafts_client.ingest.report import SourceOutcome, Stain

UNKNOWN_SCANNER = "not said by the file"
FAR_DEVIATIONS = 4.0
FAR_DENSITY = 0.05
"""Far is beyond both: so many robust deviations within a scanner, and this optical density."""
MIN_SLIDES = 3
"""Fewer slides say nothing of their scanner."""

_STAINS: tuple[Callable[[Stain], float], ...] = (
    lambda stain: stain.hematoxylin,
    lambda stain: stain.eosin,
)


def scanner_of(source: SourceOutcome) -> str:
    """The scanner's name, or what the page says where the file does not say it."""
    return source.scanner or UNKNOWN_SCANNER


def far_stains(sources: Iterable[SourceOutcome]) -> tuple[list[SourceOutcome], list[str]]:
    """Slides far from the other slides of their scanner, and scanners far from most others.

    Of two scanners that differ, both are named: which of them is right cannot be seen.
    """
    by_scanner: defaultdict[str, list[tuple[SourceOutcome, Stain]]] = defaultdict(list)
    for source in sources:
        if source.stain is not None:
            by_scanner[scanner_of(source)].append((source, source.stain))
    groups = {name: group for name, group in by_scanner.items() if len(group) >= MIN_SLIDES}
    far_places: set[tuple[str, int]] = set()
    far_scanners: set[str] = set()
    for density in _STAINS:
        middles = {
            name: statistics.median(density(stain) for _, stain in group)
            for name, group in groups.items()
        }
        least = _least_distance(
            [density(stain) - middles[name] for name, group in groups.items() for _, stain in group]
        )
        far_places |= {
            source.place
            for name, group in groups.items()
            for source, stain in group
            if abs(density(stain) - middles[name]) > least
        }
        far_scanners |= {name for name in middles if _is_far_from_most(name, middles, least)}
    slides = [source for group in groups.values() for source, _ in group]
    return (
        sorted((s for s in slides if s.place in far_places), key=lambda source: source.place),
        sorted(far_scanners),
    )


def _least_distance(residuals: Sequence[float]) -> float:
    if not residuals:
        return FAR_DENSITY
    deviation = 1.4826 * statistics.median(abs(residual) for residual in residuals)
    return max(FAR_DENSITY, FAR_DEVIATIONS * deviation)


def _is_far_from_most(name: str, middles: dict[str, float], least: float) -> bool:
    others = [middle for other, middle in middles.items() if other != name]
    num_far = sum(1 for middle in others if abs(middle - middles[name]) > least)
    return 2 * num_far > len(others)
