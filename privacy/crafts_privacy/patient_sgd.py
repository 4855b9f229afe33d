"""Patient-level DP-SGD: sample patients, clip each one's gradient, add noise once, step.

Because a patient's tiles fill a batch by themselves, a patient's gradient is one ordinary backward
pass: any layer, any adapter, checkpointing and autocast work, and memory is that of one patient.

Guarantee: each step is the Poisson-subsampled Gaussian mechanism over patients with L2 sensitivity
``max_grad_norm`` and noise ``noise_multiplier * max_grad_norm``, so ``event()`` is all that the
accountant needs. Everything after the noise (divisor, momentum, update) is post-processing.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from crafts_core.threads import Map
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.clipping import GRID_BITS, add_float64_, clip_, grid_step, to_grid_
from crafts_privacy.gradients import FlatGradient, GroupGradients, views_of
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import NoiseSource
from crafts_privacy.optimizers import Optimizer
from crafts_privacy.ranks import Alone, Ranks
from crafts_privacy.sampling import PatientSampler

PatientLoss = Callable[[int], Tensor | Iterable[Tensor]]
"""Patient index to that patient's mean loss, or to parts that add up to it.

Parts (a generator, so that one graph exists at a time) cut a patient into microbatches; their
gradients add up *before* clipping, so it is the patient that is bounded.
"""

PatientVector = Callable[[int], Tensor]
"""Patient index to what the patient adds to a sum: flat float32, as long as all parameters."""

GroupLoss = Callable[[Sequence[int | None]], Tensor]
"""The patients of one pass, by their places, to the losses of all its rows (B,).

A patient's rows are neighbours, and their losses add up to that patient's mean loss. ``None`` is a
place that nobody was left for: public rows fill it, and what they give is thrown away.
"""


class PatientSum(ABC):
    """Steps on patients up to the sum of their clipped gradients; what becomes of it, a class says.

    It owns everything between the loss and the sum; the caller only says what a patient's loss is.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mechanism: Mechanism,
        *,
        noise: NoiseSource,
        sampler: PatientSampler,
        ranks: Ranks | None = None,
        grid_bits: int = GRID_BITS,
    ) -> None:
        """Prepare for exactly ``parameters``; each must require a gradient.

        ``ranks`` are the processes that share every step's patients; each starts from the same
        weights, and gets the same sum. ``grid_bits`` is of ``clipping.grid_step``.

        Raises:
            ValueError: no parameters, one that is frozen, or several devices.
        """
        _check_parameters(parameters)
        self._parameters = list(parameters.values())
        self._mechanism = mechanism
        self._noise = noise
        self._sampler = sampler
        self._ranks = ranks or Alone()
        self._gradient = FlatGradient(self._parameters)
        self._sum_D = torch.zeros_like(self._gradient.grad_D, dtype=torch.float64)
        self._step = grid_step(mechanism.max_grad_norm, grid_bits) if mechanism.private else 1.0
        self._num_usable = torch.zeros((), dtype=torch.int64, device=self._sum_D.device)
        self._num_seen = 0
        self.steps_taken = 0

    def event(self) -> PrivacyEvent:
        """What has run so far, as the accountant wants it. Compare it with what was reserved."""
        return self._mechanism.event(self.steps_taken)

    def num_unusable_patients(self) -> int:
        """How often a patient's gradient was not finite (or beyond scaling) and became zero, here.

        Computed from patients without noise: for the site's own log, never to leave it.
        """
        return self._num_seen - int(self._num_usable)

    def step(self, num_patients: int, patient_loss: PatientLoss) -> None:
        """One step on a fresh Poisson sample of ``num_patients``; an empty one is noise only.

        With several ranks these are the patients that this one deals with. Which they are must not
        depend on who else is there, or a device that rounds otherwise would tell.

        A patient whose gradient is not finite contributes zero. A step that an exception cuts
        short changes nothing and still counts.
        """

        def one_by_one(drawn: Sequence[int]) -> Iterator[Tensor]:
            for patient in drawn:
                loss = patient_loss(patient)
                yield self._gradient.compute([loss] if isinstance(loss, Tensor) else loss)

        self._noisy_step(num_patients, one_by_one)

    def step_in_groups(
        self,
        num_patients: int,
        group_loss: GroupLoss,
        gradients: GroupGradients,
        run: Map = map,
    ) -> None:
        """The same step, several patients to a backward pass: faster where each has few tiles.

        Every pass has the shape of ``gradients``, whoever and however many were drawn. ``run`` may
        run passes side by side; sums are of integers, so their order changes nothing.
        """
        size = gradients.num_patients

        def by_group(drawn: Sequence[int]) -> Iterator[Tensor]:
            groups = [drawn[start : start + size] for start in range(0, len(drawn), size)]

            def one_pass(group: Sequence[int]) -> Tensor:
                places = [*group, *[None] * (size - len(group))]
                return gradients.compute(group_loss(places))[: len(group)]

            return itertools.chain.from_iterable(run(one_pass, groups))

        self._noisy_step(num_patients, by_group)

    def step_on_vectors(self, num_patients: int, patient_vector: PatientVector) -> None:
        """The same step on vectors that patients are told by: down ``-<vector, parameters>``.

        Its gradient is the vector, sign turned, so each is cut, rounded and counted as a gradient
        is: at learning rate one the parameters move by the noised mean of the vectors.
        """

        def one_by_one(drawn: Sequence[int]) -> Iterator[Tensor]:
            for patient in drawn:
                yield patient_vector(patient).to(self._sum_D.device, torch.float32).neg()

        self._noisy_step(num_patients, one_by_one)

    def _noisy_step(
        self, num_patients: int, gradients_of: Callable[[Sequence[int]], Iterable[Tensor]]
    ) -> None:
        self.steps_taken += 1
        self._sum_D.zero_()
        ranks = self._ranks
        try:
            drawn = self._sampler.sample(num_patients, self._mechanism.sample_rate)
            for grad_D in gradients_of([int(index) for index in drawn]):
                self._add_patient(grad_D)
            if self._mechanism.private and ranks.rank == 0:
                sensitivity = self._mechanism.max_grad_norm / self._step
                self._noise.add_(self._sum_D, self._mechanism.noise_multiplier * sensitivity)
        except BaseException:
            ranks.sum_(self._sum_D, failed=True)
            raise
        finally:
            self._gradient.release()
        ranks.sum_(self._sum_D, failed=False)
        self._use_sum()

    @abstractmethod
    def _use_sum(self) -> None:
        """What becomes of ``_sum_D``: whole grid steps, over all ranks."""

    def _add_patient(self, grad_D: Tensor) -> None:
        self._num_usable += clip_(
            grad_D, self._mechanism.max_grad_norm, stability=self._mechanism.stability
        )
        self._num_seen += 1
        if self._mechanism.private:
            to_grid_(grad_D, self._step)
        add_float64_(self._sum_D, grad_D)


