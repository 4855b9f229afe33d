import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crafts_core.threads import side_by_side
from crafts_privacy.clipping import CLIP_MARGIN
from crafts_privacy.gradients import GroupGradients
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import GridNoise, NoiseSource
from crafts_privacy.optimizers import Momentum
from crafts_privacy.patient_sgd import GroupLoss, PatientLoss, PatientSGD
from crafts_privacy.sampling import PatientSampler, PoissonSampler
from support.noise import FixedSampler, NoNoise, SeededNoise, SeededSampler

C = 0.8
NUM_PATIENTS = 6
NUM_TILES = 4


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers).to(dtype)


def tiles_of(patient: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + patient)
    images = torch.randn(NUM_TILES, 3, 6, 6, generator=generator) * (1 + patient)
    targets = torch.randn(NUM_TILES, 3, generator=generator)
    return images.to(dtype), targets.to(dtype)


def loss_per_tile(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    return (model(images) - targets).square().mean(dim=1)


def mean_loss(model: nn.Module) -> PatientLoss:
    dtype = next(model.parameters()).dtype
    return lambda patient: loss_per_tile(model, *tiles_of(patient, dtype)).mean()


def mechanism(**changes: float) -> Mechanism:
    values = {
        "noise_multiplier": 1.0,
        "max_grad_norm": C,
        "sample_rate": 0.5,
        "expected_patients": 3.0,
    }
    return Mechanism(**(values | changes))


def optimizer(
    model: nn.Module,
    *,
    mech: Mechanism | None = None,
    noise: NoiseSource | None = None,
    sampler: PatientSampler | None = None,
    learning_rate: float = 1.0,
    momentum: float = 0.0,
) -> PatientSGD:
    return PatientSGD(
        dict(model.named_parameters()),
        mech or mechanism(),
        learning_rate=learning_rate,
        optimizer=Momentum(momentum),
        noise=noise or NoNoise(),
        sampler=sampler or FixedSampler(),
    )


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


def clipped_sum(patients: list[int], loss_of: PatientLoss | None = None) -> Tensor:
    """What one step adds up, read off the weights: learning rate 1 and divisor 1 undo the rest.

    Exact only to the float32 spacing of the weights, so compare with tolerance.
    """
    model = make_model()
    before = flat(model)
    mech = mechanism(expected_patients=1.0)
    sgd = optimizer(model, mech=mech, sampler=FixedSampler(patients))
    sgd.step(NUM_PATIENTS, loss_of or mean_loss(model))
    return before - flat(model)


def naive_clipped_sum(patients: list[int]) -> Tensor:
    """Tile by tile, patient by patient, in float64."""
    model = make_model().double()
    total = torch.zeros_like(flat(model))
    for patient in patients:
        images, targets = tiles_of(patient, torch.float64)
        grad = torch.zeros_like(total)
        for tile in range(NUM_TILES):
            model.zero_grad()
            loss_per_tile(model, images[tile : tile + 1], targets[tile : tile + 1]).sum().backward()
            pieces = [parameter.grad for parameter in model.parameters()]
            grad += torch.cat([piece.flatten() for piece in pieces if piece is not None])
        grad /= NUM_TILES
        total += grad * min(1.0, C * (1 - CLIP_MARGIN) / float(grad.norm()))
    return total


class RecordingNoise:
    """Keeps the integer sum it was given, exactly."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.stds: list[float] = []

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        self.sums.append(grid_sum_D.clone())
        self.stds.append(std)


def exact_sum(patients: list[int], scale: float = 1.0) -> tuple[Tensor, float]:
    """The integer sum of one step, and C in grid steps."""
    model, noise = make_model(), RecordingNoise()
    sgd = optimizer(model, noise=noise, sampler=FixedSampler(patients))
    loss_of = mean_loss(model)
    sgd.step(NUM_PATIENTS, lambda patient: scale * loss_of(patient))
    return noise.sums[0], noise.stds[0]


# What the mechanism promises.


@settings(deadline=None, max_examples=25)
@given(
    others=st.lists(st.integers(0, 5), unique=True, max_size=5),
    removed=st.integers(6, 11),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_removing_one_patient_moves_the_clipped_sum_by_at_most_c(
    others: list[int], removed: int, scale: float
) -> None:
    with_patient, sensitivity = exact_sum([*others, removed], scale)
    without_patient, _ = exact_sum(others, scale)
    assert float((with_patient - without_patient).norm()) <= sensitivity


def test_removing_one_patient_reveals_exactly_that_patients_own_contribution() -> None:
    """Floating-point sums would also move the others' roundings."""
    alone, _ = exact_sum([3])
    with_patient, _ = exact_sum([0, 1, 2, 3, 4, 5])
    without_patient, _ = exact_sum([0, 1, 2, 4, 5])
    assert torch.equal(with_patient - without_patient, alone)


def test_noise_is_added_to_whole_grid_steps() -> None:
    """Integer noise hides an integer sum; a fraction beside it would show through."""
    grid_sum, sensitivity = exact_sum([0, 1, 2])
    assert torch.equal(grid_sum, grid_sum.round())
    assert sensitivity >= 2**24


def test_the_sum_does_not_depend_on_order() -> None:
    assert torch.equal(exact_sum([0, 1, 2, 3])[0], exact_sum([3, 1, 0, 2])[0])


def test_clipping_tiles_instead_of_the_patient_would_break_the_bound() -> None:
    """Control: this is why parts are summed before the clip."""
    model = make_model().double()
    images, targets = tiles_of(5, torch.float64)
    total = torch.zeros_like(flat(model))
    for tile in range(NUM_TILES):
        model.zero_grad()
        (100 * loss_per_tile(model, images[tile : tile + 1], targets[tile : tile + 1])).backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        total += grad * min(1.0, C / float(grad.norm()))
    assert float(total.norm()) > C


def test_noise_has_the_declared_size_relative_to_the_bound() -> None:
    model, noise = make_model(), RecordingNoise()
    sgd = optimizer(model, mech=mechanism(noise_multiplier=2.5), noise=noise)
    sgd.step(NUM_PATIENTS, mean_loss(model))
    alone, _ = exact_sum([5], 1e6)  # a clipped patient is C long
    assert noise.stds[0] / float(alone.norm()) == pytest.approx(2.5, rel=1e-5)


def noise_std_of_step(noise_multiplier: float, expected_patients: float) -> float:
    """Measured standard deviation of the weights after an empty step on 40,000 weights."""
    weight = nn.Parameter(torch.zeros(40_000))
    sgd = PatientSGD(
        {"weight": weight},
        mechanism(noise_multiplier=noise_multiplier, expected_patients=expected_patients),
        learning_rate=1.0,
        optimizer=Momentum(),
        noise=GridNoise(),
        sampler=FixedSampler([]),
    )
    sgd.step(NUM_PATIENTS, lambda patient: weight.sum())
    return float(weight.detach().double().std())


@pytest.mark.parametrize(("noise_multiplier", "expected"), [(0.5, 1.0), (1.0, 3.0), (7.0, 40.0)])
def test_realised_noise_is_multiplier_times_bound_over_divisor(
    noise_multiplier: float, expected: float
) -> None:
    realised = noise_std_of_step(noise_multiplier, expected)
    assert realised / (noise_multiplier * C / expected) == pytest.approx(1.0, abs=0.022)


def test_the_noise_measurement_notices_halved_noise() -> None:
    assert noise_std_of_step(0.5, 3.0) / (1.0 * C / 3.0) != pytest.approx(1.0, abs=0.022)


def test_an_empty_sample_is_a_noisy_step() -> None:
    model = make_model()
    before = flat(model)
    sgd = optimizer(model, noise=GridNoise(), sampler=FixedSampler([]))
    sgd.step(NUM_PATIENTS, mean_loss(model))
    assert (flat(model) != before).all()
    assert sgd.steps_taken == 1


def test_the_divisor_is_fixed_whatever_is_drawn() -> None:
    """One patient and two give updates of exactly one and two shares."""
    one = clipped_sum([2])
    both = clipped_sum([2, 2])
    assert torch.allclose(both, 2 * one, atol=1e-6)


def test_the_sampler_is_asked_with_the_mechanisms_rate() -> None:
    asked: list[tuple[int, float]] = []

    class Asking(FixedSampler):
        def sample(self, num_patients: int, sample_rate: float):  # type: ignore[no-untyped-def]
            asked.append((num_patients, sample_rate))
            return super().sample(num_patients, sample_rate)

    model = make_model()
    optimizer(model, sampler=Asking([])).step(17, mean_loss(model))
    assert asked == [(17, 0.5)]


def test_each_step_draws_its_patients_anew() -> None:
    """Amplification by sampling is for samples that are independent from step to step."""

    class OneAfterAnother(FixedSampler):
        def sample(self, num_patients: int, sample_rate: float):  # type: ignore[no-untyped-def]
            return np.array([sgd.steps_taken])

    model, read = make_model(), []
    sgd = optimizer(model, sampler=OneAfterAnother())

    def loss_of(patient: int) -> Tensor:
        read.append(patient)
        return mean_loss(model)(patient)  # type: ignore[return-value]

    for _ in range(3):
        sgd.step(NUM_PATIENTS, loss_of)
    assert read == [1, 2, 3]


# Equal to the reference.


def test_the_patient_loop_equals_the_naive_reference() -> None:
    patients = [0, 2, 5]
    assert torch.allclose(clipped_sum(patients), naive_clipped_sum(patients), atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_parts_of_a_patient_add_up_before_the_clip(chunk: int) -> None:
    model = make_model()

    def parts(patient: int) -> Iterator[Tensor]:
        images, targets = tiles_of(patient)
        for start in range(0, NUM_TILES, chunk):
            piece = slice(start, start + chunk)
            yield loss_per_tile(model, images[piece], targets[piece]).sum() / NUM_TILES

    before = flat(model)
    mech = mechanism(expected_patients=1.0)
    optimizer(model, mech=mech, sampler=FixedSampler([1, 4])).step(NUM_PATIENTS, parts)
    assert torch.allclose(before - flat(model), naive_clipped_sum([1, 4]), atol=2e-6)


NOBODY = 99
"""Who fills a place; anything finite but the same each time."""


def group_loss(model: nn.Module, *, spoil: float | None = None) -> GroupLoss:
    """With ``spoil`` patient 1 holds that number everywhere."""

    def losses(places: Sequence[int | None]) -> Tensor:
        tiles = [tiles_of(NOBODY if patient is None else patient) for patient in places]
        images, targets = (torch.cat(each) for each in zip(*tiles, strict=True))
        if spoil is not None and 1 in places:
            start = places.index(1) * NUM_TILES
            images[start : start + NUM_TILES] = spoil
        return loss_per_tile(model, images, targets) / NUM_TILES

    return losses


def groups_of(model: nn.Module, group_size: int) -> GroupGradients:
    return GroupGradients(
        model, list(model.parameters()), num_patients=group_size, num_tiles=NUM_TILES
    )


@pytest.mark.parametrize("group_size", [1, 2, 5, 7])
def test_a_group_in_one_pass_equals_the_naive_reference(group_size: int) -> None:
    """All layers, norms included, five patients with gradients of very different lengths."""
    model, drawn = make_model(), [0, 1, 2, 4, 5]
    model.eval()
    before = flat(model)
    mech = mechanism(expected_patients=1.0)
    sgd = optimizer(model, mech=mech, sampler=FixedSampler(drawn))
    with groups_of(model, group_size) as gradients:
        sgd.step_in_groups(NUM_PATIENTS, group_loss(model), gradients)
    assert torch.allclose(before - flat(model), naive_clipped_sum(drawn), atol=4e-6)
    assert sgd.event().steps == 1
    assert not any(layer.training for layer in model.modules())


@pytest.mark.parametrize("num_calls", [1, 2, 3])
def test_groups_side_by_side_are_the_same_step_to_the_last_bit(num_calls: int) -> None:
    weights = []
    for number in (1, num_calls):
        model = make_model()
        sgd = optimizer(model, sampler=FixedSampler([0, 1, 2, 4, 5]), noise=NoNoise())
        with groups_of(model, 2) as gradients, side_by_side(number) as run:
            sgd.step_in_groups(NUM_PATIENTS, group_loss(model), gradients, run)
        weights.append(flat(model))
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], flat(make_model()))


