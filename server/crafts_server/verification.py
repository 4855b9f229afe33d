"""The one gate that every site update passes before anything is computed from it.

Cheap and certain checks come first: identity, then schema, then values, then whether the delta can
have come from the mechanism that it declares. What passes is used; everything else is refused with
a sentence that goes into the round's receipt.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from crafts_core.exchange import (
    ExchangeError,
    RoundReply,
    RoundRequest,
    check_tensors,
    global_norm,
    schema_hash,
)
from crafts_core.plan_sections import PrivacyConfig, StageConfig
from crafts_privacy.declared_noise import ROUNDING, noise_variance, norm_bounds
from crafts_server.errors import UpdateRefusedError

LEAST_NOISE = 0.995
"""Of the plan's noise: another version of the accountant may calibrate a little otherwise."""
MOST_NOISE = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What this round's updates must be."""

    request: RoundRequest
    stage: StageConfig
    privacy: PrivacyConfig
    schema: Mapping[str, Tensor]
    """Tensors of the trained factor: names and shapes."""
    noise_multiplier: float
    """What the plan asks every site to add (``plan_noise_multiplier``)."""
    patients: Mapping[str, int]
    """The roster: sites that may take part, and the patients that each has agreed on."""


def verify_update(reply: RoundReply, delta: Mapping[str, Tensor], expected: Expectation) -> float:
    """Accept an update.

    Returns:
        v_k: the declared noise variance per coordinate of the delta.

    Raises:
        UpdateRefusedError: says which check failed, what was expected and what came.
    """
    _check_identity(reply, expected.request)
    try:
        check_tensors(delta, expected.schema)
    except ExchangeError as error:
        raise UpdateRefusedError(str(error)) from error
    if reply.schema_hash != schema_hash(expected.schema):
        raise UpdateRefusedError("schema hash differs from the adapter's")
    _check_mechanism(reply, expected)
    _check_patients(reply, expected.patients)
    norm = _checked_norm(reply, delta)
    if expected.privacy.mechanism == "patient_dp":
        _check_plausible(reply, norm, expected)
    return noise_variance(reply, expected.stage)


def _check_identity(reply: RoundReply, request: RoundRequest) -> None:
    for field in ("run_id", "plan_hash", "round", "checkpoint_hash"):
        wanted, got = getattr(request, field), getattr(reply, field)
        if wanted != got:
            raise UpdateRefusedError(f"{field}: expected {str(wanted)[:16]}, got {str(got)[:16]}")


def _check_mechanism(reply: RoundReply, expected: Expectation) -> None:
    """The plan's clipping, sampling and steps to the letter, and at least its noise.

    How much a site counts follows from what it declares, so nothing of it is the site's to choose
    but more noise, for a policy that is stricter than the plan. Beyond ``MOST_NOISE`` that would
    only be leave for a longer update.
    """
    wanted_of = {
        "max_grad_norm": expected.privacy.max_grad_norm,
        "sample_rate": expected.privacy.sample_rate,
        "steps": expected.stage.local_steps,
    }
    for field, wanted in wanted_of.items():
        got = getattr(reply, field)
        if wanted != got:
            raise UpdateRefusedError(f"{field}: expected {wanted:g}, got {got:g}")
    least, most = expected.noise_multiplier * LEAST_NOISE, expected.noise_multiplier * MOST_NOISE
    if not least <= reply.noise_multiplier <= most:
        raise UpdateRefusedError(
            f"noise_multiplier: expected the plan's {expected.noise_multiplier:g}, or up to "
            f"{MOST_NOISE:g} times it, got {reply.noise_multiplier:g}"
        )


def _check_patients(reply: RoundReply, agreed: Mapping[str, int]) -> None:
    """The number that divides the update, and decides its weight, is both sides' word."""
    if reply.site not in agreed:
        raise UpdateRefusedError(
            "declared_patients: nothing was agreed with this site; it must run crafts-client "
            "declare, and the coordinator crafts-server sites resize"
        )
    if reply.declared_patients != agreed[reply.site]:
        raise UpdateRefusedError(
            f"declared_patients: agreed are {agreed[reply.site]}, got {reply.declared_patients}"
        )


def _checked_norm(reply: RoundReply, delta: Mapping[str, Tensor]) -> float:
    """The delta's norm, which must be the declared one up to half-precision rounding."""
    norm = global_norm(delta)
    if not abs(norm - reply.update_norm) <= ROUNDING * max(norm, reply.update_norm):
        raise UpdateRefusedError(f"update_norm: declared {reply.update_norm:.4g}, is {norm:.4g}")
    return norm


def _check_plausible(reply: RoundReply, norm: float, expected: Expectation) -> None:
    count = sum(tensor.numel() for tensor in expected.schema.values())
    bounds = norm_bounds(reply, expected.stage, count)
    if norm > bounds.highest:
        raise UpdateRefusedError(
            f"norm {norm:.4g} is above {bounds.highest:.4g}, the most that the declared clipping "
            "and noise give"
        )
    if norm < bounds.lowest:
        raise UpdateRefusedError(
            f"norm {norm:.4g} is below {bounds.lowest:.4g}, the least that the declared noise gives"
        )
