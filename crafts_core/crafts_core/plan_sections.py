"""The sections of a plan: the study, what travels, the stages, privacy and aggregation.

What a section asks of itself is checked here; what they ask of each other, in ``plan.Plan``.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from crafts_core.fields import Name, Sha256

ReleaseName = Literal["anchors", "colour"]
"""What sites tell once, before training: a noised sum over their patients of few numbers each."""
RELEASES: tuple[ReleaseName, ...] = get_args(ReleaseName)
StageName = Literal["anchors", "colour", "retrieval", "pretraining", "alignment", "control"]
Modality = Literal["nuclei", "fluorescence"]
"""What steers the generator in a control stage."""
MODALITIES: tuple[Modality, ...] = get_args(Modality)
Part = Literal["generator", "nuclei", "fluorescence"]
"""What an adapter may consist of: weights of the denoiser, and a ControlNet for each modality."""
GENERATOR_ONLY: tuple[Part, ...] = ("generator",)
Factor = Literal["first", "second", "both", "all", "nuclei", "fluorescence", "anchors", "colour"]
"""What trains in a round: LoRA factor A (first), B (second), both; all weights if ``full``; what
is trained of the ControlNet of a modality; or what a release tells."""
_ONE_STEP = {"rounds": 1, "local_steps": 1, "learning_rate": 1.0}
"""A release as a step of training: from zero down a loss that is linear, to the sites' mean."""
_OF_RETRIEVAL = ("tiles_per_caption", "public_steps")
_KEYS_OF_RETRIEVAL = ("learning_rate", *_OF_RETRIEVAL, "lambda_align")


class Section(BaseModel):
    """Refuses keys that it does not know; what its fields say is told to whoever asks."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class StudyConfig(Section):
    """Which study this is and which public foundation it starts from."""

    name: Name
    """Small letters, digits and dashes; sites see it."""
    foundation: Sha256
    """SHA-256 of the foundation's manifest."""
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    """Public randomness only (probe draws, samples). Never privacy noise or patient sampling."""
    pool: Sha256 | None = None
    """SHA-256 of the public pool that stage retrieval picks tiles from, and of no other plan."""
    captions: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=500)], ...], Field(max_length=100)
    ] = ()
    """Classes of tissue, two or more, for stage anchors and ``alignment_loss = "contrast"``: a
    tile is of the longest that its caption is, or begins with before a comma."""

    @model_validator(mode="after")
    def _classes_differ(self) -> Self:
        if self.captions and not len(self.captions) == len(set(self.captions)) >= 2:
            raise ValueError("captions: expected two or more, each once")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A plan without captions and pool has the bytes and hash that it always had."""
        values: dict[str, Any] = dump(self)
        unused = {key for key in ("captions", "pool") if not values.get(key)}
        return {key: value for key, value in values.items() if key not in unused}


class AdapterConfig(Section):
    """The weights that travel."""

    kind: Literal["lora", "full"]
    """Low-rank factors beside the denoiser's layers, or all of its weights."""
    rank: Annotated[int, Field(ge=1, le=256)] = 4
    """Of the factors: more learns more and carries more noise."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Suffixes of UNet module names (Linear or Conv2d)."""
    schedule: Literal["alternate", "second_only", "both"] = "alternate"
    """Which LoRA factor trains: B and A in turn (exact averaging), B only, or both (FedIT)."""
    first_factor: Literal["public", "random"] = "public"
    """Where the first A comes from: the public update's singular directions, or noise."""
    control_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
    """Suffixes of modules of a ControlNet's encoder that get factors of ``rank``."""