def test_every_pass_has_as_many_places_whoever_was_drawn() -> None:
    model, seen = make_model(), []

    def losses(places: Sequence[int | None]) -> Tensor:
        seen.append(list(places))
        return group_loss(model)(places)

    for drawn in ([0, 1, 2, 4, 5], [3], []):
        sgd = optimizer(model, sampler=FixedSampler(drawn))
        with groups_of(model, 3) as gradients:
            sgd.step_in_groups(NUM_PATIENTS, losses, gradients)
    assert seen == [[0, 1, 2], [4, 5, None], [3, None, None]]


def test_a_group_leaves_no_gradient_and_no_hook_behind() -> None:
    model = make_model()
    sgd = optimizer(model, sampler=FixedSampler([0, 1]))
    with groups_of(model, 2) as gradients:
        sgd.step_in_groups(NUM_PATIENTS, group_loss(model), gradients)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_one_bad_patient_of_a_group_leaves_the_others_alone(bad: float) -> None:
    """Otherwise one patient could take the others' share away: more than C."""
    model = make_model()
    before = flat(model)
    sgd = optimizer(model, mech=mechanism(expected_patients=1.0), sampler=FixedSampler([0, 1, 2]))
    with groups_of(model, 3) as gradients:
        sgd.step_in_groups(NUM_PATIENTS, group_loss(model, spoil=bad), gradients)
    assert torch.allclose(before - flat(model), naive_clipped_sum([0, 2]), atol=4e-6)
    assert sgd.num_unusable_patients() == 1


