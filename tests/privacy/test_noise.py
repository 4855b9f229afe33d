import numpy as np
import pytest
import torch
from scipy import stats

from crafts_privacy.keystream import Stream, key_stream
from crafts_privacy.noise import (
    MAX_STD,
    ExactNoise,
    GridNoise,
    add_gaussian_integers_,
    standard_normals,
)

N = 200_000


def noise_of(std: float, num: int = N) -> torch.Tensor:
    values = torch.zeros(num, dtype=torch.float64)
    GridNoise().add_(values, std)
    return values


def words_in_turn(*words: list[int]) -> Stream:
    """Given words, a list for each call."""
    calls = iter(words)

    def stream(num: int) -> torch.Tensor:
        given = np.array(next(calls), dtype=np.uint64)
        assert len(given) == num
        return torch.from_numpy(given.view(np.int64))

    return stream


def looks_gaussian(values: np.ndarray, std: float) -> bool:
    """Two-sided: mean and variance within 6 of their own standard errors, shape by KS."""
    mean_error = abs(values.mean()) / (std / np.sqrt(values.size))
    variance_error = abs(values.var() / std**2 - 1) / np.sqrt(2 / values.size)
    shape = stats.kstest(values / std, "norm").pvalue
    return bool(mean_error < 6 and variance_error < 6 and shape > 1e-7)


@pytest.mark.parametrize("std", [1000.0, 2.0**24, 1e12])
def test_noise_is_gaussian_with_the_declared_std(std: float) -> None:
    assert looks_gaussian(noise_of(std).numpy(), std)


@pytest.mark.parametrize("std", [2.0**24, 2.0**31, MAX_STD])
def test_exact_noise_is_whole_gaussian_and_around_what_is_there(std: float) -> None:
    """Also where the noise is longer than 32 bits: what is cut off there is the sum without it."""
    values = torch.full((20_000,), 7.0, dtype=torch.float64)
    ExactNoise().add_(values, std)
    assert torch.equal(values, values.round())
    assert looks_gaussian(values.numpy() - 7.0, std)


def test_small_exact_noise_is_the_discrete_gaussian() -> None:
    """Its mass function is proportional to exp(-k^2 / 2 std^2): not the rounded Gaussian's."""
    values = torch.zeros(40_000, dtype=torch.float64)
    ExactNoise().add_(values, 1.0)
    support = np.arange(-8, 9)
    mass = np.exp(-(support**2) / 2)
    mass /= mass.sum()
    for integer in range(-3, 4):
        expected = mass[support == integer].item()
        error = abs((values.numpy() == integer).mean() - expected) / np.sqrt(expected / 40_000)
        assert error < 6


@pytest.mark.parametrize("factor", [0.5, 0.97, 1.03])
def test_the_statistical_test_notices_a_wrong_std(factor: float) -> None:
    assert not looks_gaussian(noise_of(1e6 * factor).numpy(), 1e6)


def test_noise_is_whole_grid_steps() -> None:
    values = noise_of(2.0**24)
    assert torch.equal(values, values.round())


def test_small_noise_has_the_distribution_of_a_rounded_gaussian() -> None:
    values = noise_of(2.0).numpy()
    for integer in range(-4, 5):
        expected = stats.norm.cdf((integer + 0.5) / 2) - stats.norm.cdf((integer - 0.5) / 2)
        error = abs((values == integer).mean() - expected) / np.sqrt(expected / N)
        assert error < 6


def test_noise_is_added_to_what_is_there() -> None:
    values = torch.full((N,), 2.0**40, dtype=torch.float64)
    GridNoise().add_(values, 100.0)
    assert looks_gaussian((values - 2.0**40).numpy(), 100.0)


def test_noise_is_fresh_each_time() -> None:
    first, second = noise_of(1e6), noise_of(1e6)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 6 / np.sqrt(N)


def test_neighbouring_coordinates_are_independent() -> None:
    values = noise_of(1e6)
    assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 0.015


def test_no_seed_reaches_the_noise() -> None:
    torch.manual_seed(0)
    first = noise_of(1e6, 10)
    torch.manual_seed(0)
    assert not torch.equal(first, noise_of(1e6, 10))


def test_noise_covers_every_chunk() -> None:
    values = noise_of(1e9, (1 << 20) * 2 + 17)
    assert (values == 0).sum() < 10
    assert float(values[-17:].abs().max()) > 0


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (2**63, 0.6744897501960817),  # tail probability 1/4 on one side
        (2**63 + 1, -0.6744897501960817),  # the lowest bit is the sign
        (2**64 - 1, 0.0),
    ],
)
def test_normals_are_the_inverse_of_their_bits(word: int, expected: float) -> None:
    values = standard_normals(1, words_in_turn([word], []))
    assert values.item() == pytest.approx(expected, abs=1e-9)


def test_normals_are_scipys_inverse_of_the_normal_distribution() -> None:
    """From the middle to where a second word takes over, to a ten thousandth of a grid step."""
    tails = [*np.geomspace(2**40, 2**53 - 1, 2000).astype(np.uint64), 2**40 - 1, 2**40]
    words = [int(tail) << 11 for tail in tails]
    values = standard_normals(len(words), words_in_turn(words, [2**63]))
    expected = stats.norm.isf([(float(tail) + 0.5) * 2.0**-54 for tail in tails])
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-4 * 2.0**-24)


def test_the_far_tail_takes_its_resolution_from_a_second_word() -> None:
    """Leading bits all zero: 53 more bits decide, down to 2**-108 on one side."""
    values = standard_normals(1, words_in_turn([0], [0]))
    assert values.item() == pytest.approx(stats.norm.isf(2.0**-108), rel=1e-9)


@pytest.mark.parametrize("std", [0.0, 0.5, -1.0, float("nan"), float("inf"), 2.0**49])
def test_a_std_that_the_grid_cannot_hold_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="standard deviation"):
        GridNoise().add_(torch.zeros(2, dtype=torch.float64), std)


def test_a_float32_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        add_gaussian_integers_(torch.zeros(2), 10.0, key_stream(torch.device("cpu")))


def test_an_empty_vector_needs_no_noise() -> None:
    GridNoise().add_(torch.zeros(0, dtype=torch.float64), 10.0)


@pytest.mark.gpu
def test_noise_on_a_gpu_is_gaussian_whole_and_fresh() -> None:
    values = torch.zeros((1 << 23) + 17, dtype=torch.float64, device="cuda")
    GridNoise().add_(values, 2.0**24)
    first = values.cpu().numpy()
    assert looks_gaussian(first[-N:], 2.0**24)
    assert (first == first.round()).all()
    GridNoise().add_(values.zero_(), 2.0**24)
    assert abs(np.corrcoef(first[:N], values[:N].cpu().numpy())[0, 1]) < 6 / np.sqrt(N)
