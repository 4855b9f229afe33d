"""A private semantic query: public tiles near what sites told, in their colours, and trained on.

Sites told where the tissue of each caption lies in the aligner's image space, and its colour
(``releases``). Both are noised once and for all; whatever is done with them besides is
post-processing, so a pool may be as large, and training on what was picked as long, as one likes.
(PrivImage, Li et al. 2311.12850, picks public data by a private query of its classes; DP-FETA,
Gong et al. 2504.01395, trains on what is told before training privately.)

Everything follows from the plan, the pool and the state that the releases ended with.

Shape letters: N tiles, M picked ones, K captions, D embedding, Q numbers of colour, B a batch.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from crafts_core.adapters import Adapter
from crafts_core.evaluation.colour import ColourMap, ColourMoments
from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.foundation import Foundation
from crafts_core.foundation_build.training import Recipe, Rows, train
from crafts_core.pixels import channels_first, to_pixels
from crafts_core.plan import Plan
from crafts_core.plan_sections import GENERATOR_ONLY, Factor
from crafts_core.progress import Progress
from crafts_core.public_pool import PublicPool
from crafts_core.releases import ANCHORS, COLOUR, class_anchors
from crafts_core.retrieval_record import Retrieval
from crafts_core.stages.batch import TileBatch
from crafts_core.stages.objective import Objective
from crafts_core.state import FIRST, SECOND, State, generator_state

_BATCH, _EMBED = 16, 64
Numbers = npt.NDArray[np.float64]


def retrieve(
    pool: PublicPool,
    foundation: Foundation,
    plan: Plan,
    state: Mapping[str, Tensor],
    is_public: Sequence[bool],
    progress: Progress = lambda _what, _done, _total: None,
) -> Retrieval:
    """Pick what the plan's stage retrieval asks for.

    Args:
        pool: The plan's.
        foundation: Whose aligner the anchors are of.
        plan: With stage retrieval.
        state: That the releases ended with.
        is_public: Captions whose anchor is their text: nothing is picked for them.
        progress: Called with what, done and all; may raise to stop.
    """
    told_Q = state[COLOUR][0, 1:].double().numpy()
    # Stain moves embeddings as well, so tiles are compared in the colours that sites told.
    alike = colour_map(colour_of_cases(pool.images_NHWC, pool.cases()), told_Q)
    embeddings = []
    for done, part in enumerate(_parts(pool.images_NHWC)):
        progress("looking at public tiles", done * _EMBED, len(pool))
        embeddings.append(foundation.aligner.embed_images(channels_first(alike(part))).cpu())
    (stage,) = (each for each in plan.stage if each.is_retrieval)
    picked = nearest(torch.cat(embeddings), state[ANCHORS], is_public, most=stage.tiles_per_caption)
    rows_M = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in picked])
    final = alike
    if len(rows_M):
        final = colour_map(colour_of_cases(pool.images_NHWC[rows_M], pool.cases()[rows_M]), told_Q)
    used = sorted(set(pool.source_N[rows_M].tolist()))
    return Retrieval(
        pool=pool.hash,
        num_pool_tiles=len(pool),
        captions=plan.study.captions,
        tiles=picked,
        images=tuple(
            tuple(used.index(place) for place in pool.source_N[list(rows)].tolist())
            for rows in picked
        ),
        sources=tuple(pool.sources[place] for place in used),
        scale=_three(np.diag(final.matrix_CC)),
        shift=_three(final.shift_C),
    )


def nearest(
    embedding_ND: Tensor, anchors_KD: Tensor, is_public: Sequence[bool], *, most: int
) -> tuple[tuple[int, ...], ...]:
    """For each caption the tiles nearest to its anchor, of those that no other anchor is nearer to.

    At most ``most``, nearest first; of equals the first in the pool. Anchors that are public text
    have no tiles and take none from others.
    """
    known = [place for place, public in enumerate(is_public) if not public]
    similarity_NK = embedding_ND.double() @ anchors_KD.double().T
    own_N = torch.tensor(known)[similarity_NK[:, known].argmax(dim=1)] if known else None
    found: list[tuple[int, ...]] = []
    for place in range(len(anchors_KD)):
        rows = torch.empty(0, dtype=torch.int64) if own_N is None else (own_N == place).nonzero()
        rows = rows.flatten()
        order = torch.argsort(similarity_NK[rows, place], descending=True, stable=True)
        found.append(tuple(rows[order[:most]].tolist()))
    return tuple(found)


def colour_of_cases(images_NHWC: Images, case_N: npt.NDArray[np.str_]) -> Numbers:
    """What sites would tell of these tiles, a case as a patient: mean over cases, (Q,)."""
    told = [
        ColourMoments.of(images_NHWC[np.flatnonzero(case_N == case)]).statistics
        for case in sorted(set(case_N.tolist()))
    ]
    mean_Q: Numbers = np.mean(told, axis=0)
    return mean_Q


def colour_map(source_Q: Numbers, target_Q: Numbers) -> ColourMap:
    """The affine map of optical density, colour by colour, that carries one's onto the other's."""
    scale_C = np.exp(target_Q[3:] - source_Q[3:])
    return ColourMap(matrix_CC=np.diag(scale_C), shift_C=target_Q[:3] - source_Q[:3] * scale_C)


def picked_tiles(pool: PublicPool, retrieval: Retrieval) -> RealTiles:
    """The tiles that a receipt names, in the colours that it names, under their captions."""
    rows_M = np.asarray([row for rows in retrieval.tiles for row in rows], dtype=np.int64)
    recolour = ColourMap(
        matrix_CC=np.diag(np.asarray(retrieval.scale)), shift_C=np.asarray(retrieval.shift)
    )
    return RealTiles(
        images_NHWC=recolour(np.asarray(pool.images_NHWC[rows_M])),
        patients=pool.cases()[rows_M],
        captions=[
            caption
            for caption, rows in zip(retrieval.captions, retrieval.tiles, strict=True)
            for _ in rows
        ],
    )


def trained_on(
    picked: RealTiles,
    foundation: Foundation,
    plan: Plan,
    state: Mapping[str, Tensor],
    unfinished: Path,
    progress: Progress = lambda _what, _done, _total: None,
) -> State:
    """The state after the plan's public steps on picked tiles under their captions.

    The same bytes whether or not it is interrupted. Of LoRA both factors train; then each row of
    the first gets back the length that it had, and the second what that takes, so the product is
    what was learnt and the second's numbers have the influence that private training is made for.

    Args:
        picked: Without any the state stays as it is.
        foundation: Where training starts.
        plan: With stage retrieval.
        state: The adapter, and what sites told.
        unfinished: File that an interrupted call leaves, and a later one goes on from.
        progress: Called with what, done and all; may raise to stop.

    Raises:
        AdapterError: the state does not fit the plan's adapter.
    """
    if not len(picked):
        return dict(state)
    (planned,) = (each for each in plan.rounds() if each.stage.is_retrieval)
    loss = PublicLoss(picked, foundation, plan, state)
    loss.adapter.load_state(generator_state(state))
    train(
        nn.ParameterList(loss.adapter.trainable(planned.factor).values()),
        loss.of_rows,
        len(picked),
        Recipe(
            name="public tiles",
            state=unfinished,
            seed=plan.study.seed,
            steps=planned.stage.public_steps,
            batch=_BATCH,
            learning_rate=planned.stage.learning_rate,
            device=foundation.device,
            progress=progress,
            weight_decay=0.0,
        ),
    )
    return dict(state) | with_rows_as_before(loss.adapter.state(), state)


class PublicLoss:
    """The loss of a plan's stage retrieval on what was picked, encoded once, for any adapter state.

    Its public steps go down it before sites train, and the rule's alignment steps in each round.
    """

    def __init__(
        self, picked: RealTiles, foundation: Foundation, plan: Plan, told: Mapping[str, Tensor]
    ) -> None:
        """Encode.

        Args:
            picked: At least one tile, under captions of the study.
            foundation: The plan's.
            plan: With stage retrieval.
            told: A state with what sites told.
        """
        (stage,) = (each for each in plan.stage if each.is_retrieval)
        captions = plan.study.captions
        self._foundation = foundation
        self.adapter = Adapter.attach(
            copy.deepcopy(foundation.generator.denoiser), plan.adapter, GENERATOR_ONLY
        )
        """Holds the state that the loss is of."""
        self._objective = Objective(
            foundation,
            self.adapter,
            stage,
            class_anchors_KD=class_anchors(foundation, captions, told),
        )
        self._text_KLD = foundation.generator.encode_captions(list(captions))
        self._caption_M = torch.tensor([captions.index(caption) for caption in picked.captions])
        encode, parts = foundation.generator.encode_images, _parts(picked.images_NHWC)
        self._latents_MCHW = torch.cat([encode(to_pixels(part)) for part in parts])

    def of_rows(self, rows: Rows, rng: np.random.Generator) -> Tensor:
        """The mean over some of the tiles; noise and timesteps are drawn by ``rng``."""
        device = self._foundation.device
        batch = TileBatch(
            latents_BCHW=self._latents_MCHW[rows],
            text_BLD=self._text_KLD[self._caption_M[rows]],
            null_text_LD=self._foundation.null_text_LD,
            weight_B=torch.full((len(rows),), 1 / len(rows), device=device),
            class_B=self._caption_M[rows].to(device),
        )
        draws = self._objective.draw(batch, torch.Generator().manual_seed(int(rng.integers(2**63))))
        return batch.mean(self._objective.loss_per_tile(batch, draws))

    def gradient(
        self, state: Mapping[str, Tensor], factor: Factor, *, num_tiles: int, seed: int
    ) -> State:
        """Of the mean over some of the tiles, for each tensor of a factor (float32, CPU).

        Args:
            state: Where.
            factor: What moves.
            num_tiles: How many tiles, or all that there are.
            seed: Public; decides tiles, noise and timesteps.
        """
        self.adapter.load_state(generator_state(state))
        parameters = self.adapter.trainable(factor)
        gradient = {name: torch.zeros(tensor.shape) for name, tensor in parameters.items()}
        rng, there = np.random.default_rng(seed), len(self._latents_MCHW)
        rows = rng.choice(there, min(num_tiles, there), replace=False)
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            loss = self.of_rows(part, rng) * (len(part) / len(rows))
            of_part = torch.autograd.grad(loss, tuple(parameters.values()))
            for name, tensor in zip(parameters, of_part, strict=True):
                gradient[name] += tensor.to("cpu", torch.float32)
        return gradient


def with_rows_as_before(trained: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> State:
    """The same products of factors, each row of a first factor as long as it was before."""
    found = dict(trained)
    for name in trained:
        if name.endswith(FIRST):
            first, second = trained[name], name.removesuffix(FIRST) + SECOND
            length_R, was_R = (tensor.flatten(1).norm(dim=1) for tensor in (first, before[name]))
            longer_R = torch.where((length_R > 0) & (was_R > 0), was_R / length_R, 1.0)
            found[name] = first * _along(longer_R, first, dim=0)
            found[second] = trained[second] / _along(longer_R, trained[second], dim=1)
    return found


def _along(values_R: Tensor, tensor: Tensor, *, dim: int) -> Tensor:
    """One value for each place of a dimension, to be multiplied with."""
    shape = [1] * tensor.dim()
    shape[dim] = len(values_R)
    return values_R.reshape(shape)


def _parts(images_NHWC: Images) -> Iterator[Images]:
    for start in range(0, len(images_NHWC), _EMBED):
        yield np.asarray(images_NHWC[start : start + _EMBED])


def _three(values_C: Numbers) -> tuple[float, float, float]:
    red, green, blue = values_C.tolist()
    return red, green, blue
