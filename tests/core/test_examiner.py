"""Drift: 0 for real tiles under their own captions, 1 under wrong ones, none without the gate."""

import numpy as np
import pytest

from crafts_core.evaluation.encoder import Features
from crafts_core.evaluation.examiner import Examiner
from crafts_core.evaluation.extras import NotMeasurableError

pytest.importorskip("sklearn", reason="pip install 'crafts-federated[evaluation]'")
CAPTIONS = ["colon glands", "lung sheets", "lung spindle cells"]
SETTINGS = {"num_bootstrap": 60, "seed": 3}


def tissue(seed: int, patients: int, *, signal: float) -> tuple[Features, list[str], np.ndarray]:
    """Three tiles of each patient; each caption has its direction, and so has each patient."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(0).standard_normal((3, 12))
    caption_N = rng.integers(3, size=3 * patients)
    own = np.repeat(rng.standard_normal((patients, 12)), 3, axis=0) * 0.3
    features = signal * directions[caption_N] + own + 0.3 * rng.standard_normal((3 * patients, 12))
    names = np.repeat([f"p{row:03}" for row in range(patients)], 3)
    return features, [CAPTIONS[row] for row in caption_N], names


def others(captions: list[str]) -> list[list[str]]:
    """Every wrong caption of each tile: the n-th of each in the n-th list."""
    return [
        [[other for other in CAPTIONS if other != caption][turn] for caption in captions]
        for turn in range(2)
    ]


@pytest.fixture(scope="module")
def held_out() -> tuple[Features, list[str], np.ndarray]:
    return tissue(1, 60, signal=1.0)


@pytest.fixture(scope="module")
def examiner(held_out: tuple[Features, list[str], np.ndarray]) -> Examiner:
    return Examiner.teach(*held_out, **SETTINGS)


def test_the_tiles_that_were_asked_about_have_no_drift(
    held_out: tuple[Features, list[str], np.ndarray], examiner: Examiner
) -> None:
    """By construction, to rounding; tiles that taught are not among them."""
    features, captions, patients = held_out
    rows = np.flatnonzero(np.isin(patients, list(examiner.asked_patients)))
    assert 0 < len(rows) < len(patients)
    found, interval = examiner.drift(features, captions, patients)
    assert found == pytest.approx(0.0, abs=1e-9)
    assert interval == pytest.approx((0.0, 0.0), abs=1e-9)


def test_wrong_captions_drift_by_one(examiner: Examiner) -> None:
    features, captions, patients = tissue(2, 60, signal=1.0)
    right = examiner.drift(features, captions, patients)[0]
    wrong = [examiner.drift(features, each, patients)[0] for each in others(captions)]
    assert right == pytest.approx(0.0, abs=0.1)
    assert np.mean(wrong) == pytest.approx(1.0, abs=0.15)


def test_images_that_show_nothing_asked_for_lie_at_one(examiner: Examiner) -> None:
    features, captions, patients = tissue(4, 60, signal=1.0)
    shuffled = [captions[row] for row in np.random.default_rng(0).permutation(len(captions))]
    assert 0.4 < examiner.drift(features, shuffled, patients)[0] < 1.0
    assert examiner.drift(-10 * features, captions, patients)[0] > 1.0


def test_only_patients_that_are_asked_about_count(examiner: Examiner) -> None:
    """What images of the others show and were drawn from changes nothing."""
    features, captions, patients = tissue(4, 60, signal=1.0)
    is_asked = np.isin(patients, examiner.asked_patients)
    found = examiner.drift(features, captions, patients)
    features[~is_asked] = 100.0
    changed = [
        caption if asked else CAPTIONS[0] for caption, asked in zip(captions, is_asked, strict=True)
    ]
    assert examiner.drift(features, changed, patients) == found
    with pytest.raises(NotMeasurableError, match="no image of a patient"):
        examiner.drift(features[~is_asked], changed[: (~is_asked).sum()], patients[~is_asked])


def test_five_images_of_one_patient_are_no_more_evidence(examiner: Examiner) -> None:
    features, captions, patients = tissue(4, 60, signal=1.0)
    once = examiner.drift(features, captions, patients)[1]
    often = examiner.drift(np.tile(features, (5, 1)), captions * 5, np.tile(patients, 5))[1]
    assert often == pytest.approx(once)


def test_the_gate_holds_where_right_and_wrong_are_told_apart(examiner: Examiner) -> None:
    gate = examiner.gate
    assert gate.is_passed
    assert gate.own > 0.5 > gate.wrong
    low, high = gate.difference_interval
    assert 0 < low < gate.own - gate.wrong < high
    assert gate.patients == 30


def test_there_is_no_drift_where_features_say_nothing() -> None:
    examiner = Examiner.teach(*tissue(5, 60, signal=0.0), **SETTINGS)
    assert not examiner.gate.is_passed
    with pytest.raises(NotMeasurableError, match="not measurable here: real tiles score"):
        examiner.drift(*tissue(6, 4, signal=1.0))


def test_neither_few_patients_nor_one_caption_can_be_examined() -> None:
    with pytest.raises(NotMeasurableError, match="8 held-out patients, got 7"):
        Examiner.teach(*tissue(7, 7, signal=1.0), **SETTINGS)
    features, _, names = tissue(8, 20, signal=1.0)
    with pytest.raises(NotMeasurableError, match="two different captions"):
        Examiner.teach(features, ["lung"] * 60, names, **SETTINGS)


def test_the_examiner_is_asked_only_about_patients_that_did_not_teach_it() -> None:
    """Every patient has a direction of its own and a caption of its own: nothing can be learnt.

    An examiner that was asked about whom it was taught with would know them by heart.
    """
    rng = np.random.default_rng(0)
    features = np.repeat(rng.standard_normal((40, 60)), 4, axis=0)
    names = np.repeat([f"p{row:03}" for row in range(40)], 4)
    captions = [CAPTIONS[int(name[1:]) % 3] for name in names]
    assert not Examiner.teach(features, captions, names, **SETTINGS).gate.is_passed