def test_without_privacy_it_is_torch_sgd() -> None:
    model, reference = make_model(), make_model()
    free = Mechanism.without_privacy(sample_rate=1.0, expected_patients=NUM_PATIENTS)
    sgd = optimizer(model, mech=free, learning_rate=0.05, momentum=0.9, noise=GridNoise())
    theirs = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        sgd.step(NUM_PATIENTS, mean_loss(model))
        theirs.zero_grad()
        losses = [loss_per_tile(reference, *tiles_of(p)).mean() for p in range(NUM_PATIENTS)]
        torch.stack(losses).mean().backward()
        theirs.step()
    assert torch.allclose(flat(model), flat(reference), atol=1e-5)


def test_the_optimizer_is_told_the_noise_it_gets() -> None:
    told: list[float] = []

    class Listening(Momentum):
        def direction(self, mean_D: Tensor, noise_std: float) -> Tensor:
            told.append(noise_std)
            return super().direction(mean_D, noise_std)

    model = make_model()
    sgd = PatientSGD(
        dict(model.named_parameters()),
        mechanism(noise_multiplier=2.0, expected_patients=4.0),
        learning_rate=1.0,
        optimizer=Listening(),
        noise=SeededNoise(3),
        sampler=FixedSampler([]),
    )
    before = flat(model)
    sgd.step(NUM_PATIENTS, mean_loss(model))
    assert told == [2.0 * C / 4.0]
    assert float((flat(model) - before).std()) == pytest.approx(told[0], rel=0.15)


