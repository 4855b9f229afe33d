"""A sweep: one scenario under several arms and seeds, and what differs between them. One TOML file.

::

    scenario = "real-tiles"           # a shipped one, or a file beside this one
    seeds = [5, 6, 7]
    seeded = ["study"]                # and tiles and evaluation keep the scenario's; else all three
    repeatable = true                 # private noise is drawn from the seed, too: NOT PRIVATE
    baseline = "epsilon 8"            # what the others are compared with, seed by seed

    [vary]                            # an arm for each combination, beside those below
    "privacy.target_epsilon" = [1.0, 8.0]
    "aggregation.rule" = ["alignment_regularized", "by_patients"]

    [[arm]]
    name = "epsilon 8"

    [[arm]]
    name = "plain averaging"
    aggregation = { rule = "by_patients" }
    stage = { learning_rate = 3.0 }   # of every stage

    [[arm]]
    name = "not private"
    private = false

    [[arm]]
    name = "one stage"
    stages = [{ name = "pretraining", rounds = 14, local_steps = 1, learning_rate = 0.1 }]

A seed decides how tiles are dealt (``tiles``), the public draws of training (``study``), and the
noise that samples start from (``evaluation``); with ``repeatable`` the private noise, too. All arms
of a seed therefore have the same patients, held out and not, and differences are paired. Where
``seeded`` leaves out ``tiles``, and where hospitals are drawn, which have patients of their own
seeds, every seed has the same patients: intervals then leave out that others might come.
"""

import itertools
import re
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crafts_core.fields import describe_first_error
from crafts_simulations.errors import ScenarioError
from crafts_simulations.scenario import Scenario, load_scenario, parse_scenario, shipped_scenarios

