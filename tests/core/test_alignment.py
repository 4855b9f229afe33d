"""Images and captions find each other as a loop says, and by chance where chance is all."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from crafts_core.evaluation.alignment import Alignment, Matcher, measure_alignment
from crafts_core.evaluation.extras import NotMeasurableError
from crafts_core.foundation import Foundation

WORDS = [f"caption {letter}" for letter in "abcdefghijkl"]


@dataclass
class Seen:
    """An aligner that knows each image by its first pixel, and each caption by its letter."""

    image_ND: torch.Tensor
    text_UD: torch.Tensor

    def embed_images(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.image_ND[images_NCHW[:, 0, 0, 0].long()]

    def embed_captions(self, captions: list[str]) -> torch.Tensor:
        return self.text_UD[[WORDS.index(caption) for caption in captions]]


def unit(seed: int, count: int) -> torch.Tensor:
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 6)))
    return torch.nn.functional.normalize(rows, dim=1)


def measure(image_ND: torch.Tensor, place_N: np.ndarray, **seen: torch.Tensor) -> Alignment:
    images = np.zeros((len(image_ND), 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(image_ND))
    matcher = Matcher(
        aligner=Seen(image_ND, seen.get("text_UD", unit(1, len(WORDS)))), anchors_KD=unit(2, 9)
    )
    captions = [WORDS[place] for place in place_N]
    return measure_alignment(
        matcher, images, captions, np.arange(len(images)) // 2, num_bootstrap=50, seed=0
    )


def test_figures_are_what_loops_say() -> None:
    place = np.arange(30) % 12
    image, text, anchors = unit(3, 30).numpy(), unit(1, 12).numpy(), unit(2, 9).numpy()
    found = measure(unit(3, 30), place)
    r = np.array([[np.corrcoef(anchors @ i, anchors @ t)[0, 1] for t in text] for i in image])
    own = r[np.arange(30), place]
    assert found.correlation == pytest.approx(own.mean())
    others = [np.delete(row, p).mean() for row, p in zip(r, place, strict=True)]
    assert found.correlation_chance == pytest.approx(np.mean(others))
    for recall in found.image_to_text:
        hits = [p in np.argsort(-text @ i)[: recall.k] for i, p in zip(image, place, strict=True)]
        assert recall.share == pytest.approx(np.mean(hits))
        assert recall.chance == pytest.approx(recall.k / 12)
    for recall in found.text_to_image:
        hits = [p in place[np.argsort(-image @ text[p])[: recall.k]] for p in place]
        assert recall.share == pytest.approx(np.mean(hits))


@pytest.mark.slow
def test_chance_is_what_unrelated_images_score() -> None:
    """Captions of one image, and of many: drawing k of N without putting back."""
    place = np.array([0] * 12 + [1] * 6 + [2, 3, 4, 5, 6, 7])
    told = [measure(unit(100 + seed, 24), place, text_UD=unit(9 + seed, 12)) for seed in range(300)]
    for side in ("image_to_text", "text_to_image"):
        for at, first in enumerate(getattr(told[0], side)):
            shares = [getattr(each, side)[at].share for each in told]
            assert np.mean(shares) == pytest.approx(first.chance, abs=0.04)


def test_what_tells_nothing_apart_finds_nothing() -> None:
    same = unit(4, 1).repeat(12, 1)
    found = measure(same, np.arange(12), text_UD=same)
    assert [recall.share for recall in found.image_to_text + found.text_to_image] == [0.0] * 6


def test_captions_that_fit_are_found_first() -> None:
    found = measure(unit(1, 12), np.arange(12))
    assert found.correlation == pytest.approx(1.0)
    assert [recall.k for recall in found.image_to_text] == [1, 5, 10]
    assert all(recall.share == 1.0 for recall in found.image_to_text + found.text_to_image)


def test_no_more_are_asked_for_than_there_are() -> None:
    found = measure(unit(3, 8), np.arange(8) % 3)
    assert [recall.k for recall in found.image_to_text] == [1]
    assert [recall.k for recall in found.text_to_image] == [1, 5]


@pytest.mark.parametrize("captions", [["one"] * 4, ["one", "two", "", "one"]])
def test_without_captions_it_is_not_measured(foundation: Foundation, captions: list[str]) -> None:
    images = np.zeros((4, 32, 32, 3), np.uint8)
    with pytest.raises(NotMeasurableError, match="two different captions"):
        measure_alignment(
            Matcher.of(foundation), images, captions, np.arange(4), num_bootstrap=20, seed=0
        )


def test_the_foundations_aligner_is_the_one_that_is_asked(foundation: Foundation) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    image_ND, text_UD = Matcher.of(foundation).embed(images, ["lung", "colon"])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert image_ND == pytest.approx(foundation.aligner.embed_images(pixels).numpy(), abs=1e-6)
    assert text_UD.shape == (2, foundation.aligner.embedding_dim)
