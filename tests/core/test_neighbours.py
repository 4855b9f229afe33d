"""Precision, recall, density and coverage against the obvious loops."""

import sys

import numpy as np
import pytest

from crafts_core.evaluation.extras import NotMeasurableError
from crafts_core.evaluation.neighbours import NEAREST, coverage_intervals, measure_coverage


def cloud(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3)) + shift


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.sqrt(((first - second) ** 2).sum()))


def radius(points: np.ndarray, place: int) -> float:
    """How far the fifth of a point's neighbours is."""
    far = sorted(distance(points[place], other) for i, other in enumerate(points) if i != place)
    return far[NEAREST - 1]


def test_coverage_is_what_loops_over_all_pairs_say(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prdc", reason="pip install 'crafts-federated[evaluation]'")
    real, fake = cloud(1, 12), cloud(2, 9, shift=0.7)
    found = measure_coverage(real, fake)
    around_real = [[distance(r, f) < radius(real, i) for f in fake] for i, r in enumerate(real)]
    around_fake = [[distance(r, f) < radius(fake, j) for j, f in enumerate(fake)] for r in real]
    assert found.precision == pytest.approx(np.mean(np.any(around_real, axis=0)))
    assert found.recall == pytest.approx(np.mean(np.any(around_fake, axis=1)))
    assert found.density == pytest.approx(np.sum(around_real) / (NEAREST * len(fake)))
    covered = [min(distance(r, f) for f in fake) < radius(real, i) for i, r in enumerate(real)]
    assert found.coverage == pytest.approx(np.mean(covered))
    assert 0 < found.precision < 1
    assert capsys.readouterr().out == ""


def test_too_few_images_have_no_coverage() -> None:
    pytest.importorskip("prdc", reason="pip install 'crafts-federated[evaluation]'")
    with pytest.raises(NotMeasurableError, match="need 7 images"):
        measure_coverage(cloud(1, 20), cloud(2, 6))


def test_without_the_extra_the_line_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prdc", None)
    with pytest.raises(NotMeasurableError, match=r"pip install '.*\.whl\[evaluation\]'"):
        measure_coverage(cloud(1, 20), cloud(2, 20))


def test_intervals_draw_the_patients_of_the_side_that_is_counted() -> None:
    """The rows that are drawn from are those whose means the library gives."""
    pytest.importorskip("prdc", reason="pip install 'crafts-federated[evaluation]'")
    real, fake = cloud(1, 40), cloud(2, 30, shift=0.7)
    found = measure_coverage(real, fake).model_dump()
    each, whole = (
        coverage_intervals(real, fake, of_real, of_fake, num_bootstrap=400, seed=0)
        for of_real, of_fake in (
            (np.arange(40), np.arange(30)),
            (np.zeros(40, int), np.arange(30) // 15),
        )
    )
    for name, (low, high) in each.items():
        assert low < found[name] < high
    assert whole["recall"] is whole["coverage"] is None, "one patient: nothing to draw"
    # Two patients: the mean of both, or of one of them twice.
    assert whole["precision"].low <= found["precision"] <= whole["precision"].high