class StageConfig(Section):
    """One training stage: its loss and how long it runs."""

    name: StageName
    """The loss: denoising, denoising with alignment of image and words, or steering. Before them
    what sites release once: ``anchors`` (where the tiles of each of the study's captions lie) and
    ``colour``, a round of one step each, whose other keys are fixed. After both ``retrieval``, in
    which no site is asked: the coordinator picks public tiles near the anchors from the study's
    pool, in the colours told, and trains the generator on them."""
    modality: Modality | None = None
    """Of stage control, and of no other."""
    noise_multiplier: Annotated[float, Field(ge=0.1, le=1e4)] | None = None
    """Of anchors and colour, under patient_dp: the noise of their sum, over the length that what
    one patient adds is cut to. What they cost is taken from target_epsilon; training gets the rest.
    """
    tiles_per_caption: Annotated[int, Field(ge=1, le=1000)] = 60
    """Of retrieval: at most so many public tiles are picked for a caption."""
    public_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 400
    """Of retrieval: steps on public tiles. They cost no epsilon."""
    rounds: Annotated[int, Field(ge=1, le=10_000)]
    """How often sites train and the coordinator aggregates."""
    local_steps: Annotated[int, Field(ge=1, le=10_000)]
    """Private steps that a site takes in a round."""
    learning_rate: Annotated[float, Field(gt=0, le=1e4)]
    """Of a site's steps."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """``adam`` is Adam whose second moment is freed of the noise's share (DP-AdamBC)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of SGD's velocity, or Adam's first moment (beta 1). Each round starts afresh."""
    second_moment_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's beta 2."""
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """Weights of timesteps by signal to noise, cut at this (Min-SNR)."""
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of captions left empty. In stage control 0.5 unless the plan says otherwise."""
    lambda_align: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the alignment loss; stages alignment and retrieval only."""
    alignment_loss: Literal["correlation", "contrast"] = "correlation"
    """Of stage alignment: correlation of profiles over the prompt bank, or which of the study's
    captions a tile is nearest to, by released anchors or else by their text. Of retrieval always
    the contrast."""
    lambda_drift: Annotated[float, Field(ge=0)] = 0.0
    """Weight of staying near the stage's start; stage alignment only."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_a_stage(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "control":
            return {"caption_dropout": 0.5, **values}
        if isinstance(values, dict) and values.get("name") in RELEASES:
            return {**_ONE_STEP, **values}
        if isinstance(values, dict) and values.get("name") == "retrieval":
            aligned = {"alignment_loss": "contrast"} if values.get("lambda_align") else {}
            return {"rounds": 1, "local_steps": 1, **aligned, **values}
        return values

    @model_validator(mode="after")
    def _a_release_is_one_step(self) -> Self:
        if not self.is_release and self.noise_multiplier is not None:
            raise ValueError(
                "noise_multiplier belongs to stages anchors and colour; the noise of training "
                "follows from target_epsilon"
            )
        if self.is_release and self._differs_but_for("noise_multiplier"):
            raise ValueError(f"stage {self.name} takes noise_multiplier and no other key")
        return self

    @model_validator(mode="after")
    def _retrieval_asks_no_site(self) -> Self:
        aligned = {"alignment_loss"} if self.alignment_loss == "contrast" else set()
        if self.is_retrieval and self._differs_but_for(*_KEYS_OF_RETRIEVAL, *aligned):
            names = ", ".join(_KEYS_OF_RETRIEVAL)
            raise ValueError(f"stage retrieval takes {names} and no other key")
        if self.is_retrieval and self.lambda_align and not aligned:
            raise ValueError('stage retrieval aligns by alignment_loss = "contrast" alone')
        if not self.is_retrieval and self._differs(*_OF_RETRIEVAL):
            raise ValueError("tiles_per_caption and public_steps belong to stage retrieval only")
        return self

    def _differs_but_for(self, *names: str) -> bool:
        """Whether another key is not as it is by itself."""
        return self._differs(*(set(StageConfig.model_fields) - {"name", *names}))

    def _differs(self, *names: str) -> bool:
        fields = StageConfig.model_fields
        fixed = {name: field.default for name, field in fields.items()} | _ONE_STEP
        return any(getattr(self, name) != fixed[name] for name in names)

    @model_validator(mode="after")
    def _terms_belong_to_their_stage(self) -> Self:
        if self.lambda_align and self.name not in ("alignment", "retrieval"):
            raise ValueError("lambda_align belongs to stages alignment and retrieval only")
        if self.lambda_drift and self.name != "alignment":
            raise ValueError("lambda_drift belongs to stage alignment only")
        if self.alignment_loss == "contrast" and not self.lambda_align:
            raise ValueError(
                'alignment_loss = "contrast" belongs to stages with lambda_align above 0'
            )
        if (self.name == "control") != (self.modality is not None):
            raise ValueError(
                f"stage control needs modality ({' or '.join(MODALITIES)}); no other stage has one"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A stage that names none of these keys has the bytes and hash that it always had."""
        values: dict[str, Any] = dump(self)
        if self.is_release:
            return {key: values[key] for key in values if key in ("name", "noise_multiplier")}
        if self.is_retrieval:
            unused = set(values) - {"name", *_KEYS_OF_RETRIEVAL}
            unused |= set() if self.lambda_align else {"lambda_align"}
            return {key: value for key, value in values.items() if key not in unused}
        unused = {"noise_multiplier", *_OF_RETRIEVAL}
        unused |= {"alignment_loss"} if self.alignment_loss == "correlation" else set()
        return {key: value for key, value in values.items() if key not in unused}

    @property
    def is_release(self) -> bool:
        """Whether sites tell something in it, once, and train nothing."""
        return self.name in RELEASES

    @property
    def is_retrieval(self) -> bool:
        """Whether no site is asked: the coordinator alone trains, on public tiles."""
        return self.name == "retrieval"

    @property
    def needs_captions(self) -> bool:
        """Whether it tells tiles apart by the study's captions."""
        return self.name == "anchors" or self.alignment_loss == "contrast"


