"""What protects the patients of a plan, as one value. To ask what it costs needs no torch."""

import math
from dataclasses import dataclass
from typing import Self

from crafts_privacy.accounting import MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER, PrivacyEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """What protects the patients, in one value: sampling, clipping, noise and divisor together.

    Public: it is what the site declares. ``expected_patients`` is ``sample_rate`` times the site's
    *declared* number of patients, never the number drawn.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    expected_patients: float
    private: bool = True
    stability: float | None = None
    """None clips a gradient where it is too long; a number is gamma of automatic clipping, which
    scales every gradient by ``C / (norm + gamma)`` (AUTO-S, Bu et al. 2023, arXiv 2206.07136)."""

    def __post_init__(self) -> None:
        if self.private and not (
            MIN_NOISE_MULTIPLIER <= self.noise_multiplier <= MAX_NOISE_MULTIPLIER
        ):
            raise ValueError(
                f"expected noise_multiplier from 0.001 to 1e6, got {self.noise_multiplier}; "
                "training without privacy is Mechanism.without_privacy"
            )
        if self.private and not 1e-12 <= self.max_grad_norm <= 1e12:
            raise ValueError(f"expected max_grad_norm 1e-12 to 1e12, got {self.max_grad_norm}")
        if not self.private and self.noise_multiplier != 0:
            raise ValueError("a mechanism without privacy has noise_multiplier 0")
        if not self.max_grad_norm > 0:
            raise ValueError(f"expected max_grad_norm > 0, got {self.max_grad_norm}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"expected 0 < sample_rate <= 1, got {self.sample_rate}")
        if not (math.isfinite(self.expected_patients) and self.expected_patients > 0):
            raise ValueError(f"expected expected_patients > 0, got {self.expected_patients}")
        if self.stability is not None and not (
            1e-6 <= self.stability <= 1e6 and self.max_grad_norm < math.inf
        ):
            raise ValueError(
                f"automatic clipping needs a finite max_grad_norm and stability 1e-6 to 1e6, got "
                f"{self.stability}"
            )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each coordinate of the mean gradient."""
        return self.noise_multiplier * (
            self.max_grad_norm / self.expected_patients if self.private else 0.0
        )

    @classmethod
    def without_privacy(
        cls,
        *,
        sample_rate: float,
        expected_patients: float,
        max_grad_norm: float = math.inf,
        stability: float | None = None,
    ) -> Self:
        """The same steps with no noise: a baseline for public or synthetic data only."""
        return cls(
            noise_multiplier=0.0,
            max_grad_norm=max_grad_norm,
            sample_rate=sample_rate,
            expected_patients=expected_patients,
            private=False,
            stability=stability,
        )

    def event(self, steps: int) -> PrivacyEvent:
        """What ``steps`` of this mechanism cost; infinite without privacy."""
        return PrivacyEvent(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps
        )
