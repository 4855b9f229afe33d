"""The plan: what the coordinator asks the sites to do. Public, hashed, signed.

Both sides parse the same file with the same model, so a site reads exactly what the coordinator
signed. The hash covers everything that changes the mechanism; how fast it is done (``transport``)
does not enter.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from crafts_core.errors import CraftsError
from crafts_core.fields import describe, describe_first_error
from crafts_core.plan_sections import (
    GENERATOR_ONLY,
    MODALITIES,
    RELEASES,
    AdapterConfig,
    AggregationConfig,
    Factor,
    Part,
    PrivacyConfig,
    Section,
    StageConfig,
    StudyConfig,
    TransportConfig,
)

MAX_STEPS = 100_000
"""Of a plan; beyond, composing their privacy losses takes minutes and rounds too much up."""


class PlanError(CraftsError):
    """The plan file is missing, is not TOML, or asks for something impossible."""

    def __init__(self, text: str, *, problems: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.problems = tuple(problems) or (text,)
        """Everything that is wrong; the text names the first."""


class RoundOfPlan(NamedTuple):
    """One round of the plan: its place, its stage, and which factor trains."""

    round: int
    stage_index: int
    stage: StageConfig
    factor: Factor
    starts_stage: bool


class Plan(Section):
    """A whole study. ``Plan.load`` is the only way in from a file."""

    study: StudyConfig
    adapter: AdapterConfig
    stage: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    privacy: PrivacyConfig
    aggregation: AggregationConfig
    transport: TransportConfig = TransportConfig()

    @model_validator(mode="after")
    def _control_comes_last(self) -> Self:
        is_control = [stage.name == "control" for stage in self.stage]
        if is_control != sorted(is_control):
            raise ValueError(
                "stage control must come after pretraining and alignment: what it learns fits the "
                "generator that they end with"
            )
        return self

    @model_validator(mode="after")
    def _releases_come_first(self) -> Self:
        named = [stage.name for stage in self.stage]
        first = named[: len(self.releases)]
        if first != list(dict.fromkeys(name for name in named if name in RELEASES)):
            raise ValueError("stages anchors and colour come before all others, each once")
        if not self.trained:
            raise ValueError("expected a stage that trains after anchors and colour")
        is_private = self.privacy.mechanism == "patient_dp"
        if any((stage.noise_multiplier is not None) != is_private for stage in self.releases):
            raise ValueError(
                "stages anchors and colour need noise_multiplier under mechanism patient_dp, and "
                "have none otherwise"
            )
        return self

    @model_validator(mode="after")
    def _retrieval_follows_what_was_told(self) -> Self:
        named = [stage.name for stage in self.stage]
        if "retrieval" in named:
            if named[:3] not in (
                ["anchors", "colour", "retrieval"],
                ["colour", "anchors", "retrieval"],
            ):
                raise ValueError(
                    "stage retrieval comes once, right after stages anchors and colour, which say "
                    "what it picks and in which colours"
                )
            if named.count("retrieval") > 1 or "generator" not in self.parts:
                raise ValueError(
                    "stage retrieval comes once, before a stage pretraining or alignment"
                )
        if ("retrieval" in named) != (self.study.pool is not None):
            raise ValueError(
                "stage retrieval needs pool in [study], as crafts-server pool add says it; without "
                "that stage there is none"
            )
        return self

    @model_validator(mode="after")
    def _captions_are_named_where_needed(self) -> Self:
        if any(stage.needs_captions for stage in self.stage) and not self.study.captions:
            raise ValueError(
                'stage anchors and alignment_loss = "contrast" need captions in [study]: the '
                "classes of tissue, as the sites' tiles name them"
            )
        return self

    @model_validator(mode="after")
    def _steps_can_be_accounted(self) -> Self:
        if self.charged_steps > MAX_STEPS:
            raise ValueError(
                f"rounds times local_steps and spare_steps make {self.charged_steps} steps, at "
                f"most {MAX_STEPS} can be accounted for; take fewer"
            )
        return self

    @model_validator(mode="after")
    def _distributed_noise_is_hidden_in_sums(self) -> Self:
        if self.privacy.trust != "distributed":
            return self
        if not self.aggregation.secure_aggregation:
            raise ValueError(
                "trust = 'distributed' needs secure_aggregation = true: a share of the noise "
                "protects nobody but in a sum"
            )
        if any(stage.local_steps != 1 for stage in self.stage):
            raise ValueError("trust = 'distributed' needs local_steps = 1 in every stage")
        min_sites, colluding = self.aggregation.min_sites, self.privacy.colluding_sites or 0
        if min_sites - colluding < 2:
            raise ValueError(
                "trust = 'distributed' needs min_sites of at least 2 above colluding_sites, got "
                f"{min_sites} and {colluding}"
            )
        return self

    @model_validator(mode="after")
    def _sums_hide_single_sites(self) -> Self:
        if not self.aggregation.secure_aggregation:
            return self
        if self.privacy.mechanism != "patient_dp":
            raise ValueError(
                "secure_aggregation = true needs mechanism patient_dp: how much a site counts in a "
                "sum, and how fine its numbers are, follow from the noise"
            )
        if self.aggregation.min_sites < 3:
            raise ValueError(
                "secure_aggregation = true needs min_sites of 3 or more: of two sites each can "
                f"take its own part off, got {self.aggregation.min_sites}"
            )
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a ``plan.toml``, or the same as JSON, which is how sites are shown a plan.

        Raises:
            PlanError: with the first offending key and what it should be.
        """
        try:
            text = path.read_text(encoding="utf-8")
            return cls.parse(
                json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
            )
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"cannot read plan {path}: {error}") from error

    @classmethod
    def parse(cls, values: object) -> Self:
        """Check values that were parsed from TOML or JSON."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [describe(each) for each in error.errors()]
            raise PlanError(f"plan: {describe_first_error(error)}", problems=problems) from error

    def to_json(self) -> str:
        """The whole plan as canonical JSON, transport included."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """SHA-256 over everything that changes the mechanism (not ``transport``)."""
        values = self.model_dump(mode="json", exclude={"transport"})
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the adapter consists of: what some stage trains, and nothing else."""
        modalities = tuple(m for m in MODALITIES if m in {stage.modality for stage in self.trained})
        trains_generator = any(stage.modality is None for stage in self.trained)
        return (*(GENERATOR_ONLY if trains_generator else ()), *modalities)

    @property
    def gives_lora(self) -> bool:
        """Whether what it trains of the denoiser can be written as a LoRA file."""
        return self.adapter.kind == "lora" and "generator" in self.parts

    @property
    def releases(self) -> tuple[StageConfig, ...]:
        """What sites tell before training, a round each; the first stages."""
        return tuple(stage for stage in self.stage if stage.is_release)

    @property
    def release_attempts(self) -> int:
        """How often each release may be asked for in a run, all of it charged to the target.

        No plan's to choose: were it open, whoever saw one sum of a release could pick between
        another and further steps of training.
        """
        return 2 if self.aggregation.secure_aggregation else 1

    @property
    def trained(self) -> tuple[StageConfig, ...]:
        """The stages in which sites train; all others come before them, a round each."""
        return tuple(
            stage for stage in self.stage if not stage.is_release and not stage.is_retrieval
        )

    @property
    def asked(self) -> tuple[StageConfig, ...]:
        """The stages whose rounds ask sites for something."""
        return tuple(stage for stage in self.stage if not stage.is_retrieval)

    @property
    def num_first_rounds(self) -> int:
        """Rounds before sites train."""
        return len(self.stage) - len(self.trained)

    def privacy_of(self, stage: StageConfig) -> PrivacyConfig:
        """Sampling and clipping of a stage's rounds.

        A release is of every patient, once. What one adds is made to be at most one long, so a plan
        has no say in it.
        """
        if not stage.is_release:
            return self.privacy
        fixed = {"sample_rate": 1.0, "max_grad_norm": 1.0, "clipping": "flat"}
        return self.privacy.model_copy(update=fixed)

    def aggregation_of(self, stage: StageConfig) -> AggregationConfig:
        """How the sites of a stage's rounds count: in a release by their patients, always."""
        if not stage.is_release:
            return self.aggregation
        return self.aggregation.model_copy(update={"rule": "by_patients"})

    def captions_of(self, stage: StageConfig) -> tuple[str, ...]:
        """The study's captions, where a stage tells tiles apart by them."""
        return self.study.captions if stage.needs_captions else ()

    @property
    def num_rounds(self) -> int:
        return sum(stage.rounds for stage in self.stage)

    @property
    def total_steps(self) -> int:
        """Private steps a site trains if it takes part in every round of ``trained``."""
        return sum(stage.rounds * stage.local_steps for stage in self.trained)

    @property
    def charged_steps(self) -> int:
        """Steps that a site may be charged for: the noise is calibrated for all of them."""
        return self.total_steps + self.privacy.spare_steps

    def rounds(self) -> Iterator[RoundOfPlan]:
        """Every round in order, numbered from 1."""
        number = 0
        for stage_index, stage in enumerate(self.stage):
            for index in range(stage.rounds):
                number += 1
                factor = self._factor(stage, number - self.num_first_rounds)
                yield RoundOfPlan(number, stage_index, stage, factor, index == 0)

    def _factor(self, stage: StageConfig, number: int) -> Factor:
        """Of a stage's round, the numbered one of those that train."""
        if stage.name in RELEASES:
            return stage.name
        if stage.is_retrieval:
            return "all" if self.adapter.kind == "full" else "both"
        if stage.modality:
            return stage.modality
        if self.adapter.kind == "full":
            return "all"
        if self.adapter.schedule == "both":
            return "both"
        if self.adapter.schedule == "second_only" or number % 2 == 1:
            return "second"
        return "first"
