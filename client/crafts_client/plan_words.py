"""What a plan asks of this site's patients, in words that a person can decide by."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from crafts_client.home import SiteHome
from crafts_client.offered_plans import OfferedPlan
from crafts_client.site_ledger import existing_ledger
from crafts_core.delta_text import delta_text
from crafts_core.plan import Plan
from crafts_core.plan_sections import RELEASES, StageConfig
from crafts_privacy.accounting import PrivacyEvent, epsilon
from crafts_privacy.ledger_rows import EntryKind, LedgerEntry

_ALL_LEAVES = (
    "What leaves: in each round one update of the adapter, noise and all, and the numbers of this "
    "plan. No image, path, caption, loss, exact count of patients or norm of a gradient."
)


def plan_words(site: SiteHome, plan: Plan, offered: OfferedPlan) -> Iterator[str]:
    """One sentence or two a line; what is refused comes last."""
    stages = ", then ".join(
        f"{each.rounds} rounds of {each.local_steps} steps of {each.modality or each.name}"
        for each in plan.trained
    )
    yield f"Study {plan.study.name} asks for {stages}."
    yield f"All digits of its hash, to compare: {plan.hash}"
    yield from (_release(plan, each) for each in plan.releases)
    yield from (_retrieval(plan, each) for each in plan.stage if each.is_retrieval)
    yield _ALL_LEAVES
    if plan.privacy.target_epsilon is None or plan.privacy.delta is None:
        yield "It promises patients nothing: it trains without privacy."
    else:
        yield from _promise(site, plan, offered)
    yield _time(site, plan)
    yield from (f"Refused: {line}." for line in offered.refused)
    if not offered.refused:
        approved = plan.hash in site.approvals.all()
        yield "Approved here." if approved else f"Next: crafts-client plan approve {plan.hash}"
    if offered.remark:
        yield f"Note: {offered.remark}."


def _release(plan: Plan, stage: StageConfig) -> str:
    """What leaves before training, and what it costs by itself."""
    num_classes = len(plan.study.captions)
    what = (
        f"the mean embedding of the tiles of each of {num_classes} captions"
        if stage.name == "anchors"
        else "mean and spread of colour, and how many patients, seven numbers"
    )
    cost = "without noise"
    if stage.noise_multiplier is not None and plan.privacy.delta is not None:
        event = PrivacyEvent(noise_multiplier=stage.noise_multiplier, sample_rate=1.0, steps=1)
        alone = epsilon([event], plan.privacy.delta)
        cost = (
            f"with noise of {stage.noise_multiplier:g} times what one patient adds, epsilon "
            f"{alone:.2f} of the plan's if it stood alone"
            + (", each time" if plan.release_attempts > 1 else "")
        )
    whose = "all hospitals' patients in one sum" if _is_shared(plan) else "all patients"
    often = "once" if plan.release_attempts == 1 else "once, and once more if the sum stays closed"
    return f"Before training, {often}, over {whose}: {what}; {cost}."


def _is_shared(plan: Plan) -> bool:
    """Whether others add a part of the noise that this site's patients are promised."""
    return plan.privacy.trust == "distributed"


def _retrieval(plan: Plan, stage: StageConfig) -> str:
    """What the coordinator does alone, and what a hospital should know of the pool."""
    aligned = (
        ", each drawn nearer to what was told of its caption, with some more steps in later rounds"
        if stage.lambda_align
        else ""
    )
    return (
        f"Then the coordinator picks at most {stage.tiles_per_caption} tiles a caption from public "
        f"pool {(plan.study.pool or '')[:16]} by what was told, and trains on them alone"
        f"{aligned}: nothing is asked of this site, and it costs no epsilon. The pool must hold "
        "open tiles only; were tiles of your patients among them, no noise would stand before "
        "those."
    )


def _promise(site: SiteHome, plan: Plan, offered: OfferedPlan) -> Iterator[str]:
    privacy, declared = plan.privacy, site.config.declared_patients
    yield (
        f"What it promises each patient: epsilon {privacy.target_epsilon:g} at delta "
        f"{delta_text(privacy.delta or 0)} for all rounds together."
    )
    if offered.epsilon_after is not None:
        yield (
            f"After all of it the cohort's life stands at epsilon {offered.epsilon_after:.2f} of "
            f"{site.policy.max_epsilon:g}."
        )
    if offered.noise_multiplier is None:  # of a plan that nobody takes it may not be computable
        return
    yield (
        f"How: each step draws every patient with chance {privacy.sample_rate:g} (about "
        f"{privacy.sample_rate * declared:.3g} of {declared}), takes at most "
        f"{privacy.tiles_per_patient} tiles of each, cuts what one patient adds to length "
        f"{privacy.max_grad_norm:g}, and adds {_whose_noise(plan, offered.noise_multiplier)}."
    )


def _whose_noise(plan: Plan, noise_multiplier: float) -> str:
    if not _is_shared(plan):
        return f"noise of {noise_multiplier:.3g} times that"
    return (
        f"its share of noise: all members of a sum but {plan.privacy.colluding_sites} add "
        f"{noise_multiplier:.3g} times that together, and the promise holds against no more"
    )


def _time(site: SiteHome, plan: Plan) -> str:
    """From rounds that ran here; nothing is loaded or timed for it."""
    ledger = existing_ledger(site)
    seconds = seconds_per_step(() if ledger is None else ledger.entries())
    if seconds is None:
        return (
            "How long a round takes here is known once a first one ran; plan show --time times "
            "it on public tiles before."
        )
    longest = max(stage.local_steps for stage in plan.trained) * seconds / 60
    return f"A round takes about {longest:.2g} minutes here if its steps are as earlier ones were."


def timed_words(
    plan: Plan, rounds: Iterable[tuple[str, float]], answer_every_s: float | Literal["auto"]
) -> Iterator[str]:
    """How long rounds take here: seconds of each stage, as ``round_time`` gives them.

    Args:
        plan: Whose rounds they are.
        rounds: What a stage is called, and at most how long one of its rounds takes.
        answer_every_s: Of ``site.toml``.
    """
    rounds = list(rounds)
    each = ", ".join(f"{taken / 60:.2g} minutes of {name}" for name, taken in rounds)
    yield f"A round takes here, as busy as this machine is now, at most: {each}."
    waits_s, leaves_s = plan.aggregation.deadline_s, max(taken for _, taken in rounds)
    if answer_every_s == "auto":
        yield "Its answer leaves then, whoever was drawn."
    elif answer_every_s:
        leaves_s = answer_every_s * math.ceil(leaves_s / answer_every_s)
        minutes = leaves_s / 60
        yield f"Its answer leaves after {minutes:.2g} minutes, by answer_every_s in site.toml."
    if leaves_s > waits_s:
        yield (
            f"The coordinator waits {waits_s / 60:.2g} minutes for an answer: one of this site "
            "could come too late, and a round that was trained is charged. Ask for a longer "
            "deadline_s or fewer local_steps."
        )


def seconds_per_step(entries: Sequence[LedgerEntry]) -> float | None:
    """Of the newest round of training that was answered, from its reservation on; None before."""
    for entry in reversed(entries):
        if entry.kind is EntryKind.COMMITTED and entry.steps and entry.stage not in RELEASES:
            paid = entries[entry.reservation - 1]
            return (entry.recorded_at - paid.recorded_at).total_seconds() / entry.steps
    return None
