"""Judges find what they were taught, in its own currency alone: shape in grey, colour in colour."""

import numpy as np
import pytest

from crafts_core.evaluation.colour import colour_features, grey_structure
from crafts_core.evaluation.encoder import Features, Images
from crafts_core.evaluation.extras import NotMeasurableError
from crafts_core.evaluation.judges import (
    ClassShare,
    Judge,
    Sight,
    agreement,
    agreement_by_class,
    judged_classes,
)
from crafts_core.evaluation.orthogonal_encoder import OrthogonalEncoder
from crafts_core.evaluation.real_tiles import RealTiles

pytest.importorskip("sklearn", reason="pip install 'crafts-federated[evaluation]'")
PINK, BLUE = np.array([0.2, 0.8, 0.3]), np.array([0.7, 0.6, 0.2])


def stripes(seed: int, *, upright: bool, stain_C: np.ndarray, count: int = 12) -> Images:
    """Stripes of a random phase, one way or the other, in one stain."""
    rng = np.random.default_rng(seed)
    wave_NP = np.sin(np.arange(32)[None] * 1.2 + rng.uniform(0, 6, (count, 1)))
    amount_NHW = 0.6 + 0.3 * (wave_NP[:, None, :] if upright else wave_NP[:, :, None])
    amount_NHW = np.broadcast_to(amount_NHW, (count, 32, 32)) + rng.normal(0, 0.02, (count, 32, 32))
    pixels = 255 * np.exp(-amount_NHW[..., None] * stain_C)
    return pixels.clip(0, 255).astype(np.uint8)


def shape(images: Images) -> Features:
    return OrthogonalEncoder().embed(grey_structure(images), mpp=1.0)


def taught(sight: Sight, features: Features) -> Judge:
    return Judge.train(sight, features, LABELS, ("across", "upright"))


LABELS = ["upright"] * 12 + ["across"] * 12


def test_the_shape_judge_is_not_moved_by_stain() -> None:
    """Taught with each class in a stain of its own, asked with the stains exchanged."""
    lesson = [stripes(1, upright=True, stain_C=PINK), stripes(2, upright=False, stain_C=BLUE)]
    exam = [stripes(3, upright=True, stain_C=BLUE), stripes(4, upright=False, stain_C=PINK)]
    judge = taught("shape", shape(np.concatenate(lesson)))
    assert judge.verdicts(shape(np.concatenate(exam)), LABELS).mean() > 0.9


def test_a_tile_that_counts_three_times_is_three_tiles() -> None:
    """Also where the features are put on a scale: few real tiles may not take the images' scale."""
    lesson = [stripes(1, upright=True, stain_C=PINK), stripes(2, upright=False, stain_C=BLUE)]
    features_ND, exam_ND = (
        shape(np.concatenate(lesson)),
        shape(stripes(5, upright=True, stain_C=BLUE)),
    )
    times_N = np.where(np.arange(24) % 5 == 0, 3, 1)
    classes = ("across", "upright")
    weighted = Judge.train("shape", features_ND, LABELS, classes, times_N.astype(float))
    repeated = Judge.train(
        "shape", features_ND.repeat(times_N, axis=0), np.repeat(LABELS, times_N).tolist(), classes
    )
    assert weighted.model.decision_function(exam_ND) == pytest.approx(
        repeated.model.decision_function(exam_ND), rel=1e-3
    )


def test_the_colour_judge_is_not_moved_by_shape() -> None:
    lesson = [stripes(1, upright=True, stain_C=PINK), stripes(2, upright=True, stain_C=BLUE)]
    exam = [stripes(3, upright=False, stain_C=PINK), stripes(4, upright=False, stain_C=BLUE)]
    judge = taught("colour", colour_features(np.concatenate(lesson)))
    assert judge.verdicts(colour_features(np.concatenate(exam)), LABELS).all()


def test_agreement_is_the_mean_of_the_classes_shares() -> None:
    is_right = np.array([True, True, True, False, False, True])
    labels = ["a", "a", "a", "a", "b", "stranger"]
    names = np.array([f"p{row}" for row in range(6)])
    found, interval = agreement(
        is_right, labels, classes=("a", "b"), patients=names, num_bootstrap=50, seed=0
    )
    assert found == pytest.approx((3 / 4 + 0 / 1) / 2)
    assert 0 <= interval.low <= found <= interval.high <= 1


def test_tiles_of_one_patient_are_resampled_together() -> None:
    """Ten copies of a tile are no more evidence than one."""
    rng = np.random.default_rng(0)
    right = rng.random(12) < 0.6
    labels, names = ["a", "b"] * 6, np.array([f"p{row}" for row in range(12)])
    settings = {"classes": ("a", "b"), "num_bootstrap": 400, "seed": 0}
    alone = agreement(right, labels, patients=names, **settings)[1]
    copied = agreement(
        np.repeat(right, 10), np.repeat(labels, 10).tolist(), patients=np.repeat(names, 10),
        **settings,
    )[1]  # fmt: skip
    apart = agreement(
        np.repeat(right, 10), np.repeat(labels, 10).tolist(),
        patients=np.array([str(row) for row in range(120)]), **settings,
    )[1]  # fmt: skip
    assert copied == pytest.approx(alone)
    assert apart.high - apart.low < 0.6 * (alone.high - alone.low)


def test_a_class_of_one_patient_is_not_judged() -> None:
    def side(*held: tuple[str, str]) -> RealTiles:
        return RealTiles(
            images_NHWC=np.zeros((len(held), 2, 2, 3), np.uint8),
            patients=np.array([patient for patient, _ in held]),
            captions=[label for _, label in held],
        )

    training = side(("p", "a"), ("q", "a"), ("p", "b"), ("q", "b"), ("r", "c"), ("r", "c"))
    held_out = side(("s", "a"), ("t", "a"), ("s", "b"), ("s", "b"), ("s", "c"), ("t", "c"))
    assert judged_classes(training, held_out) == ("a",)
    with pytest.raises(NotMeasurableError, match="two classes"):
        Judge.train("shape", np.zeros((6, 2)), training.classes, ("a",))


def test_the_mean_of_the_classes_is_the_agreement() -> None:
    rng = np.random.default_rng(0)
    labels = ["a"] * 30 + ["b"] * 9 + ["unknown"] * 4
    right_N, patients = rng.random(43) < 0.5, np.array([f"p{row % 7}" for row in range(43)])
    how = {"classes": ("a", "b", "c"), "patients": patients, "num_bootstrap": 50, "seed": 1}
    shares = agreement_by_class(right_N, labels, **how)  # type: ignore[arg-type]
    assert set(shares) == {"a", "b"}, "no image was asked for c"
    mean = (right_N[:30].mean() + right_N[30:39].mean()) / 2
    assert np.mean([found.share for found in shares.values()]) == pytest.approx(mean)
    assert agreement(right_N, labels, **how)[0] == pytest.approx(mean)  # type: ignore[arg-type]
    for found in shares.values():
        assert found.interval is not None
        assert found.interval.low <= found.share <= found.interval.high


def test_a_class_of_one_patient_has_no_interval() -> None:
    found = agreement_by_class(
        np.array([True, False]), ["a", "a"], classes=("a",), patients=np.array(["p", "p"]),
        num_bootstrap=20, seed=0,
    )  # fmt: skip
    assert found == {"a": ClassShare(0.5, None)}