def test_the_optimizer_sees_nothing_but_the_noisy_mean() -> None:
    """Momentum over anything else would carry a patient's unclipped gradient on."""
    seen: list[Tensor] = []

    class Listening(Momentum):
        def direction(self, mean_D: Tensor, noise_std: float) -> Tensor:
            seen.append(mean_D.clone())
            return super().direction(mean_D, noise_std)

    model = make_model()
    sgd = PatientSGD(
        dict(model.named_parameters()),
        mechanism(expected_patients=4.0),
        learning_rate=1.0,
        optimizer=Listening(0.9),
        noise=NoNoise(),
        sampler=FixedSampler([1, 4]),
    )
    sgd.step(NUM_PATIENTS, mean_loss(model))
    assert len(seen) == 1
    assert torch.allclose(4.0 * seen[0], naive_clipped_sum([1, 4]), atol=2e-6)


def test_automatic_clipping_counts_every_patient_almost_alike() -> None:
    def scaled(patient: int) -> Tensor:
        return mean_loss(model)(patient) * 10.0 ** (patient - 2)

    lengths = []
    for patient in range(4):
        model = make_model()
        before = flat(model)
        mech = mechanism(expected_patients=1.0, stability=1e-4)
        sgd = optimizer(model, mech=mech, sampler=FixedSampler([patient]))
        sgd.step(NUM_PATIENTS, scaled)
        lengths.append(float((flat(model) - before).norm()))
    assert all(0.97 * C < length <= C * (1 + 1e-5) for length in lengths), lengths


