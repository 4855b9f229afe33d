"""An evaluation as a table for people: the same rows and columns wherever it is shown."""

from collections.abc import Sequence

from crafts_core.evaluation.baselines import ArmName
from crafts_core.evaluation.examiner import Gate
from crafts_core.evaluation.figures import Arm, Evaluation
from crafts_core.evaluation.resampling import Interval

LABELS: dict[ArmName, str] = {
    "real": "real tiles of other patients",
    "reconstruction": "real tiles through the VAE",
    "foundation": "public foundation",
    "recoloured": "foundation, recoloured",
    "recoloured_by_caption": "recoloured by caption",
    "generator": "shared generator",
}
COLUMNS: tuple[tuple[str, str], ...] = (
    ("colour distance", "colour"),
    ("structure distance", "structure"),
    ("distance", "mmd2"),
    ("Fréchet distance", "frechet"),
    ("shape judge", "shape_agreement"),
    ("colour judge", "colour_agreement"),
    ("drift D", "drift"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("density", "density"),
    ("coverage", "coverage"),
)
"""Heading and field of ``Arm``."""


def shown_columns(evaluation: Evaluation) -> list[tuple[str, str]]:
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
    if interval is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def markdown(evaluation: Evaluation) -> str:
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


def remarks(evaluation: Evaluation) -> list[str]:
    """What a reader of the table has to know: how it was measured, and what is not in it."""
    told = [
        f"{evaluation.n} images each against {evaluation.n_heldout} tiles of "
        f"{evaluation.heldout_patients} held-out patients; encoder {evaluation.encoder} "
        f"({evaluation.encoder_hash[:12]}); in brackets 90 % intervals"
    ]
    if evaluation.judged_classes:
        told.append(
            f"judges learnt {len(evaluation.judged_classes)} classes from "
            f"{evaluation.training_tiles} training tiles; chance is "
            f"{1 / len(evaluation.judged_classes):.2f}"
        )
    if evaluation.gate is not None:
        told.append(gate_text(evaluation.gate))
    return [*told, *(f"not measured: {reason}" for reason in evaluation.not_measured)]


def gate_text(gate: Gate) -> str:
    """What the examiner of drift says of real tiles."""
    low, high = gate.difference_interval
    return (
        f"the examiner marks real tiles {gate.own:.3f} under their own captions and "
        f"{gate.wrong:.3f} under others' (difference {low:.3f} to {high:.3f}, 99 %)"
        + ("" if gate.is_passed else ": it cannot tell them apart, so there is no drift to tell")
    )
