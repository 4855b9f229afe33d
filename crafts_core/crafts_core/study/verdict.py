"""What the figures of a study say in words, and the table that a terminal shows."""

from collections.abc import Iterator, Sequence

from crafts_core.study.results import Figure, Interval, OneReader, Share, StudyAnalysis

MEASURE_NAMES = {
    "balanced_accuracy": "accuracy, both kinds alike",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "d_prime": "d'",
    "area": "area under ROC",
    "criterion": "criterion",
}
GUESSING = {"balanced_accuracy": 0.5, "area": 0.5, "d_prime": 0.0}
"""What each is for somebody who guesses."""
MEANING = (
    "An accuracy and an area of 0.5, and a d' of 0, are what guessing gives; an accuracy and an "
    "area of 1 are never wrong. Sensitivity is the share of synthetic images called synthetic, "
    "specificity that of real ones called real. A criterion above 0 means that real was said too "
    "readily, below 0 synthetic."
)


_NO_WIDTH = 1e-9
"""Answers that are all alike have such an interval: they cannot tell how others would have been."""


def verdict(analysis: StudyAnalysis) -> Iterator[str]:
    """What may be said of real against synthetic, and what may not."""
    found = analysis.mean_reader["d_prime"]
    widest = found.by_image_and_reader or found.by_image
    if widest is not None and widest[1] - widest[0] < _NO_WIDTH:
        widest = None
    who = "This reader" if len(analysis.readers) == 1 else "The mean reader"
    yield f"{who} has d' {found.value:.2f}{_within(widest)}."
    better, worse = _by_shares(analysis.readers) if widest is None else _by_interval(widest)
    if better:
        yield "Synthetic images are told from real ones more often than guessing would."
    elif worse:
        yield (
            "Synthetic images are taken for real more often than guessing would: readers see a "
            "difference, and read it the wrong way round."
        )
    elif widest is None:
        yield "The answers are too few, or too much alike, for an interval, so nothing follows."
    else:
        yield (
            "That is not distinguishable from guessing. It does not prove that the images cannot "
            f"be told apart: a d' of {max(widest[1], -widest[0]):.2f} would go with it as well."
        )
    if len(analysis.readers) == 1:
        yield "It is about this one reader; other readers may differ."


def _by_interval(interval: Interval) -> tuple[bool, bool]:
    return interval[0] > 0, interval[1] < 0


def _by_shares(readers: Sequence[OneReader]) -> tuple[bool, bool]:
    """Whether every reader is better, and whether everyone is worse, than guessing.

    Answers that are all alike have no bootstrap; Wilson's intervals of the two shares stand in.
    """
    pairs = [(each.sensitivity.wilson, each.specificity.wilson) for each in readers]
    better = all(hits[0] + passes[0] > 1 for hits, passes in pairs)
    worse = all(hits[1] + passes[1] < 1 for hits, passes in pairs)
    return bool(pairs) and better, bool(pairs) and worse


def table(analysis: StudyAnalysis) -> Iterator[str]:
    """Lines for a terminal."""
    yield (
        f"{analysis.study}: {analysis.num_real} real and {analysis.num_synthetic} synthetic "
        f"images, {_counted(len(analysis.readers), 'reader')}"
    )
    yield from verdict(analysis)
    yield ""
    yield f"{'mean reader':27}  value  95 % by image    by image and reader"
    for name, found in analysis.mean_reader.items():
        yield f"{MEASURE_NAMES[name]:27} {_figure(found)}"
    yield MEANING
    yield ""
    yield "reader  images  accuracy (Wilson)     sensitivity  specificity     d'  area  s/image"
    yield from (_reader_line(each) for each in analysis.readers)
    yield from _agreement(analysis)
    for rating in analysis.ratings:
        yield (
            f"{rating.attribute}: real {rating.real.value:.2f}, synthetic "
            f"{rating.synthetic.value:.2f}, difference {rating.difference.value:+.2f}"
            f"{_within(rating.difference.by_image_and_reader or rating.difference.by_image)}"
        )
    for guess in analysis.types:
        yield (
            f"type of {guess.kind} images: right {guess.right.value:.2f}"
            f"{_within(guess.right.by_image)}, cannot tell {guess.unsure.value:.2f}"
        )
    yield from (f"not shown: {remark}" for remark in analysis.remarks)


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def span(interval: Interval | None) -> str:
    """An interval in words, or nothing."""
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def share(found: Share) -> str:
    """A share with its interval."""
    return f"{found.value:.2f} ({span(found.wilson)})"


def _agreement(analysis: StudyAnalysis) -> Iterator[str]:
    yield ""
    for own in analysis.intra_rater:
        yield (
            f"reader {own.reader} with themselves: {share(own.same_side)} of {own.num_repeats} "
            f"repeats alike, kappa {number(own.kappa)}, of the scores {number(own.kappa_score)}"
        )
    if (among := analysis.inter_rater) is not None:
        yield (
            f"between readers: Cohen {number(among.cohen_mean)}, Fleiss {number(among.fleiss)}, "
            f"Krippendorff {number(among.alpha)}, of the scores {number(among.alpha_score)}"
        )


def _figure(found: Figure) -> str:
    return (
        f"{found.value:6.2f}  {span(found.by_image):15}  {span(found.by_image_and_reader)}"
    ).rstrip()


def _reader_line(each: OneReader) -> str:
    return (
        f"{each.reader:6}  {each.num_real + each.num_synthetic:6}  {share(each.accuracy):20}  "
        f"{each.sensitivity.value:11.2f}  {each.specificity.value:11.2f}  "
        f"{each.d_prime.value:5.2f}  {each.area.value:4.2f}  {each.median_seconds:7.1f}"
    )


def _within(interval: Interval | None) -> str:
    return "" if interval is None else f" (95 % {span(interval)})"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
