"""What a federation did, what it cost and what it gave: ``report.json`` and ``report.html``.

The JSON is the record (its schema is docs/report.md); the page is drawn from it alone plus the
sample images, and loads nothing from anywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from crafts_core import charts
from crafts_core.delta_text import delta_text, delta_times_patients
from crafts_core.durable import write_file
from crafts_core.evaluation.baselines import ArmName
from crafts_core.evaluation.figures import Evaluation
from crafts_core.evaluation.leakage import Leakage
from crafts_core.evaluation.steering import LOOKED, Steering
from crafts_core.evaluation.table import LABELS, cell, class_table, remarks, shown_columns
from crafts_core.pages import page_environment, uri_of_png
from crafts_core.plan import Plan
from crafts_server.receipts import RoundReceipt

_BARS: tuple[ArmName, ...] = (
    "foundation", "recoloured", "recoloured_by_caption", "retrieved", "public_steps", "generator",
    "reconstruction", "real",
)  # fmt: skip
"""From top to bottom: what is hoped to be nearer comes lower."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StudyReport(_Record):
    """What was asked for."""

    name: str
    title: str
    plan_hash: str
    foundation_hash: str
    mechanism: Literal["patient_dp", "none"]
    repeatable: bool
    """Whether a seed repeats the noise: then nothing here was private, whatever epsilon says."""
    target_epsilon: float | None
    delta: float | None
    max_grad_norm: float
    sample_rate: float
    aggregation: str
    weighed_by: str
    """What decided how much a hospital counted, in words."""
    adapter_parameters: Annotated[int, Field(ge=1)]


class RoundReport(_Record):
    """One round, from the coordinator's receipt."""

    round: int
    stage: str
    factor: str
    margin_before: float
    margin_after: float
    weights: dict[str, float]
    gains: dict[str, float | None]
    refused: dict[str, str]
    step: float
    """Share of the step that was taken: 1 whole, 0 rejected by the public probe."""
    step_norm: float
    trust_norm: float
    bytes_down: int
    bytes_up: int
    seconds: float


class SiteReport(_Record):
    """One hospital: what its patients were promised and what was spent."""

    name: str
    declared_patients: int
    tiles: int
    epsilon: float | None
    """Of all events in the ledger, by PLD accounting; None where training was not private."""
    epsilon_second_opinion: float | None
    delta: float | None
    events: int
    """Rounds charged in the ledger."""
    steps: int
    noise_multiplier: float


class Report(_Record):
    """``report.json``."""

    schema_version: Literal[2] = 2
    created: datetime
    seconds: float
    versions: dict[str, str]
    study: StudyReport
    rounds: tuple[RoundReport, ...]
    sites: tuple[SiteReport, ...]
    evaluation: Evaluation
    leakage: Leakage | None = None
    steering: tuple[Steering, ...] = ()
    """How far the generator follows each condition that a control stage trained."""


def study_report(
    title: str, plan: Plan, adapter_parameters: int, *, repeatable: bool = False
) -> StudyReport:
    """The public facts of a plan, and whether its noise was seeded."""
    return StudyReport(
        name=plan.study.name,
        title=title,
        plan_hash=plan.hash,
        foundation_hash=plan.study.foundation,
        mechanism=plan.privacy.mechanism,
        repeatable=repeatable,
        target_epsilon=plan.privacy.target_epsilon,
        delta=plan.privacy.delta,
        max_grad_norm=plan.privacy.max_grad_norm,
        sample_rate=plan.privacy.sample_rate,
        aggregation=plan.aggregation.rule,
        weighed_by=weighed_by(plan),
        adapter_parameters=adapter_parameters,
    )


def weighed_by(plan: Plan) -> str:
    """How the plan's sites count. Alignment is measured on single updates, which sums hide."""
    rule = plan.aggregation.rule
    if plan.privacy.trust == "distributed" or rule == "by_patients":
        return "patients"
    if rule == "uniform":
        return "equal parts"
    if rule != "alignment_regularized":
        return f"rule {rule}"
    if plan.aggregation.secure_aggregation:
        return "declared noise"
    return "declared noise and alignment"


