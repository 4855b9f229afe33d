"""Steps over many sites are one step over everybody's patients, to the bit; and sums leave once."""

import gc
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crafts_privacy.clipping import grid_step
from crafts_privacy.held_sum import HeldStep, HeldSum
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.optimizers import AdamBC, Momentum, Optimizer
from crafts_privacy.patient_sgd import PatientSGD
from crafts_privacy.secure_aggregation.fixed_point import from_group
from crafts_privacy.secure_aggregation.masking import Group, add_masks_, add_up_
from crafts_privacy.secure_aggregation.shares import own_noise_multiplier, total_noise_multiplier
from support.noise import FixedSampler, NoNoise, RecordedSums, SeededNoise
from support.sums import members_of, sum_sites

C, RATE, BITS, STEPS, LEARNING_RATE = 0.5, 0.4, 18, 5, 0.3
PATIENTS = 4
"""Of each site; each declares another number."""
PAIR = [(bytes(32), True)]


class Scripted:
    """Who is drawn in each step, the same at a site and where everybody's patients lie together."""

    def __init__(self, site: int | None, num_sites: int) -> None:
        self._sites = range(num_sites) if site is None else [site]
        self._step = 0

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        self._step += 1
        drawn = [
            PATIENTS * place + patient
            for place, site in enumerate(self._sites)
            for patient in range(PATIENTS)
            if np.random.default_rng([self._step, site, patient]).random() < RATE
        ]
        return np.array(drawn, dtype=np.int64)


class Shares:
    """The shares of all sites, one after the other, as one source of noise."""

    def __init__(self, num_sites: int, own: float) -> None:
        self._sources = [SeededNoise(site) for site in range(num_sites)]
        self._std = own * C / grid_step(C, BITS)

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        for source in self._sources:
            source.add_(grid_sum_D, self._std)


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(sorted(model.named_parameters()))


def loss_of(model: nn.Module, patient: int) -> Tensor:
    """Of a patient of the pooled cohort, by number."""
    generator = torch.Generator().manual_seed(patient)
    images = torch.randn(3, 6, generator=generator) * (1 + patient % 7)
    return model(images).square().mean()


def mechanism(noise_multiplier: float, expected_patients: float) -> Mechanism:
    return Mechanism(
        noise_multiplier=noise_multiplier,
        max_grad_norm=C,
        sample_rate=RATE,
        expected_patients=expected_patients,
    )


def pooled_weights(num_sites: int, own: float, expected: float, optimizer: Optimizer) -> Tensor:
    model = make_model()
    sgd = PatientSGD(
        parameters_of(model),
        mechanism(total_noise_multiplier([own] * num_sites), expected),
        learning_rate=LEARNING_RATE,
        optimizer=optimizer,
        noise=Shares(num_sites, own),
        sampler=Scripted(None, num_sites),
        grid_bits=BITS,
    )
    for _ in range(STEPS):
        sgd.step(PATIENTS * num_sites, lambda patient: loss_of(model, patient))
    return torch.cat([parameter.detach().flatten() for parameter in parameters_of(model).values()])


def distributed_weights(
    num_sites: int, own: float, expected: float, make_optimizer: Callable[[], Optimizer]
) -> Tensor:
    """Sites that share nothing but masked vectors; the optimizer starts anew from its state."""
    sites = sum_sites(num_sites)
    names, state = sorted(sites), {}
    model = make_model()
    flat_D = torch.cat([each.detach().flatten() for each in parameters_of(model).values()])
    steps = [
        HeldStep(
            parameters_of(model),
            mechanism(1.0, expected),
            noise=SeededNoise(number),
            sampler=Scripted(number, num_sites),
            grid_bits=BITS,
        )
        for number in range(num_sites)
    ]
    for step in range(STEPS):
        nn.utils.vector_to_parameters(flat_D, list(parameters_of(model).values()))
        sites = sum_sites(num_sites, request=f"{step}" * 64)
        total: Group = np.zeros(len(flat_D), dtype=np.uint32)
        for number, (name, held_step) in enumerate(zip(names, steps, strict=True)):
            held_step.step(
                PATIENTS,
                lambda patient, number=number: loss_of(model, PATIENTS * number + patient),
            )
            members = members_of(sites, names, name)
            pairs = sites[name].mask_key.pair_keys(name, members)
            add_up_(total, held_step.take().release(own, pairs))
        mean_D = from_group(total) * (grid_step(C, BITS) / expected)
        optimizer = make_optimizer()
        optimizer.load_state(state)
        noise_std = total_noise_multiplier([own] * num_sites) * (C / expected)
        direction_D = optimizer.direction(mean_D, noise_std)
        state = optimizer.state()
        flat_D = torch.add(flat_D, direction_D, alpha=-LEARNING_RATE)
    return flat_D


@pytest.mark.slow
@pytest.mark.parametrize("num_sites", [3, 10, 30])
@pytest.mark.parametrize("make_optimizer", [lambda: Momentum(0.6), lambda: AdamBC(0.8, 0.95)])
def test_a_federation_is_one_cohort_to_the_last_bit(
    num_sites: int, make_optimizer: Callable[[], Optimizer]
) -> None:
    own = own_noise_multiplier(2.0, num_members=num_sites, colluding_sites=1)
    expected = RATE * sum(site.declared_patients for site in sum_sites(num_sites).values())
    pooled = pooled_weights(num_sites, own, expected, make_optimizer())
    federated = distributed_weights(num_sites, own, expected, make_optimizer)
    assert torch.equal(pooled, federated)
    start = torch.cat([each.detach().flatten() for each in parameters_of(make_model()).values()])
    assert not torch.equal(start, federated)


