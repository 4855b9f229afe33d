"""Paired scores against a plain loop, and the loss of SimCLR against its formula."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from crafts_core.evaluation.downstream.figures import verdict_of
from crafts_core.evaluation.downstream.paired import Marks, Resamples, estimate
from crafts_core.evaluation.downstream.pretraining import contrast, features, pretrained


def marks(seed: int, *, share: float = 0.6, count: int = 40, patients: int = 8) -> Marks:
    rng = np.random.default_rng(seed)
    return Marks(
        is_right_N=rng.random(count) < share,
        patient_N=rng.integers(patients, size=count),
        group_N=rng.integers(3, size=count),
        chance=0.5,
    )


def plain(exams: list[Marks], weight_P: np.ndarray, weight_S: np.ndarray) -> float:
    """The definition, word by word."""
    total = counted = 0.0
    for exam, weight in zip(exams, weight_S, strict=True):
        shares = []
        for group in set(exam.group_N.tolist()):
            rows = [n for n in range(len(exam.group_N)) if exam.group_N[n] == group]
            all_ = sum(weight_P[exam.patient_N[n]] for n in rows)
            right = sum(weight_P[exam.patient_N[n]] * exam.is_right_N[n] for n in rows)
            shares += [right / all_] if all_ else []
        if shares:
            total += weight * sum(shares) / len(shares)
            counted += weight
    return total / counted


def test_scores_are_what_a_plain_loop_finds() -> None:
    exams = [marks(seed) for seed in range(3)]
    resamples = Resamples.draw(8, 3, num_bootstrap=20, seed=0)
    found = resamples.scores(exams)
    expected = [
        plain(exams, *rows) for rows in zip(resamples.weight_BP, resamples.weight_BS, strict=True)
    ]
    assert found == pytest.approx(expected)
    assert (resamples.weight_BP[0] == 1).all()
    assert resamples.weight_BP.sum(axis=1) == pytest.approx(8)


def test_an_interval_covers_patients_and_splits() -> None:
    """Marks that are one for a patient, or one for a split, are as many as there are of these."""
    per_patient = [
        Marks(
            is_right_N=np.arange(80) % 8 < 4,
            patient_N=np.arange(80) % 8,
            group_N=np.zeros(80, dtype=np.int64),
            chance=0.5,
        )
    ] * 3
    per_split = [
        Marks(
            is_right_N=np.full(80, number % 2 == 0),
            patient_N=np.arange(80) % 8,
            group_N=np.zeros(80, dtype=np.int64),
            chance=0.5,
        )
        for number in range(8)
    ]
    spread = math.sqrt(0.25 / 8)
    in_splits = stats.t.ppf(0.95, 7) * math.sqrt(8 / 7) * spread
    for exams, expected in ((per_patient, 1.645 * spread), (per_split, in_splits)):
        resamples = Resamples.draw(8, len(exams), num_bootstrap=2000, seed=0)
        value, (low, high) = estimate(resamples.scores(exams))
        assert value == 0.5
        assert high - low == pytest.approx(2 * expected, rel=0.2)


def test_a_difference_of_nothing_is_told_one_time_in_ten_also_of_few_splits() -> None:
    """Arms that differ by their lessons' luck alone; a plain bootstrap of three tells four."""
    rng, told, repeats = np.random.default_rng(0), 0, 300
    for seed in range(repeats):
        resamples = Resamples.draw(8, 3, num_bootstrap=100, seed=seed)
        one, other = (
            resamples.scores(
                [marks(int(rng.integers(2**31)), share=rng.random(), count=400) for _ in range(3)]
            )
            for _ in range(2)
        )
        interval = estimate(one - other)[1]
        told += verdict_of("both", interval) != "makes no difference that could be seen"
    assert 0.04 < told / repeats < 0.2


def test_arms_that_answer_alike_do_not_differ_however_few_were_asked() -> None:
    exams = [marks(seed, count=10) for seed in range(2)]
    resamples = Resamples.draw(8, 2, num_bootstrap=50, seed=0)
    scores_B = resamples.scores(exams)
    assert estimate(scores_B)[1].low < estimate(scores_B)[1].high
    assert estimate(scores_B - resamples.scores(list(exams))) == (0.0, (0.0, 0.0))


def test_contrast_is_the_formula() -> None:
    """-log of exp(s_ij / t) over the sum of exp(s_ik / t) for all k but i itself."""
    embedding_VE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    unit = embedding_VE / embedding_VE.norm(dim=1, keepdim=True)
    losses = []
    for i in range(6):
        alike = [math.exp(float(unit[i] @ unit[k]) / 0.5) for k in range(6)]
        losses.append(-math.log(alike[(i + 3) % 6] / (sum(alike) - alike[i])))
    assert float(contrast(embedding_VE, 0.5)) == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_network_is_its_seeds_and_learns() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    state = torch.get_rng_state()
    one, again, other, fresh = (
        features(pretrained(images, np.ones(8), steps=steps, seed=seed), images)
        for steps, seed in ((2, 0), (2, 0), (2, 1), (0, 0))
    )
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(one, again)
    assert not np.allclose(one, other)
    assert not np.allclose(one, fresh)
