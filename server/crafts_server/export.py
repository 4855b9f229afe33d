"""The shared generator as others get it: stock diffusers files with a card that says what it is."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from crafts_core.adapters import merged_denoiser
from crafts_core.delta_text import delta_text
from crafts_core.export import model_card, save_lora, save_pipeline
from crafts_core.foundation import Foundation
from crafts_core.generator_record import GeneratorRecord, ToldColours
from crafts_core.plan import Plan
from crafts_core.releases import COLOUR
from crafts_core.retrieval_record import Retrieval
from crafts_core.state import State, generator_state, modalities_in
from crafts_core.told_colours import find_colours
from crafts_server.checkpoints import Checkpoint
from crafts_server.errors import CheckpointError

ADAPTER_FILE = "adapter.safetensors"


def export_generator(
    chain: Sequence[Checkpoint],
    *,
    plan: Plan,
    foundation: Foundation,
    directory: Path,
    lora: Path | None,
    num_sites: int,
    named_sites: Sequence[str] = (),
    not_private: str | None = None,
) -> None:
    """Write the generator that the rounds so far give: their moving average (`averaged`).

    Args:
        chain: The run's checkpoints from round 0.
        plan: What they were trained by.
        foundation: What it was trained on.
        directory: Stock diffusers directory; an earlier export in it is replaced.
        lora: Stock LoRA file; None where the plan trains full weights or nobody wants it.
        num_sites: Sites that took part.
        named_sites: Those that agreed to be named.
        not_private: Why the plan's promise does not hold, for the card; None where it does.

    Raises:
        AdapterError: the adapter does not fit the foundation, or ``lora`` was asked of full
            weights, or of a plan that trains ControlNets alone.
        CheckpointError: a checkpoint was altered, or there is no round yet.
    """
    state = shared_state(chain, plan)
    record = GeneratorRecord(
        study=plan.study.name,
        plan_hash=plan.hash,
        rounds=chain[-1].round,
        foundation=foundation.manifest.name,
        foundation_hash=foundation.manifest.hash,
        privacy=not_private or privacy_statement(plan, num_sites=num_sites),
        mpp=foundation.manifest.mpp,
        colours=_told_colours(chain, plan, foundation, state),
    )
    retrieval = retrieval_of(chain)
    card = model_card(
        study=record.study,
        foundation=foundation,
        sites=list(named_sites),
        privacy=record.privacy,
        rounds=record.rounds,
        planned_rounds=plan.num_rounds,
        modalities=modalities_in(state),
        retrieval=retrieval,
        has_told_colours=record.colours is not None,
    )
    save_pipeline(
        directory,
        foundation,
        adapter=plan.adapter,
        state=state,
        card=card,
        record=record,
        retrieval=retrieval,
    )
    if lora is not None:
        save_lora(lora, state)


def _told_colours(
    chain: Sequence[Checkpoint], plan: Plan, foundation: Foundation, state: State
) -> ToldColours | None:
    """How the generator's colours come to be those that sites told; None where they told none."""
    receipts = (checkpoint.receipt() for checkpoint in chain[1:])
    told = next((each.release for each in receipts if each.stage == "colour"), None)
    if told is None or told.is_public[0]:
        return None
    denoiser = merged_denoiser(foundation.generator.denoiser, plan.adapter, state)
    captions = plan.study.captions or [prompt.text for prompt in foundation.prompt_bank]
    return find_colours(
        replace(foundation.generator, denoiser=denoiser),
        state[COLOUR][0, 1:].double().numpy(),
        captions,
        seed=plan.study.seed,
    )


def shared_state(chain: Sequence[Checkpoint], plan: Plan) -> State:
    """The generator that a plan's rounds so far give, of a chain from round 0.

    That is what the coordinator trained alone, where there was that, until sites have trained.

    Raises:
        CheckpointError: a checkpoint was altered, or no round has trained yet.
    """
    if len(chain) == plan.num_first_rounds + 1 and retrieval_of(chain) is not None:
        return chain[-1].state()
    return averaged(chain[plan.num_first_rounds :], decay=plan.aggregation.ema_decay)


def retrieval_of(chain: Sequence[Checkpoint]) -> Retrieval | None:
    """What the run picked of its public pool, as far as it has come to that."""
    receipts = (checkpoint.receipt() for checkpoint in chain[1:])
    return next((each.retrieval for each in receipts if each.retrieval is not None), None)


def averaged(chain: Sequence[Checkpoint], *, decay: float) -> State:
    """Exponential moving average of the global adapter over the trained rounds.

    Rounds carry the noise of privacy and of sampling; averaging them removes some of it, and costs
    no privacy, as it only sees what was released. The weights ``decay ** age`` are divided by their
    sum, so that round 0, which nobody trained, has no share. No more have the rounds before a
    ControlNet's own stage: they would pull it back to where it steers nothing.

    Raises:
        CheckpointError: a checkpoint was altered, or there is no round yet.
    """
    if len(chain) < 2:
        raise CheckpointError("the run has no committed round yet")
    if decay == 0:
        return chain[-1].state()
    start = chain[0].state()
    denoiser = generator_state(start)
    total: dict[str, Tensor] = {}
    weight_sum = dict.fromkeys(start, 0.0)
    for checkpoint in chain[1:]:
        for name, tensor in checkpoint.state().items():
            is_waiting = name not in denoiser and name not in total
            if is_waiting and torch.equal(tensor, start[name]):
                continue
            total[name] = decay * total[name] + tensor if name in total else tensor
            weight_sum[name] = decay * weight_sum[name] + 1.0
    return {
        name: total[name] / weight_sum[name] if name in total else tensor
        for name, tensor in start.items()
    }


def privacy_statement(plan: Plan, *, num_sites: int) -> str:
    """What the plan promised to the patients of each site, in words.

    The promise of the plan, not the account of a site: that is in each site's own ledger.
    """
    privacy = plan.privacy
    sites = "1 site" if num_sites == 1 else f"{num_sites} sites"
    by_whom = "noise added at the site, against everybody who sees the rounds or this generator"
    if privacy.trust == "distributed":
        by_whom = (
            "noise that the sites added in shares to sums over all of them, against the "
            "coordinator, everybody who sees the rounds or this generator, and up to "
            f"{privacy.colluding_sites} of the sites together"
        )
    if privacy.target_epsilon is None or privacy.delta is None:
        return f"{sites}; trained without differential privacy: for public or synthetic data only"
    return (
        f"{sites}; each promises every patient differential privacy with epsilon at most "
        f"{privacy.target_epsilon:g} at delta {delta_text(privacy.delta)} (add or remove one "
        f"patient with all tiles), by {by_whom}"
    )