def test_checkpointed_layers_give_the_same_sum() -> None:
    model = make_model()

    def loss_of(patient: int) -> Tensor:
        images, targets = tiles_of(patient)
        output = torch.utils.checkpoint.checkpoint(model, images, use_reentrant=False)
        return (output - targets).square().mean(dim=1).mean()

    before = flat(model)
    mech = mechanism(expected_patients=1.0)
    optimizer(model, mech=mech, sampler=FixedSampler([0, 3])).step(NUM_PATIENTS, loss_of)
    assert torch.allclose(before - flat(model), naive_clipped_sum([0, 3]), atol=2e-6)


def test_seeded_runs_repeat_to_the_bit() -> None:
    results = []
    for _ in range(2):
        model = make_model()
        sgd = optimizer(model, noise=SeededNoise(1), sampler=SeededSampler(2), momentum=0.5)
        for _ in range(3):
            sgd.step(NUM_PATIENTS, mean_loss(model))
        results.append(flat(model))
    assert torch.equal(results[0], results[1])


# Odd patients, odd precisions.


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_patient_that_is_not_finite_contributes_zero(bad: float) -> None:
    good = clipped_sum([0, 1])
    model = make_model()
    before = flat(model)
    sgd = optimizer(model, mech=mechanism(expected_patients=1.0), sampler=FixedSampler([0, 9, 1]))
    loss_of = mean_loss(model)
    sgd.step(12, lambda p: loss_of(0) * bad if p == 9 else loss_of(p))
    assert torch.equal(before - flat(model), good)
    assert sgd.num_unusable_patients() == 1


def test_one_bad_part_drops_the_whole_patient() -> None:
    model = make_model()
    loss_of = mean_loss(model)
    before = flat(model)
    sgd = optimizer(model, sampler=FixedSampler([0]))
    sgd.step(NUM_PATIENTS, lambda patient: [loss_of(0), loss_of(1) * math.nan, loss_of(2)])
    assert torch.equal(before, flat(model))