class PatientSGD(PatientSum):
    """Descent on patients, private or not.

    Nothing computed from patients comes back but the weights themselves.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mechanism: Mechanism,
        *,
        learning_rate: float,
        optimizer: Optimizer,
        noise: NoiseSource,
        sampler: PatientSampler,
        ranks: Ranks | None = None,
        grid_bits: int = GRID_BITS,
    ) -> None:
        """Prepare to train exactly ``parameters``, as :class:`PatientSum` does.

        ``optimizer`` is fresh, or goes on with the state it has.

        Raises:
            ValueError: as there, or a bad rate.
        """
        super().__init__(
            parameters, mechanism, noise=noise, sampler=sampler, ranks=ranks, grid_bits=grid_bits
        )
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"expected learning_rate > 0, got {learning_rate}")
        self._learning_rate = learning_rate
        self._optimizer = optimizer
        # float() is the parameter's own storage in float32 and a master copy in half precision,
        # where small updates would otherwise round away.
        self._masters = [parameter.detach().float() for parameter in self._parameters]

    def _use_sum(self) -> None:
        self._update()

    @torch.no_grad()
    def _update(self) -> None:
        """One step down the noisy mean, in float32."""
        self._sum_D *= self._step / self._mechanism.expected_patients
        direction_D = self._optimizer.direction(self._sum_D, self._mechanism.noise_std)
        self._sum_D.zero_()
        steps = views_of(direction_D, self._parameters)
        torch._foreach_add_(self._masters, steps, alpha=-self._learning_rate)
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter.dtype != torch.float32:
                parameter.copy_(master)


def _check_parameters(parameters: Mapping[str, nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("expected at least one parameter to train")
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            raise ValueError(f"parameter {name} is frozen; set requires_grad before training it")
        if not parameter.is_floating_point():
            raise ValueError(f"parameter {name} is {parameter.dtype}, not a floating-point tensor")
    if len({parameter.device for parameter in parameters.values()}) > 1:
        raise ValueError("expected all parameters on one device")