def round_report(receipt: RoundReceipt) -> RoundReport:
    """One receipt, for readers."""
    return RoundReport(
        round=receipt.round,
        stage=receipt.stage,
        factor=receipt.factor,
        margin_before=receipt.margin_before,
        margin_after=receipt.margin_after,
        weights={site.site: site.weight for site in receipt.sites},
        gains={site.site: site.gain for site in receipt.sites},
        refused={refusal.site: refusal.reason for refusal in receipt.refused},
        step=receipt.step_scale,
        step_norm=receipt.step_norm,
        trust_norm=receipt.trust_norm,
        bytes_down=receipt.bytes_down,
        bytes_up=receipt.bytes_up,
        seconds=receipt.seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePair:
    """A prompt and what both generators drew for it, as PNGs that say where they come from."""

    label: str
    prompt: str
    before: bytes
    after: bytes


def write_report(
    report: Report, pairs: Sequence[SamplePair], out: Path, steered: Sequence[bytes] = ()
) -> None:
    """Write ``report.json`` and ``report.html`` into ``out``; a torn file never appears."""
    page = render_html(report, pairs, steered)
    for name, text in (
        ("report.json", report.model_dump_json(indent=2) + "\n"),
        ("report.html", page),
    ):
        write_file(out / name, text)


def render_html(report: Report, pairs: Sequence[SamplePair], steered: Sequence[bytes] = ()) -> str:
    """The page as one string: inline style, SVG and images; no script, no external resource.

    Args:
        report: What it tells.
        pairs: What was drawn before and after, for each label.
        steered: For each condition a PNG of what follows it, as ``steered_sheet`` draws it.
    """
    environment = page_environment("crafts_simulations")
    environment.filters |= {"delta": delta_text, "times": delta_times_patients}
    return environment.get_template("report.html.j2").render(
        report=report,
        evaluation=report.evaluation,
        columns=shown_columns(report.evaluation),
        cell=cell,
        classes=class_table(report.evaluation),
        labels=LABELS,
        remarks=remarks(report.evaluation),
        headline=headline(report.evaluation),
        charts=charts_of(report),
        most_named=charts.MOST_NAMED,
        mean_weights=mean_weights(report),
        looked=LOOKED,
        steered=[uri_of_png(png) for png in steered],
        samples=[
            {
                "label": pair.label,
                "prompt": pair.prompt,
                "before": uri_of_png(pair.before),
                "after": uri_of_png(pair.after),
            }
            for pair in pairs
        ],
    )


def headline(evaluation: Evaluation) -> str:
    """The result in one sentence: colour and structure apart, better or worse."""
    before, after = (evaluation.arm(name) for name in ("foundation", "generator"))
    assert before is not None
    assert after is not None
    return (
        f"Against held-out tissue the shared generator's colours are "
        f"{_compared(before.colour, after.colour)}, its structure is "
        f"{_compared(before.structure, after.structure)}."
    )


def _compared(before: float, after: float) -> str:
    """One distance beside the foundation's. Unbiased distances may be 0 or below."""
    numbers = f"distance {after:.3f}, foundation {before:.3f}"
    if after >= before:
        return f"no closer than the public foundation's ({numbers})"
    if after < before / 10:
        return f"over ten times closer than the public foundation's ({numbers})"
    return f"{before / after:.1f} times closer than the public foundation's ({numbers})"


def mean_weights(report: Report) -> Mapping[str, float]:
    """How much each hospital counted in the mean round that asked hospitals."""
    asked = [entry.weights for entry in report.rounds if entry.weights]
    return {
        site.name: sum(weights.get(site.name, 0.0) for weights in asked) / max(len(asked), 1)
        for site in report.sites
    }


def charts_of(report: Report) -> Mapping[str, Markup]:
    """The page's pictures as SVG."""
    arms = sorted(report.evaluation.arms, key=lambda arm: _BARS.index(arm.name))
    names = [site.name for site in report.sites]
    spent = [(site.name, site.epsilon) for site in report.sites if site.epsilon is not None]
    return {
        "colour": charts.bars(
            [(LABELS[arm.name], arm.colour, arm.colour_interval) for arm in arms],
            unit="colour: squared MMD to held-out tiles (smaller is closer)",
        ),
        "structure": charts.bars(
            [(LABELS[arm.name], arm.structure, arm.structure_interval) for arm in arms],
            unit="structure: squared MMD after matching colours (smaller is closer)",
        ),
        "margin": charts.line(
            [(report.rounds[0].round - 1, report.rounds[0].margin_before)]
            + [(entry.round, entry.margin_after) for entry in report.rounds],
            unit="alignment margin on the public probe, by round",
        ),
        "weights": charts.stacked(
            [
                (entry.round, [entry.weights.get(name, 0.0) for name in names])
                for entry in report.rounds
            ],
            names,
            unit="weight of each site, by round",
        ),
        "epsilon": charts.bars(
            [(name, value, None) for name, value in spent],
            unit="epsilon spent",
            mark=report.study.target_epsilon,
        )
        if spent
        else Markup(),
    }
