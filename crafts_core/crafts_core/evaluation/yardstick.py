"""Held-out tiles as what every set of images is measured against.

Letters: N images, M held-out tiles, D features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from crafts_core.evaluation.colour import ColourMoments, colour_statistics, in_colours_of
from crafts_core.evaluation.encoder import Features, Images
from crafts_core.evaluation.fidelity import (
    Kernel,
    Reference,
    kernel_distance,
    kernel_floor,
    matched_floor,
    mmd_to_reference,
    real_floor,
)
from crafts_core.evaluation.figures import Distances
from crafts_core.evaluation.known_distances import (
    cmmd_kernel,
    frechet_distance,
    frechet_interval,
    kid_kernel,
)
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.evaluation.resampling import Interval, Rows

_MATCHED_SPLITS = 20
"""Of the structure floor: each embeds half of the tiles anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """Tiles, their features and colours, computed once for any number of sets of images."""

    tiles: RealTiles
    embed: Callable[[Images], Features]
    features_MD: Features
    reference: Reference
    colour_reference: Reference
    colours: ColourMoments
    is_clip: bool
    """Whether the encoder is one that CMMD is told of."""
    num_bootstrap: int
    seed: int

    @classmethod
    def fit(
        cls,
        tiles: RealTiles,
        embed: Callable[[Images], Features],
        *,
        is_clip: bool,
        num_bootstrap: int,
        seed: int,
    ) -> Self:
        """Look at the tiles.

        Raises:
            ValueError: too few patients, or tiles that the encoder does not take.
        """
        features_MD = embed(tiles.images_NHWC)
        return cls(
            tiles=tiles,
            embed=embed,
            features_MD=features_MD,
            reference=Reference.fit(features_MD, tiles.patients),
            colour_reference=Reference.fit(colour_statistics(tiles.images_NHWC), tiles.patients),
            colours=ColourMoments.of(tiles.images_NHWC),
            is_clip=is_clip,
            num_bootstrap=num_bootstrap,
            seed=seed,
        )

    def distances(
        self,
        images_NHWC: Images,
        features_ND: Features,
        patients: npt.NDArray[np.str_],
        *,
        are_others: bool = False,
    ) -> Distances:
        """Distances of images whose features are known already.

        Args:
            images_NHWC: One set.
            features_ND: Its features.
            patients: Whose tile each is, or whose caption it was drawn from.
            are_others: Whether these are no held-out patients.
        """

        def mmd(of_ND: Features, reference: Reference) -> tuple[float, Interval]:
            return mmd_to_reference(
                of_ND,
                patients,
                reference,
                num_bootstrap=self.num_bootstrap,
                seed=self.seed,
                are_others=are_others,
            )

        matched_ND = self.embed(in_colours_of(images_NHWC, self.colours))
        return Distances(
            **_named("mmd2", mmd(features_ND, self.reference)),
            **_named("colour", mmd(colour_statistics(images_NHWC), self.colour_reference)),
            **_named("structure", mmd(matched_ND, self.reference)),
            **self._known(features_ND, patients, are_others=are_others),
        )

    def floors(self) -> Distances:
        """What real tiles of other patients score, in each way that images are measured.

        The Fréchet distance has none: it grows where there are fewer images, and halves have half.
        """

        def floor(reference: Reference) -> tuple[float, Interval]:
            return real_floor(reference, num_splits=self.num_bootstrap, seed=self.seed)

        def matched(first: Rows, second: Rows) -> Features:
            tiles = self.tiles.images_NHWC
            return self.embed(in_colours_of(tiles[first], ColourMoments.of(tiles[second])))

        structure = matched_floor(
            self.reference, matched, num_splits=_MATCHED_SPLITS, seed=self.seed
        )
        found: dict[str, Any] = {}
        for name, kernel in self._kernels():
            k_MM = kernel(self.features_MD, self.features_MD)
            found |= _named(
                name,
                kernel_floor(
                    k_MM,
                    self.reference.patient_M,
                    num_splits=self.num_bootstrap,
                    seed=self.seed,
                ),
            )
        return Distances(
            **_named("mmd2", floor(self.reference)),
            **_named("colour", floor(self.colour_reference)),
            **_named("structure", structure),
            frechet=None,
            **found,
        )

    def _known(
        self, features_ND: Features, patients: npt.NDArray[np.str_], *, are_others: bool
    ) -> dict[str, Any]:
        """Distances that others report, by the names of ``Distances``."""
        reference = self.reference
        patient_N = reference.places_of(patients, are_others=are_others)
        scaled = reference.scale(features_ND), reference.features_MD
        found: dict[str, Any] = {
            "frechet": frechet_distance(*scaled),
            "frechet_interval": frechet_interval(
                *scaled, patient_N, reference.patient_M, seed=self.seed
            ),
        }
        for name, kernel in self._kernels():
            distance = kernel_distance(
                kernel,
                features_ND,
                self.features_MD,
                patient_N,
                reference.patient_M,
                num_bootstrap=self.num_bootstrap,
                seed=self.seed,
            )
            found |= _named(name, distance)
        return found

    def _kernels(self) -> Iterator[tuple[str, Kernel]]:
        yield "kid", kid_kernel
        if self.is_clip:
            yield "cmmd", cmmd_kernel


def _named(name: str, found: tuple[float, Interval]) -> dict[str, Any]:
    """A figure and its interval, by the names of ``Distances``."""
    return {name: found[0], f"{name}_interval": found[1]}