class PrivacyConfig(Section):
    """What every site promises its patients. Public: safe to log and to sign."""

    mechanism: Literal["patient_dp", "none"]
    """``none`` is a baseline on public or synthetic data; a site's policy must allow it."""
    unit: Literal["patient"] = "patient"
    """Who is protected: a patient with all tiles."""
    target_epsilon: Annotated[float, Field(gt=0)] | None = None
    """What all rounds together may cost a patient; noise is calibrated to it."""
    delta: Annotated[float, Field(ge=1e-10, lt=1e-2)] | None = None
    """Chance that the promise says nothing, well below one in a site's patients. The accountants
    resolve none below 1e-10."""
    max_grad_norm: Annotated[float, Field(ge=1e-12, le=1e12)]
    """The length that what one patient adds to a step is cut to."""
    clipping: Literal["flat", "automatic"] = "flat"
    """Shorten only gradients beyond max_grad_norm, or scale every one to just below it (AUTO-S)."""
    clipping_stability: Annotated[float, Field(ge=1e-6, le=1e6)] = 0.01
    """gamma of automatic clipping: the gradient norm below which a patient counts for less."""
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    """Chance of a patient to be drawn into a step."""
    tiles_per_patient: Annotated[int, Field(ge=1, le=4096)]
    """Most tiles of a patient in a step."""
    draws_per_tile: Annotated[int, Field(ge=1, le=256)]
    """Timesteps and noises of a tile in a step."""
    trust: Literal["site", "distributed"] = "site"
    """Who adds the noise: each site all of it, or all members of a sum a share each."""
    colluding_sites: Annotated[int, Field(ge=1, le=998)] | None = None
    """Of trust ``distributed``: so many members of a sum may add no noise, and give the coordinator
    all that they know, without weakening the promise to the others' patients."""
    sum_grid_bits: Annotated[int, Field(ge=12, le=22)] | None = None
    """Of trust ``distributed``: max_grad_norm is at least 2 to this number of grid steps. A sum has
    32 bits, so the more patients a step expects, the fewer."""
    spare_steps: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Steps that may be charged and lost without costing the plan its last rounds."""

    @model_validator(mode="after")
    def _epsilon_and_delta_come_with_privacy(self) -> Self:
        private = self.mechanism == "patient_dp"
        if private != (self.target_epsilon is not None and self.delta is not None):
            raise ValueError("patient_dp needs target_epsilon and delta; none must not name them")
        if not private and (self.trust == "distributed" or self.spare_steps):
            raise ValueError("trust = 'distributed' and spare_steps need mechanism patient_dp")
        return self

    @model_validator(mode="after")
    def _sums_are_of_distributed_trust(self) -> Self:
        named = (self.colluding_sites is not None, self.sum_grid_bits is not None)
        if named != (self.trust == "distributed",) * 2:
            raise ValueError(
                "trust = 'distributed' needs colluding_sites and sum_grid_bits; no other trust has "
                "them"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A plan that names none of these keys has the bytes and hash that it always had."""
        values: dict[str, Any] = dump(self)
        unused = {"colluding_sites", "sum_grid_bits"} if self.trust == "site" else set()
        unused |= set() if self.spare_steps else {"spare_steps"}
        return {key: value for key, value in values.items() if key not in unused}


