"""Encoders: results name theirs; the orthogonal one is the same everywhere and orders histology."""

from typing import NamedTuple

import numpy as np
import pytest

from crafts_core.evaluation.encoder import Encoder, EncoderError, load_encoder, require_one_encoder
from crafts_core.evaluation.fidelity import Reference, mmd_to_reference
from crafts_core.evaluation.orthogonal_encoder import OrthogonalEncoder
from crafts_core.procedural import phenotype, random_stain, render_region
from crafts_core.vocabulary import CANCER_TYPES, sample_attributes


def _tiles(code: str, count: int, seed: int, stain_seed: int = 3) -> np.ndarray:
    cancer = next(cancer for cancer in CANCER_TYPES if cancer.code == code)
    stain = random_stain(np.random.default_rng(stain_seed))
    rng = np.random.default_rng([seed, 0])
    images = []
    for _ in range(count):
        look = phenotype(sample_attributes(rng, cancer))
        region = render_region(rng, width_px=64, height_px=64, mpp=1.0, phenotype=look, stain=stain)
        images.append(region.image)
    return np.stack(images)


class _Result(NamedTuple):
    encoder: str
    encoder_hash: str


def test_an_encoder_says_what_it_is() -> None:
    encoder: Encoder = load_encoder("orthogonal")
    assert encoder.name == "embedded-orthogonal-256"
    assert len(encoder.hash) == 64
    with pytest.raises(EncoderError, match="no encoder 'nothing'"):
        load_encoder("nothing")


def test_results_of_two_encoders_are_not_set_side_by_side() -> None:
    """The hash decides: a name may stay when weights change."""
    first, second = _Result("same", "a" * 64), _Result("same", "b" * 64)
    require_one_encoder([first, first])
    require_one_encoder([])
    with pytest.raises(EncoderError, match=r"aaaaaaaaaaaa.*bbbbbbbbbbbb.*--encoder"):
        require_one_encoder([first, second, first])


def test_kernels_are_the_published_ones() -> None:
    assert OrthogonalEncoder().hash[:16] == "ce82283e9ec619aa"


def test_kernels_are_orthonormal() -> None:
    for kernel in OrthogonalEncoder().weights:
        matrix = kernel.flatten(1).double().numpy()
        gram = matrix.T @ matrix if len(matrix) > matrix.shape[1] else matrix @ matrix.T
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-6)


def test_every_image_has_256_finite_features_whatever_its_size() -> None:
    encoder = OrthogonalEncoder()
    for shape in ((2, 32, 48, 3), (3, 64, 64, 3), (1, 224, 224, 3)):
        images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
        features = encoder.embed(images)
        assert features.shape == (shape[0], 256)
        assert np.isfinite(features).all()


def test_features_of_an_image_do_not_depend_on_its_neighbours() -> None:
    images = np.random.default_rng(0).integers(256, size=(5, 64, 64, 3), dtype=np.uint8)
    together, alone = (
        OrthogonalEncoder().embed(images)[3],
        OrthogonalEncoder().embed(images[3:4])[0],
    )
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 64, 64, 3)),
        np.zeros((2, 64, 64, 4), np.uint8),
        np.zeros((2, 16, 16, 3), np.uint8),
    ],
)
def test_what_is_no_rgb_image_is_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        OrthogonalEncoder().embed(images)


@pytest.mark.slow
def test_same_tissue_is_nearer_than_other_tissue_than_another_stain_than_noise() -> None:
    encoder = OrthogonalEncoder()
    real = _tiles("COAD", 48, seed=0)
    patients = np.array([f"p{row // 4}" for row in range(len(real))])
    reference = Reference.fit(encoder.embed(real), patients)

    def distance(images: np.ndarray) -> float:
        features = encoder.embed(images)
        return mmd_to_reference(features, patients, reference, num_bootstrap=20, seed=0)[0]

    same = distance(_tiles("COAD", 48, seed=1))
    other = distance(_tiles("LGG", 48, seed=2))
    noise = np.random.default_rng(0).integers(256, size=real.shape, dtype=np.uint8)
    assert same < other / 5 < distance(noise)
