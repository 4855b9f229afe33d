"""A scenario: which hospitals, and the plan that they train by. One TOML file.

``[scenario]`` and ``[evaluation]`` are about the simulation; ``[[site]]`` describes synthetic
hospitals, ``[hospitals]`` what many are drawn from, or ``[tiles]`` how a folder of real tiles
becomes hospitals; every other section is the plan's own, without the foundation's hash.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from crafts_core.evaluation.evaluate import EvaluationConfig
from crafts_core.fields import Name, describe_first_error
from crafts_core.plan import Plan, PlanError
from crafts_core.plan_sections import (
    AdapterConfig,
    AggregationConfig,
    PrivacyConfig,
    StageConfig,
    TransportConfig,
)
from crafts_core.procedural import random_stain
from crafts_server.aggregation import rule_of
from crafts_simulations.errors import ScenarioError
from crafts_simulations.hospital import Holdings, HospitalConfig
from crafts_simulations.hospitals_draw import HospitalsDraw

_HELDOUT_SEED_SHIFT = 1_000_003


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScenarioInfo(_Section):
    """What it is about."""

    title: Annotated[str, Field(min_length=1, max_length=200)]
    foundation: Annotated[str, Field(min_length=1)] = "embedded"
    """``embedded``, or a folder, relative to where the command runs."""
    participants: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """The sites that train; all of them if absent. The others only exist."""
    max_tiles_per_slide: Annotated[int, Field(ge=1)] | None = None
    repeatable: bool = False
    """Whether the seed repeats everything, noise included. Such a run is NOT PRIVATE."""
    holdings: Holdings = "slides"
    """What synthetic hospitals have: slides, or ready tiles with numbered nuclei."""


class SyntheticSite(_Section):
    """A hospital whose patients and slides are drawn."""

    name: Name
    num_patients: Annotated[int, Field(ge=1, le=100_000)]
    declared_patients: Annotated[int, Field(ge=1)]
    """What the hospital says about its size: rounded and public."""
    heldout_patients: Annotated[int, Field(ge=1)]
    """Further patients of the same hospital, never given to it: the test set."""
    slides_per_patient: Annotated[int, Field(ge=1)] = 1
    """Or ready tiles, where hospitals hold these; ``slide_px`` is their side then."""
    slide_px: Annotated[int, Field(ge=64, le=65_536)]
    mpp: Annotated[float, Field(gt=0, le=10)]
    cancer_mix: dict[str, Annotated[float, Field(ge=0)]]
    """TCGA code, or ``normal <organ>``, to its weight."""
    stain_seed: Annotated[int, Field(ge=0)]
    """Which laboratory and scanner, drawn from ``procedural.random_stain``."""
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    policy: dict[str, Any] = {}
    """Limits that differ from the ones a willing site would set."""

    def hospital(self, holdings: Holdings = "slides") -> HospitalConfig:
        """Its training patients.

        Raises:
            ScenarioError: a value is impossible.
        """
        return self._config(self.name, self.num_patients, self.seed, holdings)

    def heldout_hospital(self, holdings: Holdings = "slides") -> HospitalConfig:
        """Its other patients: same laboratory, same case mix."""
        seed = self.seed + _HELDOUT_SEED_SHIFT
        return self._config(f"{self.name}-heldout", self.heldout_patients, seed, holdings)

    def _config(
        self, name: str, num_patients: int, seed: int, holdings: Holdings
    ) -> HospitalConfig:
        try:
            return HospitalConfig(
                name=name,
                num_patients=num_patients,
                slides_per_patient=self.slides_per_patient,
                slide_px=self.slide_px,
                mpp=self.mpp,
                cancer_mix=self.cancer_mix,
                stain=random_stain(np.random.default_rng(self.stain_seed)),
                seed=seed,
                holdings=holdings,
            )
        except ValueError as error:
            raise ScenarioError(f"site {self.name}: {error}") from error


PatientCount = Annotated[int, Field(ge=2, le=100_000)]


class TilesSplit(_Section):
    """How a folder of real tiles is dealt to hospitals, patient by patient."""

    num_sites: Annotated[int, Field(ge=1, le=100)]
    alpha: Annotated[float, Field(gt=0)]
    """Dirichlet concentration of each class over sites: small is unequal, large is even."""
    patients: tuple[PatientCount, PatientCount] | None = None
    """Of the smallest site and of the largest; the others lie between, each by the same factor
    above the one before. Unnamed, all patients are dealt, and sizes follow from ``alpha``."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Part of each class's patients that no site gets: the test set."""
    source_mpp: Annotated[float, Field(gt=0, le=10)] | None = None
    """Microns per pixel of the files: their centres are cut at the foundation's resolution.

    Unknown, each file is resampled whole.
    """
    seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _sizes_are_in_order(self) -> Self:
        if self.patients is not None and self.patients[0] > self.patients[1]:
            raise ValueError("patients: name the smallest site first, then the largest")
        return self