RULES_OF_SUMS = ("alignment_regularized", "uniform", "by_patients")
_OF_SUMS = frozenset({"masked_deadline_s", "max_attempts", "diagnose_after"})


class AggregationConfig(Section):
    """How site updates become one global adapter. Constants of design section 6."""

    rule: Annotated[str, Field(pattern=r"^[a-z][a-z_]{0,39}$")]
    """``alignment_regularized`` (by noise and alignment), or a baseline: ``uniform``,
    ``by_patients``. A coordinator's ``aggregation.py`` may know more."""
    min_sites: Annotated[int, Field(ge=1, le=1000)]
    """A round with fewer has no result, and is asked again."""
    deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds that a round waits for sites."""
    precision_floor: Annotated[float, Field(gt=0)] = 1e-12
    """tau^2 in p_k = 1 / (tau^2 + v_k); v_k is the declared noise variance per coordinate."""
    max_weight: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Of any site, where there are enough of them; the baselines have none."""
    max_weight_per_share: Annotated[float, Field(ge=1, le=100)] = 2.0
    """A site counts at most so many times its share of the agreed patients of who answered, or as
    much as in plain averaging."""
    max_weight_rise: Annotated[float, Field(gt=0, le=100)] = 0.5
    """A site whose weight per share rises by more between two rounds of a stage is an alert."""
    gate_temperature: Annotated[float, Field(gt=0)] = 0.05
    """Softness of the alignment gate a_k in alignment margin; the noise of a gain adds to it."""
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Of the aggregated steps, from round to round."""
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    """How far an aggregated step goes; 1 is where the sites are."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The exported generator is this moving average over rounds; 0 exports the last round."""
    trust_radius: Annotated[float, Field(ge=0, le=1)] = 0.1
    """rho: alignment steps may move at most rho * |Delta|."""
    trust_steps: Annotated[int, Field(ge=0, le=100)] = 2
    """Alignment steps on public data after a round: on the tiles that were picked, where stage
    retrieval has lambda_align, and else on the foundation's probe."""
    margin_tolerance: Annotated[float, Field(ge=0)] = 0.02
    """How much alignment margin a step may lose before it is halved."""
    max_halvings: Annotated[int, Field(ge=0, le=16)] = 3
    """Then the step is refused."""
    secure_aggregation: bool = False
    """The coordinator opens sums over sites, and nothing of any one of them."""
    masked_deadline_s: Annotated[float, Field(gt=0)] = 900.0
    """How long the members of a sum have to deliver their masked vectors."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """At a round's sum, before the round is given up."""
    diagnose_after: Annotated[int, Field(ge=0, le=100)] = 2
    """After so many refused steps in a row sums are taken over halves of the members, until the bad
    site is found; 0 is never."""

    @model_validator(mode="after")
    def _keys_of_sums_need_sums(self) -> Self:
        unused = sorted(_OF_SUMS & self.model_fields_set)
        if unused and not self.secure_aggregation:
            raise ValueError(f"{', '.join(unused)}: belongs to secure_aggregation = true")
        if self.secure_aggregation and self.rule not in RULES_OF_SUMS:
            raise ValueError(
                f"secure_aggregation = true needs a rule whose weights sites compute, too: "
                f"{', '.join(RULES_OF_SUMS)}; got {self.rule}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A plan without secure aggregation has the bytes and hash that it always had."""
        values: dict[str, Any] = dump(self)
        unused = frozenset() if self.secure_aggregation else _OF_SUMS
        return {key: value for key, value in values.items() if key not in unused}


class TransportConfig(Section):
    """Speed only: outside the hash."""

    wire_dtype: Literal["float16", "float32"] = "float16"
    """Of the numbers on the way."""
