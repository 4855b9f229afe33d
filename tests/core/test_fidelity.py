"""Distances against slow obvious loops and closed forms; intervals that respect patients."""

import itertools

import numpy as np
import pytest

from crafts_core.evaluation.discrepancy import Discrepancy
from crafts_core.evaluation.fidelity import Reference, matched_floor, mmd_to_reference, real_floor
from crafts_core.evaluation.known_distances import frechet_distance
from crafts_core.evaluation.resampling import Interval, halves, mean_interval, repeats


def _tiles(
    seed: int, patients: int, tiles: int, *, spread: float = 0.0, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Features, and the patients whose they are; tiles of a patient lie around a centre."""
    rng = np.random.default_rng(seed)
    own = np.repeat(rng.standard_normal((patients, 6)) * spread, tiles, axis=0)
    names = np.repeat([f"p{place:03}" for place in range(patients)], tiles)
    return rng.standard_normal((patients * tiles, 6)) + own + shift, names


def _reference(seed: int = 0, patients: int = 12, tiles: int = 5, spread: float = 0.0) -> Reference:
    return Reference.fit(*_tiles(seed, patients, tiles, spread=spread))


def _dealt(reference: Reference, count: int) -> np.ndarray:
    """A patient for each of so many images, in turn."""
    return np.array([reference.names[row % reference.num_patients] for row in range(count)])


def slow_mmd(reference: Reference, x: list, y: list) -> float:
    """Over all pairs of (patient, features) of different patients."""

    def mean(first: list, second: list) -> float:
        values = []
        for (patient, a), (other, b) in itertools.product(first, second):
            if patient != other:
                square = float(((a - b) ** 2).sum()) / (2 * reference.median_square)
                values.append(sum(np.exp(-square / width) for width in (0.25, 0.5, 1, 2, 4)) / 5)
        return float(np.mean(values))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_mmd_is_the_double_sum_over_pairs_of_different_patients() -> None:
    reference = _reference(patients=5, tiles=3)
    images = np.random.default_rng(1).standard_normal((8, 6)) + 1
    patients = np.array([reference.names[place] for place in (0, 0, 0, 1, 1, 2, 3, 3)])
    fast, _ = mmd_to_reference(images, patients, reference, num_bootstrap=20, seed=0)
    x = list(zip(reference.places_of(patients), reference.scale(images), strict=True))
    y = list(zip(reference.patient_M, reference.features_MD, strict=True))
    assert fast == pytest.approx(slow_mmd(reference, x, y), abs=1e-12)


def test_a_resample_is_the_double_sum_over_patients_written_out() -> None:
    """A patient that is drawn thrice is there thrice, and its repeats are not paired."""
    reference = _reference(patients=5, tiles=3)
    images = reference.scale(np.random.default_rng(1).standard_normal((8, 6)) + 1)
    patient_N = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    weight_P = np.array([3.0, 1.0, 0.0, 1.0, 0.0])
    found = Discrepancy.of(
        reference.kernel(images, images),
        reference.kernel(reference.features_MD, reference.features_MD),
        reference.kernel(images, reference.features_MD),
        patient_N,
        reference.patient_M,
    ).squared(weight_P)
    drawn = [0, 0, 0, 1, 3]
    x = [(p, f) for own in drawn for p, f in zip(patient_N, images, strict=True) if p == own]
    y = [
        (p, f)
        for own in drawn
        for p, f in zip(reference.patient_M, reference.features_MD, strict=True)
        if p == own
    ]
    assert found == pytest.approx(slow_mmd(reference, x, y), abs=1e-12)


def test_the_floor_is_the_mean_over_halves_of_the_double_sum() -> None:
    reference = _reference(patients=6, tiles=2, spread=1.0)
    rng, values = np.random.default_rng(4), []
    for _ in range(5):
        x, y = (
            [(reference.patient_M[row], reference.features_MD[row]) for row in rows]
            for rows in halves(reference.patient_M, rng)
        )
        assert not {patient for patient, _ in x} & {patient for patient, _ in y}
        values.append(slow_mmd(reference, x, y))
    assert real_floor(reference, num_splits=5, seed=4)[0] == pytest.approx(np.mean(values))


def test_a_floor_without_a_change_is_the_plain_one() -> None:
    features, names = _tiles(0, 12, 4, spread=1.0)
    reference = Reference.fit(features, names)
    same = matched_floor(reference, lambda first, _: features[first], num_splits=9, seed=1)
    plain = real_floor(reference, num_splits=9, seed=1)
    assert np.hstack(same) == pytest.approx(np.hstack(plain))
    moved = matched_floor(reference, lambda first, _: features[first] + 1, num_splits=9, seed=1)
    assert moved[0] > same[0] + 0.1


@pytest.mark.parametrize("patients, tiles", [(8, 2), (8, 20), (40, 4)])
def test_real_tiles_of_other_patients_lie_at_zero_however_many(patients: int, tiles: int) -> None:
    """With pairs of one patient among the others, 8 patients of 20 tiles would lie at 0.2."""
    floors = [
        real_floor(_reference(seed, patients, tiles, spread=1.5), num_splits=60, seed=0)
        for seed in range(8)
    ]
    assert abs(np.mean([floor for floor, _ in floors])) < 0.01
    assert all(interval.low < 0 < interval.high for _, interval in floors)


def test_new_patients_of_the_same_kind_lie_at_zero_on_average() -> None:
    """Images as good as real: of each patient's kind, from patients that are not there."""
    values = []
    for seed in range(60):
        reference = _reference(seed, patients=10, tiles=6, spread=1.0)
        images, _ = _tiles(1000 + seed, 10, 6, spread=1.0)
        patients = np.repeat(reference.names, 6)
        values.append(mmd_to_reference(images, patients, reference, num_bootstrap=20, seed=0)[0])
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(60)
    assert abs(np.mean(values)) < 0.01


@pytest.mark.parametrize("patients", [4, 5])
@pytest.mark.parametrize("drawn_of", [2, 4])
def test_few_patients_of_one_tile_have_an_interval(patients: int, drawn_of: int) -> None:
    """Some bootstrap samples hold one patient alone, on one side at least: no pair to measure."""
    reference = _reference(patients=patients, tiles=1)
    images = np.random.default_rng(1).standard_normal((16, 6))
    names = _dealt(reference, 16)[np.arange(16) % drawn_of]
    for seed in range(5):
        _, interval = mmd_to_reference(images, names, reference, num_bootstrap=200, seed=seed)
        assert np.isfinite(interval).all()


@pytest.mark.parametrize("tiles", [1, 4, 20])
def test_the_bootstrap_lies_around_the_estimate(tiles: int) -> None:
    """Paired with its own repeats, a patient would shift it upwards, more with more tiles."""
    reference = _reference(patients=15, tiles=tiles, spread=1.5)
    images, _ = _tiles(3, 15, 8, shift=0.7)
    found = Discrepancy.of(
        reference.kernel(scaled := reference.scale(images), scaled),
        reference.kernel(reference.features_MD, reference.features_MD),
        reference.kernel(scaled, reference.features_MD),
        np.repeat(np.arange(15), 8),
        reference.patient_M,
    )
    rng = np.random.default_rng(0)
    resampled = [found.squared(repeats(rng, 15)) for _ in range(400)]
    assert np.mean(resampled) == pytest.approx(found.squared(), abs=0.25 * np.std(resampled))


@pytest.mark.exhaustive
def test_intervals_hold_the_true_distance_about_as_often_as_they_say() -> None:
    """The true one is that of very many patients; a reference of its own each time."""
    scale = _reference(99, patients=300, tiles=1, spread=1.0)

    def estimate(seed: int, patients: int, bootstrap: int) -> tuple[float, Interval]:
        real, names = _tiles(seed, patients, 4, spread=1.0)
        images, _ = _tiles(seed + 5000, patients, 4, spread=1.0, shift=0.5)
        x, y = scale.scale(images), scale.scale(real)
        place = np.unique(names, return_inverse=True)[1]
        kernels = scale.kernel(x, x), scale.kernel(y, y), scale.kernel(x, y)
        found = Discrepancy.of(*kernels, place, place)
        return found.squared(), found.interval(bootstrap, seed)

    truth = np.mean([estimate(seed, 150, 20)[0] for seed in range(30)])
    intervals = [estimate(100 + seed, 20, 200)[1] for seed in range(200)]
    share = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.8 < share < 0.97


def test_intervals_are_wider_when_tiles_of_a_patient_are_alike() -> None:
    widths = []
    for spread in (0.0, 2.0):
        reference = _reference(patients=15, tiles=20, spread=spread)
        images = np.random.default_rng(4).standard_normal((300, 6))
        _, interval = mmd_to_reference(
            images, _dealt(reference, 300), reference, num_bootstrap=200, seed=0
        )
        widths.append(interval.high - interval.low)
    assert widths[1] > 1.5 * widths[0]


def test_frechet_distance_of_gaussians_has_its_closed_form() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((200_000, 3)) * [1.0, 2.0, 3.0]
    y = rng.standard_normal((200_000, 3)) * [2.0, 2.0, 1.0] + [1.0, 0.0, -2.0]
    closed = (1 + 0 + 4) + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    assert frechet_distance(x, y) == pytest.approx(closed, rel=0.02)


def test_frechet_distance_to_itself_is_zero_even_with_fewer_rows_than_features() -> None:
    x = np.random.default_rng(6).standard_normal((20, 50))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_one_exploding_feature_does_not_decide() -> None:
    reference = _reference()
    x = np.random.default_rng(7).standard_normal((60, 6))
    x[:, 0] = 1e12
    found, _ = mmd_to_reference(x, _dealt(reference, 60), reference, num_bootstrap=20, seed=0)
    assert found < 1.0


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        Reference.fit(np.zeros((6, 3)), np.array(["a", "a", "b", "b", "c", "c"]))
    reference = _reference()
    for names, words in (("p000", "at least two patients"), ("q", "of the reference, got 'q'")):
        with pytest.raises(ValueError, match=words):
            mmd_to_reference(
                np.zeros((9, 6)), np.repeat(names, 9), reference, num_bootstrap=20, seed=0
            )


def test_images_that_belong_together_are_resampled_together() -> None:
    """Five copies of each image are no more evidence; taken one by one they would seem to be."""
    reference = _reference(patients=20)
    images, patients = np.random.default_rng(4).standard_normal((20, 6)) + 1, _dealt(reference, 20)
    once = mmd_to_reference(images, patients, reference, num_bootstrap=100, seed=0)
    often = mmd_to_reference(
        np.repeat(images, 5, axis=0), np.repeat(patients, 5), reference, num_bootstrap=100, seed=0
    )
    assert np.hstack(often) == pytest.approx(np.hstack(once))


def test_images_of_elsewhere_are_nobodys_tiles() -> None:
    """Their pairs all count, and a patient of both sides is refused."""
    reference = _reference(patients=5, tiles=3)
    images = np.random.default_rng(1).standard_normal((6, 6)) + 1
    names = np.array(["x", "x", "y", "y", "z", "z"])
    found, _ = mmd_to_reference(images, names, reference, num_bootstrap=20, seed=0, are_others=True)
    x = list(zip(names, reference.scale(images), strict=True))
    y = list(zip(reference.patient_M, reference.features_MD, strict=True))
    assert found == pytest.approx(slow_mmd(reference, x, y))
    with pytest.raises(ValueError, match="of elsewhere"):
        reference.places_of(np.array(["x", reference.names[0]]), are_others=True)


def test_an_interval_of_a_mean_draws_whole_patients() -> None:
    """With tiles of a patient alike, twenty copies of each row tell no more than one."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(30)
    once = mean_interval(values, np.arange(30), num_bootstrap=500, seed=0)
    often = mean_interval(values.repeat(20), np.arange(30).repeat(20), num_bootstrap=500, seed=0)
    assert often == pytest.approx(once)
    error = values.std() / np.sqrt(30)
    assert once.high - once.low == pytest.approx(2 * 1.645 * error, rel=0.15)
    assert mean_interval(values, np.zeros(30, int), num_bootstrap=20, seed=0) is None


def test_tiles_that_are_nearly_all_alike_have_no_distance() -> None:
    features, names = _tiles(0, 12, 5)
    features[:50] = 0.0
    with pytest.raises(ValueError, match="look the same; take out blank ones"):
        Reference.fit(features, names)