def test_a_patient_without_tiles_contributes_zero() -> None:
    model = make_model()
    before = flat(model)
    optimizer(model).step(NUM_PATIENTS, lambda patient: [])
    assert torch.equal(before, flat(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_patients_are_bounded_in_float64(dtype: torch.dtype) -> None:
    model, noise = make_model(dtype), RecordingNoise()
    sgd = optimizer(model, noise=noise, sampler=FixedSampler([4]))
    loss_of = mean_loss(model)
    sgd.step(NUM_PATIENTS, lambda patient: 50 * loss_of(patient))
    sensitivity = noise.stds[0]
    assert 0.99 * sensitivity < float(noise.sums[0].norm()) <= sensitivity


def test_half_precision_weights_keep_small_updates() -> None:
    """A thousand updates below one bfloat16 spacing add up in the float32 master copy."""
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    free = Mechanism.without_privacy(sample_rate=1.0, expected_patients=1.0)
    sgd = PatientSGD(
        {"weight": weight},
        free,
        learning_rate=1e-4,
        optimizer=Momentum(),
        noise=NoNoise(),
        sampler=FixedSampler([0]),
    )
    for _ in range(1000):
        sgd.step(1, lambda patient: weight.float().sum())
    assert torch.allclose(weight.float(), torch.full((8,), 0.9), atol=4e-3)


def test_parameters_that_the_loss_does_not_reach_get_noise_only() -> None:
    used, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    sgd = PatientSGD(
        {"used": used, "unused": unused},
        mechanism(),
        learning_rate=1.0,
        optimizer=Momentum(),
        noise=NoNoise(),
        sampler=FixedSampler([0]),
    )
    sgd.step(1, lambda patient: used.sum())
    assert torch.equal(unused.detach(), torch.zeros(3))
    assert (used.detach() < 0).all()


def test_an_adapter_moves() -> None:
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer(model).step(NUM_PATIENTS, mean_loss(model))
    after = list(model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


# Hard to misuse.


def test_no_patients_gradient_stays_behind() -> None:
    model = make_model()
    optimizer(model).step(NUM_PATIENTS, mean_loss(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_outside_the_adapter_get_no_gradient() -> None:
    model = make_model()
    head = dict(model.named_parameters())["4.weight"]
    sgd = PatientSGD(
        {"head": head},
        mechanism(),
        learning_rate=0.1,
        optimizer=Momentum(),
        noise=NoNoise(),
        sampler=FixedSampler(),
    )
    sgd.step(NUM_PATIENTS, mean_loss(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_in_a_loss_leaves_the_weights_alone_and_still_counts() -> None:
    model = make_model()
    before = flat(model)
    sgd = optimizer(model, noise=GridNoise())
    loss_of = mean_loss(model)

    def failing(patient: int) -> Tensor:
        if patient == 3:
            raise OSError("disk gone")
        return loss_of(patient)  # type: ignore[return-value]

    with pytest.raises(OSError, match="disk gone"):
        sgd.step(NUM_PATIENTS, failing)
    assert torch.equal(before, flat(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sgd.steps_taken == 1


def test_a_failed_step_leaves_nothing_for_the_next_one() -> None:
    model = make_model()
    loss_of = mean_loss(model)
    sgd = optimizer(model, mech=mechanism(expected_patients=1.0), sampler=FixedSampler([0, 1]))

    def failing(patient: int) -> Tensor:
        if patient == 1:
            raise OSError
        return loss_of(patient)  # type: ignore[return-value]

    with pytest.raises(OSError):
        sgd.step(NUM_PATIENTS, failing)
    before = flat(model)
    sgd.step(NUM_PATIENTS, loss_of)
    assert torch.equal(before - flat(model), clipped_sum([0, 1]))


def test_the_event_says_what_ran() -> None:
    model = make_model()
    mech = mechanism(noise_multiplier=1.5, sample_rate=0.25)
    sgd = optimizer(model, mech=mech, sampler=FixedSampler([]))
    for _ in range(3):
        sgd.step(NUM_PATIENTS, mean_loss(model))
    assert sgd.event() == mech.event(3)
    assert (sgd.event().noise_multiplier, sgd.event().sample_rate) == (1.5, 0.25)


def test_without_privacy_no_noise_is_drawn_and_the_event_has_none() -> None:
    model, noise = make_model(), RecordingNoise()
    free = Mechanism.without_privacy(sample_rate=1.0, expected_patients=2.0, max_grad_norm=C)
    sgd = optimizer(model, mech=free, noise=noise)
    sgd.step(NUM_PATIENTS, mean_loss(model))
    assert noise.sums == []
    assert sgd.event().noise_multiplier == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"max_grad_norm": math.inf},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": math.nan},
        {"sample_rate": 0.0},
        {"sample_rate": 1.5},
        {"expected_patients": 0.0},
        {"expected_patients": math.nan},
    ],
)
def test_a_mechanism_that_promises_nothing_cannot_be_made(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        mechanism(**changes)


def test_noise_cannot_be_claimed_without_privacy() -> None:
    with pytest.raises(ValueError, match="noise_multiplier 0"):
        Mechanism(
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            sample_rate=0.5,
            expected_patients=1.0,
            private=False,
        )


@pytest.mark.parametrize(("learning_rate", "momentum"), [(0.0, 0.0), (math.nan, 0.0), (1.0, 1.0)])
def test_bad_rates_are_refused(learning_rate: float, momentum: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        optimizer(make_model(), learning_rate=learning_rate, momentum=momentum)


def test_frozen_missing_and_integer_parameters_are_refused() -> None:
    for parameters, word in [
        ({}, "at least one"),
        ({"a": nn.Parameter(torch.ones(1), requires_grad=False)}, "frozen"),
    ]:
        with pytest.raises(ValueError, match=word):
            PatientSGD(
                parameters,
                mechanism(),
                learning_rate=1.0,
                optimizer=Momentum(),
                noise=GridNoise(),
                sampler=PoissonSampler(),
            )


def test_a_loss_per_tile_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="scalar"):
        optimizer(model).step(1, lambda patient: loss_per_tile(model, *tiles_of(patient)))


@pytest.mark.gpu
def test_the_bound_holds_on_a_gpu() -> None:
    model, noise = make_model().cuda(), RecordingNoise()
    sgd = optimizer(model, noise=noise, sampler=FixedSampler([4]))
    images, targets = (tensor.cuda() for tensor in tiles_of(4))
    sgd.step(NUM_PATIENTS, lambda patient: 50 * loss_per_tile(model, images, targets).mean())
    assert float(noise.sums[0].norm()) <= noise.stds[0]