class ScenarioStudy(_Section):
    """The plan's study, before the foundation is known."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    captions: tuple[str, ...] = ()
    """As in a plan."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A scenario that names no captions has the hash that it always had."""
        values: dict[str, Any] = dump(self)
        return {key: value for key, value in values.items() if key != "captions" or value}


class Scenario(_Section):
    """A whole scenario. ``load_scenario`` is the way in from a file."""

    scenario: ScenarioInfo
    evaluation: EvaluationConfig = EvaluationConfig()
    site: tuple[SyntheticSite, ...] = ()
    tiles: TilesSplit | None = None
    policy: dict[str, Any] = {}
    """Limits of every site that differ from the ones a willing site would set."""
    study: ScenarioStudy
    adapter: AdapterConfig
    stage: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    privacy: PrivacyConfig
    aggregation: AggregationConfig
    transport: TransportConfig = TransportConfig()

    @model_validator(mode="before")
    @classmethod
    def _write_out_hospitals(cls, values: Any) -> Any:
        """What is drawn is fixed here, so that the rest knows sites alone."""
        if not isinstance(values, dict) or "hospitals" not in values:
            return values
        if "site" in values:
            raise ValueError("expected [hospitals] or [[site]] sections, not both")
        others = {name: value for name, value in values.items() if name != "hospitals"}
        return others | {"site": HospitalsDraw.model_validate(values["hospitals"]).sites()}

    @model_validator(mode="after")
    def _sites_are_consistent(self) -> Self:
        if bool(self.site) == (self.tiles is not None):
            raise ValueError("expected either [[site]] sections, [hospitals] or [tiles]")
        if len(set(self.site_names)) < len(self.site_names):
            raise ValueError("two sites have the same name")
        unknown = set(self.participants) - set(self.site_names)
        if unknown:
            raise ValueError(f"participants names {sorted(unknown)[0]}, which is no site")
        if self.aggregation.min_sites > len(self.participants):
            raise ValueError(
                f"aggregation.min_sites is {self.aggregation.min_sites}, but only "
                f"{len(self.participants)} sites take part"
            )
        return self

    @property
    def site_names(self) -> tuple[str, ...]:
        if self.tiles is not None:
            return tuple(f"site-{number}" for number in range(1, self.tiles.num_sites + 1))
        return tuple(site.name for site in self.site)

    @property
    def participants(self) -> tuple[str, ...]:
        """The sites that train."""
        return self.scenario.participants or self.site_names

    @property
    def hash(self) -> str:
        """SHA-256 of everything in it."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def needs_pool(self) -> bool:
        """Whether it has a stage that picks of public tiles."""
        return any(stage.is_retrieval for stage in self.stage)

    def plan(self, foundation_hash: str, pool_hash: str | None = None) -> Plan:
        """The plan that the coordinator signs."""
        sections = ("adapter", "stage", "privacy", "aggregation", "transport")
        values = self.model_dump(mode="json", include=set(sections))
        study = {**self.study.model_dump(), "foundation": foundation_hash, "pool": pool_hash}
        return Plan.parse(values | {"study": study})

    def changed(
        self,
        *,
        epsilon: float | None = None,
        private: bool = True,
        num_sites: int | None = None,
        repeatable: bool = False,
    ) -> "Scenario":
        """The same scenario with what the command line overrides.

        Raises:
            ScenarioError: there are not that many sites, or epsilon is not possible.
        """
        values = self.model_dump(mode="json")
        if not private:
            values["privacy"] |= {"mechanism": "none", "target_epsilon": None, "delta": None}
            _without_sums(values)
            for stage in values["stage"]:
                stage.pop("noise_multiplier", None)
        elif epsilon is not None:
            if self.privacy.mechanism == "none":
                raise ScenarioError("this scenario trains without privacy; epsilon has no meaning")
            values["privacy"]["target_epsilon"] = epsilon
        if num_sites is not None:
            self._change_sites(values, num_sites)
        if repeatable:
            values["scenario"]["repeatable"] = True
        return parse_scenario(values, "after the command line's changes")

    def _change_sites(self, values: dict[str, Any], num_sites: int) -> None:
        if self.tiles is not None:
            values["tiles"]["num_sites"] = num_sites
        elif num_sites > len(self.site):
            raise ScenarioError(f"the scenario has {len(self.site)} sites, not {num_sites}")
        else:
            values["site"] = values["site"][:num_sites]
        min_sites = min(self.aggregation.min_sites, num_sites)
        values["aggregation"]["min_sites"] = min_sites


def _without_sums(values: dict[str, Any]) -> None:
    """Sums hide shares of noise; without noise each site answers for itself."""
    for key in ("colluding_sites", "sum_grid_bits", "spare_steps"):
        values["privacy"].pop(key, None)
    values["privacy"]["trust"] = "site"
    for key in ("masked_deadline_s", "max_attempts", "diagnose_after"):
        values["aggregation"].pop(key, None)
    values["aggregation"]["secure_aggregation"] = False


def parse_scenario(values: Mapping[str, Any], source: str) -> Scenario:
    """Check values that were read from ``source``.

    Raises:
        ScenarioError: with the first offending key.
    """
    try:
        scenario = Scenario.model_validate(values)
        rule_of(scenario.aggregation)
    except ValidationError as error:
        raise ScenarioError(f"scenario {source}: {describe_first_error(error)}") from error
    except PlanError as error:
        raise ScenarioError(f"scenario {source}: {error}") from error
    return scenario


def load_scenario(name: str) -> Scenario:
    """A shipped scenario by name, or a TOML file by path.

    Raises:
        ScenarioError: there is none, it is not TOML, or a key is wrong.
    """
    try:
        values = tomllib.loads(_read(name))
    except FileNotFoundError as error:
        known = ", ".join(shipped_scenarios())
        raise ScenarioError(f"no scenario {name}; shipped are {known}, or give a file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ScenarioError(f"cannot read scenario {name}: {error}") from error
    if "scenario" not in values and "study" in values:
        raise ScenarioError(
            f"{name} is a plan; a scenario says who trains it, too: begin with one that is shipped "
            f"({', '.join(shipped_scenarios())})"
        )
    if "seeds" in values:
        raise ScenarioError(f"{name} is a sweep, of several runs: crafts-sim sweep {name}")
    return parse_scenario(values, name)


def shipped_scenarios() -> list[str]:
    """Names of the scenarios in the package."""
    folder = resources.files("crafts_simulations") / "scenarios"
    names = (Path(entry.name) for entry in folder.iterdir())
    return sorted(name.stem for name in names if name.suffix == ".toml")


def _read(name: str) -> str:
    if name in shipped_scenarios():
        file = resources.files("crafts_simulations") / "scenarios" / f"{name}.toml"
        return file.read_text(encoding="utf-8")
    return Path(name).read_text(encoding="utf-8")
