"""Agreement with prompts, and one whole evaluation on a tiny foundation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crafts_core.evaluation.alignment import prompt_agreement, type_ranks
from crafts_core.evaluation.evaluate import EvaluationConfig, Evaluator, RealTiles
from crafts_core.evaluation.orthogonal_encoder import OrthogonalEncoder
from crafts_core.sampling import sample_images
from crafts_core.vocabulary import Prompt
from support.foundations import tiny_foundation

SMALL = EvaluationConfig(num_images=16, num_inference_steps=2, num_bootstrap=20, batch_size=16)


def _prompt(code: str) -> Prompt:
    return Prompt(text=f"H&E, {code}", cancer_code=code)


def test_rank_counts_the_types_that_score_at_least_as_well() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.2, 0.1], [0.1, 0.3, 0.2]])
    prompts = [_prompt("A"), _prompt("B"), _prompt("C")]
    assert type_ranks(scores, ["A", "B", "C"], prompts).tolist() == [1, 2, 2]


def test_drift_is_one_minus_the_mean_correlation(tmp_path: Path) -> None:
    foundation = tiny_foundation(tmp_path / "f")
    bank = foundation.prompt_bank
    images = sample_images(foundation.generator, [p.text for p in bank], num_inference_steps=1)
    found = prompt_agreement(foundation, images, bank)
    slow = []
    for image, prompt in zip(images, bank, strict=True):
        tile = torch.from_numpy(image).permute(2, 0, 1)[None]
        u = (foundation.aligner.embed_images(tile) @ foundation.anchors_KD.T)[0].numpy()
        w = (foundation.aligner.embed_captions([prompt.text]) @ foundation.anchors_KD.T)[0].numpy()
        slow.append(np.corrcoef(u, w)[0, 1])
    assert found.drift == pytest.approx(1 - np.mean(slow), abs=1e-4)
    assert 1 <= found.mean_rank <= 30
    with pytest.raises(ValueError, match="images"):
        prompt_agreement(foundation, images[:-1], bank)


def test_a_generator_compared_with_itself_has_moved_nowhere(tmp_path: Path) -> None:
    foundation = tiny_foundation(tmp_path / "f", seed=1)
    rng = np.random.default_rng(0)
    side = foundation.generator.tile_px
    held_out = RealTiles(
        images_NHWC=rng.integers(256, size=(20, side, side, 3), dtype=np.uint8),
        patients=np.repeat([f"p{i}" for i in range(5)], 4),
        captions=[foundation.prompt_bank[row % 30].text for row in range(20)],
    )
    evaluator = Evaluator(foundation, held_out, SMALL, OrthogonalEncoder())
    result = evaluator.compare(foundation.generator, replace(foundation.generator))
    assert result.distance_generator == result.distance_foundation
    assert result.drift_generator == result.drift_foundation
    assert result.n == 16
    assert result.heldout_patients == 5
    assert result.distance_foundation > result.floor
    low, high = result.distance_foundation_interval
    assert low <= high
