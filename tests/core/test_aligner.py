"""Embeddings, profiles and their correlation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crafts_core.aligner import LatentAligner, pearson, profile
from crafts_core.foundation import Foundation


def test_embeddings_have_unit_norm(foundation: Foundation) -> None:
    images = foundation.aligner.embed_images(foundation.probe.tiles_NCHW)
    captions = foundation.aligner.embed_captions(["tissue with glands", ""])
    for embedding_BD in (images, captions):
        torch.testing.assert_close(embedding_BD.norm(dim=1), torch.ones(len(embedding_BD)))


def test_bytes_and_floats_embed_alike(foundation: Foundation) -> None:
    tiles = foundation.probe.tiles_NCHW
    from_bytes = foundation.aligner.embed_images(tiles)
    from_floats = foundation.aligner.embed_images(tiles / 127.5 - 1.0)
    torch.testing.assert_close(from_bytes, from_floats, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (97, 97), (64, 48)])
def test_any_image_size_embeds(foundation: Foundation, size: tuple[int, int]) -> None:
    images = torch.zeros(2, 3, *size, dtype=torch.uint8)
    assert foundation.aligner.embed_images(images).shape == (2, 16)


def test_long_captions_are_cut_not_refused(foundation: Foundation) -> None:
    assert foundation.aligner.embed_captions(["glands " * 100]).shape == (1, 16)


def test_embeddings_of_one_row_do_not_depend_on_the_batch(foundation: Foundation) -> None:
    tiles = foundation.probe.tiles_NCHW
    alone = foundation.aligner.embed_images(tiles[3:4])
    torch.testing.assert_close(foundation.aligner.embed_images(tiles)[3:4], alone)


@given(seed=st.integers(0, 2**20), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_pearson_is_numpys_and_ignores_scale_and_shift(
    seed: int, scale: float, shift: float
) -> None:
    p, q = np.random.default_rng(seed).normal(size=(2, 4, 9))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]
    got = pearson(torch.from_numpy(p * scale + shift), torch.from_numpy(q))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-8)


def test_constant_profile_correlates_with_nothing_and_has_a_finite_gradient() -> None:
    constant = torch.full((1, 5), 2.0, requires_grad=True)
    correlation = pearson(constant, torch.arange(5.0)[None])
    (gradient,) = torch.autograd.grad(correlation.sum(), constant)
    assert float(correlation.detach()) == 0.0
    assert gradient.isfinite().all()


def test_profile_is_one_dot_product_per_anchor() -> None:
    embedding, anchors = torch.randn(2, 3), torch.randn(4, 3)
    got = profile(embedding, anchors)
    for row in range(2):
        for anchor in range(4):
            expected = sum(embedding[row, d] * anchors[anchor, d] for d in range(3))
            torch.testing.assert_close(got[row, anchor], expected)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (5, 9), (64, 64)])
def test_latent_aligner_takes_any_size(size: tuple[int, int]) -> None:
    head = LatentAligner(in_channels=4, width=48, embedding_dim=7)
    embedding = head(torch.randn(2, 4, *size))
    assert embedding.shape == (2, 7)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
