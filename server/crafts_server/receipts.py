"""What a round leaves behind for people: who took part, how much each counted, what changed.

Public by construction: everything in it is a function of released deltas, declared configuration
and public data.
"""

from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from crafts_core.fields import Sha256
from crafts_core.plan_sections import Factor, StageName
from crafts_core.retrieval_record import Retrieval

_UNSAID = frozenset({"sums", "left_out", "release", "retrieval"})


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SiteReceipt(_Record):
    """One site whose update was used."""

    site: str
    weight: Annotated[float, Field(ge=0, le=1)]
    max_weight: Annotated[float, Field(gt=0, le=1)]
    """The most that its share of the agreed patients let it count, of those who answered."""
    gain: float | None
    """Alignment margin that its update adds, to first order (in receipts of earlier versions: by a
    margin of its own); None where nobody measured it, or the measure was not finite (then the gate
    was shut)."""
    update_norm: float | None
    """None where only a sum over sites was seen."""
    noise_multiplier: float
    """What it added; in a sum of distributed trust its share."""
    max_grad_norm: float
    sample_rate: float
    steps: int
    declared_patients: int
    declared_noise_variance: float


class Refusal(_Record):
    """A reply that was not used, and why. ``site`` is what we know it by."""

    site: str
    reason: str


class WeightRise(_Record):
    """A site that counts for more than in the round before, for its share of the patients."""

    site: str
    before: float
    """Weight over share in the site's last round of the stage; 1 is as its patients say."""
    now: float


class SumReceipt(_Record):
    """One set of sites that were announced to each other as the members of a sum."""

    attempt: Annotated[int, Field(ge=1)]
    members: tuple[str, ...]
    missing: tuple[str, ...]
    """Who was ready and did not deliver: then nothing of the set can be read."""
    noise_multiplier: float | None
    """Of the whole sum, from the shares that its members declare."""
    norm: float | None
    """Of the sum: of distributed trust in units of max_grad_norm, of site trust as the step is."""
    lowest: float | None
    highest: float | None
    """Which norms agree with the declared noise and clipping; a step beyond them is refused."""

    @property
    def is_plausible(self) -> bool | None:
        """None where the sum was not read."""
        if self.norm is None or self.lowest is None or self.highest is None:
            return None
        return self.lowest <= self.norm <= self.highest

    @property
    def in_words(self) -> str:
        """For people."""
        text = f"{len(self.members)} members, attempt {self.attempt}: "
        if self.is_plausible is None:
            return f"{text}not read, as {', '.join(self.missing)} did not deliver"
        verdict = "within" if self.is_plausible else "refused, beyond"
        return f"{text}norm {self.norm:.4g}, {verdict} {self.lowest:.4g} to {self.highest:.4g}"


class ReleaseReceipt(_Record):
    """What the sites' noised sums came to, and is a constant of the run from here on."""

    values: tuple[tuple[float, ...], ...]
    """An anchor a row, or colour as ``releases`` has it."""
    signal: tuple[float, ...]
    """Of each row, how far it stands out of its noise."""
    is_public: tuple[bool, ...]
    """Rows that too few patients have: public text, or public colour, stands there."""

    @property
    def in_words(self) -> str:
        """For people."""
        return f"{self.is_public.count(False)} of {len(self.is_public)} rows from patients"


class RoundReceipt(_Record):
    """One committed round."""

    run_id: str
    round: Annotated[int, Field(ge=1)]
    stage: StageName
    stage_index: Annotated[int, Field(ge=0)]
    factor: Factor
    sites: tuple[SiteReceipt, ...]
    """None in a round of stage retrieval, and in no other."""
    refused: tuple[Refusal, ...]
    missing: tuple[str, ...]
    """Sites that were asked and had not answered when the round closed."""
    rises: tuple[WeightRise, ...]
    """Beyond the plan's ``max_weight_rise``: somebody should look at these."""
    sums: tuple[SumReceipt, ...] = ()
    """Of secure aggregation: every announced set of every attempt, in order."""
    left_out: tuple[str, ...] = ()
    """Of secure aggregation: sites that were not asked, as they spoil sums or do not deliver."""
    release: ReleaseReceipt | None = None
    """Of a round of stage anchors or colour."""
    retrieval: Retrieval | None = None
    """Of a round of stage retrieval."""
    margin_before: float
    margin_after: float
    step_norm: float
    trust_norm: float
    step_scale: Annotated[float, Field(ge=0, le=1)]
    """1 whole step, 1/2, 1/4 ... halved, 0 rejected by the probe."""
    bytes_down: int
    """Array bytes sent to all sites together."""
    bytes_up: int
    seconds: float
    finished_at: datetime
    sent_hash: Sha256
    """Identity of the adapter as it travelled (``checkpoint_hash`` of the request)."""
    state_hash: Sha256
    """Identity of the new global adapter."""

    @property
    def stands_in(self) -> bool:
        """Whether it is a release of which no sum could be read, so that all of it is public."""
        return self.release is not None and not self.sites

    @model_validator(mode="after")
    def _somebody_trained(self) -> Self:
        is_alone = self.retrieval is not None
        if (is_alone and self.sites) or not (is_alone or self.sites or self.stands_in):
            raise ValueError("expected sites, or what the coordinator picked alone")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A receipt of a round without sums or releases has the bytes that it always had."""
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if value or name not in _UNSAID}

    @property
    def accepted(self) -> bool:
        return self.step_scale > 0
