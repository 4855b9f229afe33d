"""First answers as matrices of readers by images, and mean readers with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from crafts_core.study.detection import Resampling, counts_of, interval, mean_of, over_readers
from crafts_core.study.records import Reading
from crafts_core.study.results import Figure


@dataclass(frozen=True)
class ReadingsTable:
    """First answers as matrices of readers by images."""

    readings: Sequence[Reading]
    seed: int

    @cached_property
    def readers(self) -> list[int]:
        return sorted({each.reader for each in self.readings})

    @cached_property
    def images(self) -> dict[int, Reading]:
        return {each.image: each for each in self.readings}

    @cached_property
    def is_synthetic(self) -> npt.NDArray[np.bool_]:
        return np.array([each.is_synthetic for each in self.images.values()])

    @cached_property
    def resampling(self) -> Resampling:
        return Resampling.draw(self.is_synthetic, len(self.readers), self.seed)

    @cached_property
    def scores(self) -> npt.NDArray[np.float64]:
        return self.values("score")

    def values(self, name: str) -> npt.NDArray[np.float64]:
        """An answer by reader and image; NaN where there is none."""
        return self.filled([(each, getattr(each, name)) for each in self.readings])

    def filled(self, answers: Sequence[tuple[Reading, float | None]]) -> npt.NDArray[np.float64]:
        """Numbers by reader and image, (R, I); NaN where there is none."""
        columns = {image: column for column, image in enumerate(self.images)}
        values_RI = np.full((len(self.readers), len(columns)), np.nan)
        for reading, value in answers:
            if value is not None:
                values_RI[self.readers.index(reading.reader), columns[reading.image]] = value
        return values_RI

    @cached_property
    def counts(self) -> npt.NDArray[np.float64]:
        counts_RKL: npt.NDArray[np.float64] = self._counts(np.ones((1, len(self.images))))[0]
        return counts_RKL

    @cached_property
    def resampled_counts(self) -> npt.NDArray[np.float64]:
        return self._counts(self.resampling.images_BI)

    def _counts(self, weight_BI: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return counts_of(self.scores, self.is_synthetic, weight_BI)

    def figure(self, value_R: npt.NDArray[np.float64], value_BR: npt.NDArray[np.float64]) -> Figure:
        """The mean reader of ``value_R``, with both intervals."""
        among = self.resampling.readers_BR if len(self.readers) > 1 else None
        return Figure(
            value=float(over_readers(value_R)),
            by_image=interval(over_readers(value_BR)),
            by_image_and_reader=(
                None if among is None else interval(over_readers(value_BR, among))
            ),
        )

    def mean(self, value_RI: npt.NDArray[np.float64]) -> Figure:
        value_BR = mean_of(value_RI, self.resampling.images_BI)
        return self.figure(mean_of(value_RI, np.ones((1, len(self.images))))[0], value_BR)
