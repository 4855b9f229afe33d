"""What a sweep says: every figure of every run, and each arm's difference to the baseline.

Differences are paired by seed. Their intervals hold together: with 90 % confidence *all* arms'
differences of a figure lie in theirs (Student's t, Bonferroni over the arms), because whoever looks
at ten arms finds one that is better by chance.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from crafts_core.evaluation.baselines import ArmName
from crafts_core.evaluation.encoder import require_one_encoder
from crafts_core.evaluation.figures import Arm, Evaluation
from crafts_core.evaluation.table import COLUMNS, LABELS, remarks
from crafts_simulations.report import Report
from crafts_simulations.sweep import Sweep

FIELDS: tuple[str, ...] = (
    "structure", "colour", "mmd2", "shape_agreement", "colour_agreement", "drift", "recall",
    "coverage",
)  # fmt: skip
"""Figures of ``figures.Arm`` that are compared; structure is the one to rank by."""
HEADINGS = {field: heading for heading, field in COLUMNS}
_BESIDE: tuple[ArmName, ...] = (
    "real", "reconstruction", "foundation", "recoloured", "recoloured_by_caption", "retrieved",
    "public_steps",
)  # fmt: skip
_LEVEL = 0.9


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Difference(_Record):
    """An arm minus the baseline, over seeds."""

    mean: float
    low: float | None
    """None where one seed says nothing about chance."""
    high: float | None

    @classmethod
    def of(cls, differences: Sequence[float], *, num_arms: int) -> Self:
        """Mean and interval; ``num_arms`` are compared at once."""
        values_S = np.asarray(differences, dtype=np.float64)
        mean = float(values_S.mean())
        if len(values_S) < 2:
            return cls(mean=mean, low=None, high=None)
        error = float(values_S.std(ddof=1)) / len(values_S) ** 0.5
        reach = error * float(stats.t.ppf(1 - (1 - _LEVEL) / (2 * num_arms), len(values_S) - 1))
        return cls(mean=mean, low=mean - reach, high=mean + reach)

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def is_away_from_zero(self) -> bool:
        """Whether its interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    @property
    def text(self) -> str:
        """For people."""
        within = "" if self.interval is None else " ({:+.4f} to {:+.4f})".format(*self.interval)
        return f"{self.mean:+.4f}{within}"


class Failure(_Record):
    """A run that gave no report, and why."""

    arm: str
    seed: int
    reason: str

    @property
    def text(self) -> str:
        """For people."""
        return f"arm {self.arm!r}, seed {self.seed}: {self.reason}"


class SweepRow(_Record):
    """One arm, or one of the rows that need no training."""

    name: str
    epsilon: float | None
    """The largest that any site spent in any run; None where nothing was private."""
    seeds: tuple[int, ...]
    """Those that finished."""
    values: dict[str, tuple[float, ...]]
    """A figure's value in each of them; figures that a run did not have are left out."""
    differences: dict[str, Difference]

    def mean(self, field: str) -> float | None:
        """Over seeds; None where it was not measured."""
        return float(np.mean(self.values[field])) if field in self.values else None


class SweepReport(_Record):
    """``sweep.json``."""

    scenario: str
    seeds: tuple[int, ...]
    baseline: str
    arms: tuple[SweepRow, ...]
    beside: tuple[SweepRow, ...]
    """Rows without training: floor, bound, foundation, its colour maps; of the baseline's runs, or
    where none of these finished of the first arm's."""
    remarks: tuple[str, ...]
    failures: tuple[Failure, ...] = ()
    """Runs that failed. An arm of which no run finished is in no row."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Figures that some arm has."""
        return tuple(field for field in FIELDS if any(field in row.values for row in self.arms))

    @property
    def has_baseline(self) -> bool:
        """Whether a run of it finished."""
        return any(row.name == self.baseline for row in self.arms)

    @property
    def tells_of_chance(self) -> bool:
        """Whether some difference has an interval: two seeds of an arm and of the baseline."""
        differences = [each for row in self.arms for each in row.differences.values()]
        return any(each.interval is not None for each in differences)

    def label(self, row: SweepRow) -> str:
        """A row's name; where runs of it are missing, with the seeds that it has."""
        if row.seeds == self.seeds:
            return row.name
        told = ", ".join(map(str, row.seeds))
        return f"{row.name} (only seed{'s' if row.seeds[1:] else ''} {told})"


BySeed = Mapping[int, Evaluation]
Values = dict[str, dict[int, float]]
"""A figure's values by seed."""