def held_step(noise: object | None = None, model: nn.Module | None = None) -> HeldStep:
    return HeldStep(
        parameters_of(model or make_model()),
        mechanism(1.0, 3.0),
        noise=noise or NoNoise(),
        sampler=FixedSampler(),
        grid_bits=BITS,
    )


def test_a_sum_is_without_noise_until_it_leaves_and_then_has_its_share() -> None:
    """Both noise sources see the same sum; only the one of ``release`` is asked, for its share."""
    seen = RecordedSums()
    step = held_step(seen)
    model = make_model()
    step.step(PATIENTS, lambda patient: loss_of(model, patient))
    assert seen.sums == []
    plain = step.take().release(1.5, PAIR)
    add_masks_(plain, [(bytes(32), False)])
    assert len(seen.sums) == 1
    assert torch.equal(from_group(plain), seen.sums[0])


@pytest.mark.parametrize(("num_sites", "colluding"), [(3, 1), (10, 2)])
def test_the_noise_of_an_opened_sum_has_the_variance_of_its_shares(
    num_sites: int, colluding: int
) -> None:
    """Two-sided, at sites that hold nobody: sigma squared times n over h, in each coordinate."""
    sites, sigma = sum_sites(num_sites), 2.0
    names = sorted(sites)
    own = own_noise_multiplier(sigma, num_members=num_sites, colluding_sites=colluding)
    total: Group = np.zeros(30_000, dtype=np.uint32)
    unit = C / grid_step(C, BITS)
    for number, name in enumerate(names):
        held = HeldSum(
            torch.zeros(30_000, dtype=torch.float64), SeededNoise(number), sensitivity=unit
        )
        pairs = sites[name].mask_key.pair_keys(name, members_of(sites, names, name))
        add_up_(total, held.release(own, pairs))
    variance = float((from_group(total) / unit).square().mean())
    expected = sigma**2 * num_sites / (num_sites - colluding)
    assert variance == pytest.approx(expected, rel=5 * (2 / 30_000) ** 0.5)


def test_a_held_sum_leaves_once() -> None:
    step = held_step()
    step.step(0, lambda _: torch.zeros(()))
    held = step.take()
    held.release(1.0, PAIR)
    with pytest.raises(ValueError, match="leaves once"):
        held.release(1.0, PAIR)
    with pytest.raises(ValueError, match="nobody has taken"):
        step.take()


@pytest.mark.parametrize(
    ("own", "pairs"), [(0.0, PAIR), (float("nan"), PAIR), (-1.0, PAIR), (1.0, [])]
)
def test_a_held_sum_never_leaves_bare(own: float, pairs: list[tuple[bytes, bool]]) -> None:
    """And is gone once somebody tried."""
    held = HeldSum(torch.ones(4, dtype=torch.float64), NoNoise(), sensitivity=1.0)
    with pytest.raises(ValueError, match="with noise and with masks"):
        held.release(own, pairs)
    with pytest.raises(ValueError, match="leaves once"):
        held.release(1.0, PAIR)


def test_what_left_holds_no_sum_any_more() -> None:
    """Neither the step nor what was taken of it keeps a sum that left."""
    model, step = make_model(), held_step()
    step.step(PATIENTS, lambda patient: loss_of(model, patient))
    assert not step._sum_D.any()
    held = step.take()
    assert any(isinstance(each, Tensor) for each in gc.get_referents(held))
    held.release(1.0, PAIR)
    assert not any(isinstance(each, Tensor) for each in gc.get_referents(held))


def test_a_held_sum_says_nothing_of_itself() -> None:
    held = HeldSum(torch.full((3,), 12345.0, dtype=torch.float64), NoNoise(), sensitivity=1.0)
    assert "12345" not in f"{held!r} {held}"
    with pytest.raises(TypeError, match="in memory only"):
        pickle.dumps(held)


def test_a_step_that_fails_holds_nothing() -> None:
    step = held_step()

    def failing(_: int) -> Tensor:
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        step.step(PATIENTS, failing)
    with pytest.raises(ValueError, match="nobody has taken"):
        step.take()


def test_a_step_without_privacy_is_not_held() -> None:
    with pytest.raises(ValueError, match="has none"):
        HeldStep(
            parameters_of(make_model()),
            Mechanism.without_privacy(sample_rate=RATE, expected_patients=3.0),
            noise=NoNoise(),
            sampler=FixedSampler(),
            grid_bits=BITS,
        )


def test_one_patient_moves_a_sum_by_at_most_the_bound_on_every_grid() -> None:
    """In integers: truncation onto a coarse grid shortens, and never lengthens."""
    model = make_model()
    for bits in (12, 18, 22):
        seen = RecordedSums()
        for num_patients in (PATIENTS - 1, PATIENTS):
            step = HeldStep(
                parameters_of(model),
                mechanism(1.0, 3.0),
                noise=seen,
                sampler=FixedSampler(),
                grid_bits=bits,
            )
            step.step(num_patients, lambda patient: loss_of(model, patient))
            step.take().release(1.0, PAIR)
        moved = float((seen.sums[1] - seen.sums[0]).norm()) * grid_step(C, bits)
        assert 0.9 * C < moved <= C


def test_coordinates_are_in_the_order_of_the_names() -> None:
    """As the coordinator cuts the sum, however the parameters came."""
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    seen = RecordedSums()
    step = HeldStep(
        {"b": second, "a": first},
        mechanism(1.0, 3.0),
        noise=seen,
        sampler=FixedSampler(),
        grid_bits=BITS,
    )
    step.step(1, lambda _: first.sum() + 0.0 * second.sum())
    step.take().release(1.0, PAIR)
    assert seen.sums[0].bool().tolist() == [True, True, False, False, False]
