"""An evaluation as a table for people: the same rows and columns wherever it is shown."""

from collections.abc import Sequence
from typing import NamedTuple

from crafts_core.evaluation.alignment import RANKS, Recall
from crafts_core.evaluation.baselines import ArmName
from crafts_core.evaluation.examiner import Gate
from crafts_core.evaluation.figures import Arm, Comparison
from crafts_core.evaluation.resampling import Interval

LABELS: dict[ArmName, str] = {
    "real": "real tiles of other patients",
    "reconstruction": "real tiles through the VAE",
    "foundation": "public foundation",
    "recoloured": "foundation, recoloured",
    "recoloured_by_caption": "recoloured by caption",
    "retrieved": "private retrieval",
    "public_steps": "trained on retrieved tiles",
    "generator": "shared generator",
    "images": "the images",
}
COLUMNS: tuple[tuple[str, str], ...] = (
    ("colour distance", "colour"),
    ("structure distance", "structure"),
    ("distance", "mmd2"),
    ("Fréchet distance", "frechet"),
    ("KID", "kid"),
    ("CMMD", "cmmd"),
    ("shape judge", "shape_agreement"),
    ("colour judge", "colour_agreement"),
    ("drift D", "drift"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("density", "density"),
    ("coverage", "coverage"),
)
"""Heading and field of ``Arm``."""


MATCHES: tuple[tuple[str, str], ...] = (
    ("image-caption correlation", "correlation"),
    *((f"caption of an image, R@{k}", f"image_to_text.{k}") for k in RANKS),
    *((f"image of a caption, R@{k}", f"text_to_image.{k}") for k in RANKS),
)
"""Heading, and what ``match`` finds in an ``Alignment``."""
_LABEL_WIDTH = 31


class Match(NamedTuple):
    """One figure of alignment."""

    value: float
    interval: Interval | None
    chance: float


def match(arm: Arm, field: str) -> Match | None:
    """A figure of ``MATCHES``, if that row has it."""
    found = arm.alignment
    if found is None:
        return None
    if field == "correlation":
        return Match(found.correlation, found.correlation_interval, found.correlation_chance)
    side, k = field.split(".")
    recalls: tuple[Recall, ...] = getattr(found, side)
    return next((Match(r.share, r.interval, r.chance) for r in recalls if r.k == int(k)), None)


def match_cell(arm: Arm, field: str) -> str:
    """The figure with its interval, and what chance gives."""
    found = match(arm, field)
    if found is None:
        return ""
    return f"{_with_interval(found.value, found.interval)}, chance {found.chance:.3f}"


def shown_matches(evaluation: Comparison) -> list[tuple[str, str]]:
    """Those that at least one row has."""
    return [
        (heading, field)
        for heading, field in MATCHES
        if any(match(arm, field) is not None for arm in evaluation.arms)
    ]


def class_cell(arm: Arm, field: str) -> str:
    """In how many images of a class (``field``) the shape judge finds it."""
    found = arm.shape_by_class.get(field)
    return "" if found is None else _with_interval(found.share, found.interval)


def class_table(evaluation: Comparison) -> list[list[str]]:
    """The shape judge class by class, header first; empty where there was nothing to judge."""
    arms = [arm for arm in evaluation.arms if arm.shape_by_class]
    if not arms:
        return []
    rows = [[name, *(class_cell(arm, name) for arm in arms)] for name in evaluation.judged_classes]
    return [["", *(LABELS[arm.name] for arm in arms)], *rows]


def shown_columns(evaluation: Comparison) -> list[tuple[str, str]]:
    """Those that at least one row has."""
    return [
        (heading, field)
        for heading, field in COLUMNS
        if any(getattr(arm, field) is not None for arm in evaluation.arms)
    ]


def cell(arm: Arm, field: str) -> str:
    """A number with its interval, as far as there are."""
    value: float | None = getattr(arm, field)
    if value is None:
        return ""
    interval: Interval | None = getattr(arm, f"{field}_interval", None)
    return _with_interval(value, interval)


def _with_interval(value: float, interval: Interval | None) -> str:
    if interval is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def plain_text(evaluation: Comparison) -> list[str]:
    """The whole comparison for a terminal of 80 columns: a paragraph for each figure."""
    figures = [(heading, field, cell) for heading, field in shown_columns(evaluation)]
    figures += [(heading, field, match_cell) for heading, field in shown_matches(evaluation)]
    classes = evaluation.judged_classes if class_table(evaluation) else ()
    figures += [(f"shape judge: {name}", name, class_cell) for name in classes]
    lines = []
    for heading, field, told in figures:
        lines.append(heading)
        lines += [
            f"  {LABELS[arm.name]:<{_LABEL_WIDTH}}{told(arm, field)}"
            for arm in evaluation.arms
            if told(arm, field)
        ]
    return lines


def markdown(evaluation: Comparison) -> str:
    """The whole comparison."""
    columns = shown_columns(evaluation)
    lines = [_line(["", *(heading for heading, _ in columns)]), "|---" * (len(columns) + 1) + "|"]
    lines += [
        _line([LABELS[arm.name], *(cell(arm, field) for _, field in columns)])
        for arm in evaluation.arms
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def remarks(evaluation: Comparison) -> list[str]:
    """What a reader of the table has to know: how it was measured, and what is not in it."""
    whose = (
        f"of {evaluation.heldout_patients} held-out patients"
        if evaluation.resampled == "patient"
        else "of nobody knows whom"
    )
    each = "" if evaluation.arm("generator") is None else " each"
    told = [
        f"{evaluation.n} images{each} against {evaluation.n_heldout} tiles {whose}; encoder "
        f"{evaluation.encoder} ({evaluation.encoder_hash[:12]}); in brackets 90 % intervals"
    ]
    if evaluation.drawn_by:
        told.append(f"images that were drawn for this: {evaluation.drawn_by}")
    if evaluation.resampled == "image":
        told.append(
            "nobody says whose the real images are: intervals are by image, and too narrow where "
            "several are of one patient (a column patient mends it)"
        )
    if evaluation.repeated_tiles or evaluation.repeated_images:
        told.append(
            f"{evaluation.repeated_tiles} real images and {evaluation.repeated_images} of those "
            "measured have the pixels of another one; those that are alike count as one"
        )
    if evaluation.judged_classes:
        told.append(
            f"judges learnt {len(evaluation.judged_classes)} classes from "
            f"{evaluation.training_tiles} training tiles; chance is "
            f"{1 / len(evaluation.judged_classes):.2f}"
        )
    if evaluation.gate is not None:
        told.append(gate_text(evaluation.gate))
    if evaluation.memorisation is not None:
        copies = evaluation.memorisation
        share = _with_interval(copies.share_nearer_members, copies.interval)
        told.append(
            f"images nearer to training tiles than to held-out ones: {share}, p "
            f"{copies.p_value:.2g}; 0.5 without copies"
        )
    return [*told, *(f"not measured: {reason}" for reason in evaluation.not_measured)]


def gate_text(gate: Gate) -> str:
    """What the examiner of drift says of real tiles."""
    low, high = gate.difference_interval
    return (
        f"the examiner marks real tiles {gate.own:.3f} under their own captions and "
        f"{gate.wrong:.3f} under others' (difference {low:.3f} to {high:.3f}, 99 %)"
        + ("" if gate.is_passed else ": it cannot tell them apart, so there is no drift to tell")
    )