def compare(
    sweep: Sweep, reports: Mapping[tuple[str, int], Report], failures: Sequence[Failure] = ()
) -> SweepReport:
    """Set the runs of a sweep side by side, each with the baseline's of its seed.

    Args:
        sweep: Arms and seeds.
        reports: Of runs that finished, one at least, by the arm's name and the seed.
        failures: Runs that failed.

    Raises:
        EncoderError: they were measured with several encoders.
    """
    require_one_encoder([report.evaluation for report in reports.values()])
    baseline = sweep.compared_with.name
    evaluations: dict[str, dict[int, Evaluation]] = {}
    spent: dict[str, list[float]] = {}
    for arm, seed in ((arm.name, seed) for arm in sweep.arms for seed in sweep.seeds):
        report = reports.get((arm, seed))
        if report is not None:
            evaluations.setdefault(arm, {})[seed] = report.evaluation
            epsilons = [site.epsilon for site in report.sites if site.epsilon is not None]
            spent.setdefault(arm, []).extend(epsilons)
    values = {name: _values(found, "generator") for name, found in evaluations.items()}
    arms = [
        SweepRow(
            name=name,
            epsilon=max(spent[name], default=None),
            seeds=tuple(evaluations[name]),
            values=_without_seeds(found),
            differences={}
            if name == baseline
            else _differences(found, values.get(baseline, {}), num_arms=len(values) - 1),
        )
        for name, found in values.items()
    ]
    beside = evaluations.get(baseline) or next(iter(evaluations.values()))
    return SweepReport(
        scenario=sweep.scenario,
        seeds=sweep.seeds,
        baseline=baseline,
        arms=tuple(arms),
        beside=tuple(_beside(beside)),
        remarks=tuple(remarks(next(iter(beside.values())))),
        failures=tuple(failures),
    )


def _values(evaluations: BySeed, name: ArmName) -> Values:
    """Figures that this row has in every seed."""
    rows = {seed: row for seed, each in evaluations.items() if (row := each.arm(name)) is not None}
    found = {field: {seed: _figure(row, field) for seed, row in rows.items()} for field in FIELDS}
    return {
        field: {seed: value for seed, value in each.items() if value is not None}
        for field, each in found.items()
        if each and None not in each.values()
    }


def _without_seeds(values: Values) -> dict[str, tuple[float, ...]]:
    return {field: tuple(each.values()) for field, each in values.items()}


def _figure(row: Arm, field: str) -> float | None:
    value: float | None = getattr(row, field)
    return value


def _differences(arm: Values, baseline: Values, *, num_arms: int) -> dict[str, Difference]:
    """Over the seeds that both have."""
    pairs = {
        field: [
            value - baseline[field][seed]
            for seed, value in arm[field].items()
            if seed in baseline[field]
        ]
        for field in FIELDS
        if field in arm and field in baseline
    }
    return {field: Difference.of(each, num_arms=num_arms) for field, each in pairs.items() if each}


def _beside(evaluations: BySeed) -> list[SweepRow]:
    rows = [(LABELS[name], _without_seeds(_values(evaluations, name))) for name in _BESIDE]
    return [
        SweepRow(name=label, epsilon=None, seeds=tuple(evaluations), values=values, differences={})
        for label, values in rows
        if values
    ]


def markdown(report: SweepReport) -> str:
    """Means over seeds, then differences with their intervals."""
    fields = report.fields
    lines = [_line(["", *(HEADINGS[field] for field in fields), "epsilon"])]
    lines.append("|---" * (len(fields) + 2) + "|")
    for row in (*report.beside, *report.arms):
        cells = [_number(row.mean(field)) for field in fields]
        lines.append(_line([report.label(row), *cells, _number(row.epsilon, digits=2)]))
    compared = [row for row in report.arms if row.differences]
    if compared:
        lines += ["", _line([f"minus {report.baseline}", *(HEADINGS[field] for field in fields)])]
        lines.append("|---" * (len(fields) + 1) + "|")
    for row in compared:
        told = [row.differences.get(field) for field in fields]
        cells = ["" if each is None else each.text for each in told]
        bold = [each is not None and each.is_away_from_zero for each in told]
        marked = [
            f"**{cell}**" if is_bold else cell for cell, is_bold in zip(cells, bold, strict=True)
        ]
        lines.append(_line([report.label(row), *marked]))
    return "\n".join(lines)


def _number(value: float | None, *, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
