import numpy as np
import pytest
from scipy import stats

from crafts_privacy.sampling import PoissonSampler, poisson_sample

NUM_PATIENTS, DRAWS = 50, 4000


def inclusion_matrix(rate: float, draws: int = DRAWS) -> np.ndarray:
    drawn = np.zeros((draws, NUM_PATIENTS), dtype=bool)
    for row in drawn:
        row[PoissonSampler().sample(NUM_PATIENTS, rate)] = True
    return drawn


def is_poisson(drawn: np.ndarray, rate: float) -> bool:
    """Each patient at ``rate``, and batch sizes as varied as independent draws make them."""
    share = stats.binomtest(int(drawn.sum()), drawn.size, rate).pvalue
    each = drawn.mean(axis=0)
    spread = np.abs(each - rate) / np.sqrt(rate * (1 - rate) / len(drawn))
    sizes = drawn.sum(axis=1)
    variance = sizes.var() / (NUM_PATIENTS * rate * (1 - rate))
    return bool(share > 1e-7 and spread.max() < 6 and 0.85 < variance < 1.15)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_patients_are_drawn_independently_at_the_rate(rate: float) -> None:
    assert is_poisson(inclusion_matrix(rate), rate)


def test_the_check_notices_shuffled_batches_of_fixed_size() -> None:
    generator = np.random.default_rng(1)
    drawn = np.zeros((DRAWS, NUM_PATIENTS), dtype=bool)
    for row in drawn:
        row[generator.permutation(NUM_PATIENTS)[:15]] = True
    assert not is_poisson(drawn, 0.3)


def test_the_check_notices_a_wrong_rate() -> None:
    assert not is_poisson(inclusion_matrix(0.31), 0.3)


def test_rate_one_takes_everybody() -> None:
    assert PoissonSampler().sample(7, 1.0).tolist() == list(range(7))


def test_a_sample_may_be_empty() -> None:
    assert PoissonSampler().sample(5, 1e-15).tolist() == []
    assert PoissonSampler().sample(0, 0.5).tolist() == []


def test_the_threshold_is_exact_to_the_last_of_53_bits() -> None:
    """At rate 1/4 the 53-bit value 2**51 - 1 is drawn and 2**51 is not."""
    words = np.array([(2**51 - 1) << 11, 2**51 << 11], dtype=np.uint64).tobytes()
    assert poisson_sample(2, 0.25, lambda num: words).tolist() == [0]


def test_two_samples_differ() -> None:
    first = PoissonSampler().sample(200, 0.5).tolist()
    assert first != PoissonSampler().sample(200, 0.5).tolist()


@pytest.mark.parametrize(("num", "rate"), [(-1, 0.5), (3, 0.0), (3, 1.01), (3, float("nan"))])
def test_impossible_samples_are_refused(num: int, rate: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        PoissonSampler().sample(num, rate)
