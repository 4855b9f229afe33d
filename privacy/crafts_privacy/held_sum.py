"""A step whose sum waits for its noise: until it is known who else adds some.

The sum without noise is in memory only. It leaves through ``HeldSum.release`` or never: once, with
this site's share of the noise and a mask for every other member of the sum it belongs to.
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from torch import Tensor, nn

from crafts_privacy.accounting import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import NoiseSource
from crafts_privacy.patient_sgd import PatientSum
from crafts_privacy.ranks import Ranks
from crafts_privacy.sampling import PatientSampler
from crafts_privacy.secure_aggregation.fixed_point import to_group
from crafts_privacy.secure_aggregation.masking import Group, add_masks_


class HeldStep(PatientSum):
    """One step of the mechanism, whose sum is held."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mechanism: Mechanism,
        *,
        noise: NoiseSource,
        sampler: PatientSampler,
        grid_bits: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Prepare as :class:`PatientSum` does; coordinates are in the order of the names.

        Args:
            parameters: By name.
            mechanism: Of the whole sum over sites: ``event`` is what a step costs.
            noise: Of this site's share.
            sampler: Of this site's patients.
            grid_bits: Of the plan.
            ranks: As there.

        Raises:
            ValueError: as there, or the mechanism is without privacy.
        """
        if not mechanism.private:
            raise ValueError("a sum is held for its noise, and this mechanism has none")
        super().__init__(
            {name: parameters[name] for name in sorted(parameters)},
            mechanism,
            noise=_Later(),
            sampler=sampler,
            ranks=ranks,
            grid_bits=grid_bits,
        )
        self._share = noise
        self._held: HeldSum | None = None

    def take(self) -> "HeldSum":
        """The sum of the one step that was taken.

        Raises:
            ValueError: none was, or somebody has its sum.
        """
        if self._held is None:
            raise ValueError("expected one step whose sum nobody has taken")
        held, self._held = self._held, None
        return held

    def _use_sum(self) -> None:
        sensitivity = self._mechanism.max_grad_norm / self._step
        self._held = HeldSum(self._sum_D.clone(), self._share, sensitivity=sensitivity)
        self._sum_D.zero_()


class HeldSum:
    """A sum of clipped gradients without noise, in whole grid steps."""

    __slots__ = ("_noise", "_sensitivity", "_sum_D")

    def __init__(self, sum_D: Tensor, noise: NoiseSource, *, sensitivity: float) -> None:
        self._sum_D: Tensor | None = sum_D
        self._noise = noise
        self._sensitivity = sensitivity

    def __reduce__(self) -> NoReturn:
        """It goes to no file and to no other process."""
        raise TypeError("a held sum is in memory only")

    def release(self, own_noise_multiplier: float, pairs: Sequence[tuple[bytes, bool]]) -> Group:
        """The sum with this site's share of the noise and all its masks. After it the sum is gone.

        Args:
            own_noise_multiplier: Standard deviation of the share, over max_grad_norm.
            pairs: Of ``MaskKey.pair_keys``, for the members that the share was sized for.

        Raises:
            ValueError: it has left already, or would leave without noise or without masks.
        """
        sum_D, self._sum_D = self._sum_D, None
        if sum_D is None:
            raise ValueError("a held sum leaves once")
        if not pairs or not MIN_NOISE_MULTIPLIER <= own_noise_multiplier <= MAX_NOISE_MULTIPLIER:
            raise ValueError("a held sum leaves with noise and with masks")
        self._noise.add_(sum_D, own_noise_multiplier * self._sensitivity)
        vector_D = to_group(sum_D)
        add_masks_(vector_D, pairs)
        return vector_D

    def forget(self) -> None:
        """Overwrite the sum; nothing can leave any more."""
        if self._sum_D is not None:
            self._sum_D.zero_()
        self._sum_D = None


class _Later:
    """Where the noise of a step would come from; a held sum gets its share as it leaves."""

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        """See :class:`NoiseSource`."""