Run = tuple[str, int]
"""An arm's name and a seed."""
Values = dict[str, Any]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Seeded = Literal["tiles", "study", "evaluation"]
"""A section that has a seed."""
_LISTS = ("stage", "site")
"""Sections that a scenario has several of; an arm changes all of them alike."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SweepArm(_Section):
    """What one arm changes in the scenario, section by section."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    private: bool = True
    """False trains without noise, as ``crafts-sim run --no-privacy`` does."""
    scenario: Values = {}
    evaluation: Values = {}
    site: Values = {}
    tiles: Values = {}
    policy: Values = {}
    study: Values = {}
    adapter: Values = {}
    stages: list[Values] = []
    """Instead of the scenario's; ``stage`` changes these then."""
    stage: Values = {}
    privacy: Values = {}
    aggregation: Values = {}
    transport: Values = {}

    @property
    def folder(self) -> str:
        """The name as part of a path."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.") or "arm"

    @property
    def changes(self) -> dict[str, Values]:
        """Sections that it changes."""
        return {
            name: value
            for name, value in self.model_dump(exclude={"name", "private", "stages"}).items()
            if value
        }


class Sweep(_Section):
    """A whole sweep. ``load_sweep`` is the way in from a file."""

    scenario: Annotated[str, Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    seeded: Annotated[tuple[Seeded, ...], Field(min_length=1)] = get_args(Seeded)
    """Sections whose seed is the run's; the others keep the scenario's."""
    repeatable: bool = False
    """Whether a seed repeats the private noise, too, as ``crafts-sim run --repeatable`` does."""
    baseline: str | None = None
    """The arm that others are compared with; the first if absent."""
    arm: tuple[SweepArm, ...] = ()
    vary: dict[
        Annotated[str, Field(pattern=r"^[a-z]+\.[a-z_]+$")],
        Annotated[list[Any], Field(min_length=1)],
    ] = {}

    @model_validator(mode="after")
    def _arms_are_told_apart(self) -> Self:
        if not self.arms:
            raise ValueError("expected at least one [[arm]], or [vary]")
        told: dict[str, list[str]] = {
            "name": [arm.name for arm in self.arms],
            "folder": [arm.folder for arm in self.arms],
            "seed": [str(seed) for seed in self.seeds],
        }
        for what, names in told.items():
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"the {what} {min(twice)!r} is there twice")
        for arm in self.arms:
            fixed = [
                section for section in get_args(Seeded) if "seed" in arm.changes.get(section, {})
            ]
            if fixed:
                raise ValueError(
                    f"arm {arm.name!r} changes {fixed[0]}.seed: its runs would not be paired "
                    "with those of other arms; leave it to seeds and the scenario"
                )
        if self.baseline is not None and self.baseline not in {arm.name for arm in self.arms}:
            raise ValueError(f"baseline: no arm has the name {self.baseline!r}")
        return self

    @property
    def arms(self) -> tuple[SweepArm, ...]:
        """Those that are written out, then every combination of ``vary``."""
        if not self.vary:
            return self.arm
        combinations = itertools.product(*self.vary.values())
        return (*self.arm, *(self._varied(values) for values in combinations))

    @property
    def compared_with(self) -> SweepArm:
        """The arm that differences are taken to."""
        return next((arm for arm in self.arms if arm.name == self.baseline), self.arms[0])

    def chosen(self, arms: Collection[str], seeds: Collection[int]) -> set[Run]:
        """The runs of these arms and seeds; of all where none is named.

        Raises:
            ScenarioError: it has no such arm or seed.
        """
        names = [arm.name for arm in self.arms]
        for what, wanted, has in (("arm", arms, names), ("seed", seeds, self.seeds)):
            unknown = [each for each in wanted if each not in has]
            if unknown:
                told = ", ".join(map(str, has))
                raise ScenarioError(f"the sweep has no {what} {unknown[0]!r}; it has: {told}")
        return set(itertools.product(arms or names, seeds or self.seeds))

    def _varied(self, values: tuple[Any, ...]) -> SweepArm:
        changes: dict[str, Values] = {}
        said = []
        for key, value in zip(self.vary, values, strict=True):
            section, _, name = key.partition(".")
            changes.setdefault(section, {})[name] = value
            said.append(f"{name.replace('_', ' ')} {value}")
        return SweepArm.model_validate({"name": ", ".join(said), **changes})


def scenario_of(sweep: Sweep, base: Scenario, arm: SweepArm, seed: int) -> Scenario:
    """The scenario of one arm of a sweep under one seed.

    Raises:
        ScenarioError: with the arm and the first key that is wrong.
    """
    values = base.model_dump(mode="json")
    if arm.stages:
        values["stage"] = arm.stages
    changed = parse_scenario(values, f"of arm {arm.name!r}").changed(
        private=arm.private, repeatable=sweep.repeatable
    )
    values = changed.model_dump(mode="json")
    seeds = {name: {"seed": seed} for name in sweep.seeded if values.get(name) is not None}
    for changes in (seeds, arm.changes):
        for section, entries in changes.items():
            if values.get(section) is None:
                raise ScenarioError(f"arm {arm.name!r}: the scenario has no section {section}")
            for part in values[section] if section in _LISTS else [values[section]]:
                part |= entries
    return parse_scenario(values, f"of arm {arm.name!r}")


def load_sweep(path: Path) -> tuple[Sweep, dict[Run, Scenario]]:
    """A sweep, and the scenario of each arm's name and seed: all checked before anything runs.

    Raises:
        ScenarioError: the file cannot be read, is not TOML, or a key is wrong.
    """
    try:
        sweep = Sweep.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ScenarioError(f"cannot read sweep {path}: {error}") from error
    except ValidationError as error:
        raise ScenarioError(f"sweep {path}: {describe_first_error(error)}") from error
    shipped = sweep.scenario in shipped_scenarios()
    base = load_scenario(sweep.scenario if shipped else str(path.parent / sweep.scenario))
    runs = {
        (arm.name, seed): scenario_of(sweep, base, arm, seed)
        for seed in sweep.seeds
        for arm in sweep.arms
    }
    return sweep, runs
