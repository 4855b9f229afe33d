"""Real images, a foundation and an encoder, ready to measure generators and folders of images.

What the programs and the library call. Real images are a site's store or any folder; neither needs
a site home.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Self

from crafts_core.devices import open_device
from crafts_core.errors import CraftsError
from crafts_core.evaluation.encoder import Encoder, load_encoder
from crafts_core.evaluation.evaluate import FEWEST_IMAGES, EvaluationConfig, Evaluator
from crafts_core.evaluation.figures import Comparison, Fidelity
from crafts_core.evaluation.image_sets import Scale, is_image_folder, read_images
from crafts_core.evaluation.real_tiles import (
    RealTiles,
    require_other_tiles,
    require_others,
    rows_by_content,
)
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.foundation_manifest import DENOISER_FOLDERS
from crafts_core.generator import Generator
from crafts_core.progress import Progress
from crafts_core.tiles.store import TileStore
from crafts_core.tiles.writer import MANIFEST_NAME

_NEEDS_GENERATOR = "memorisation: needs the generator, to draw from captions of both sides"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is measured with."""

    config: EvaluationConfig
    max_tiles: int = 2000
    """Real images, and images of a folder, at most; a random choice."""
    foundation: Path | None = None
    """The embedded one if None."""
    training: Path | None = None
    """Store or folder of patients that were trained on."""
    mpp: float | None = None
    """Microns per pixel of images that do not say theirs."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises ValueError for what could not be measured."""
        if self.max_tiles < FEWEST_IMAGES:
            raise ValueError(f"expected max_tiles >= {FEWEST_IMAGES}, got {self.max_tiles}")
        if self.mpp is not None and not 0.01 <= self.mpp <= 1000:
            raise ValueError(f"expected mpp from 0.01 to 1000, got {self.mpp}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Ready; ``Bench.open`` makes one."""

    foundation: Foundation
    encoder: Encoder
    evaluator: Evaluator
    held_out: RealTiles
    training: RealTiles | None
    folders: dict[Path, RealTiles]
    """The subjects that are folders of images."""
    real: Path

    @classmethod
    def open(
        cls,
        real: Path,
        subjects: Sequence[Path],
        settings: BenchSettings,
        progress: Progress | None = None,
    ) -> Self:
        """Read all but the generators, and bring it to one scale and size.

        Args:
            real: Store or folder of patients that nobody trained on.
            subjects: Exported generators, and folders of images.
            settings: What is measured with.
            progress: Called with what, done and all.

        Raises:
            CraftsError: something cannot be read, is too little, or was trained on.
        """
        config = settings.config
        encoder = load_encoder(config.encoder)
        foundation = load(
            settings.foundation or embedded_path(), device=open_device(settings.device)
        )
        reader = Reader(foundation, seed=config.seed, mpp=settings.mpp, progress=progress)
        training = settings.training
        if training is not None and is_store(training) and is_store(real):
            require_others(TileStore.open(training), TileStore.open(real))
        sets = {real: reader.read(real, settings.max_tiles)}
        if training is not None:
            sets[training] = reader.read(training, config.num_training_tiles)
        folders = [path for path in subjects if not _is_generator(path)]
        sets |= {path: reader.read_folder(path, settings.max_tiles) for path in folders}
        side_px = min(each.side_px for each in sets.values())
        sets = {path: each.in_the_middle(side_px) for path, each in sets.items()}
        taught = None
        if training is not None:
            taught = sets[training]
            require_other_tiles(taught, sets[real], training, real)
        with _blaming(real):
            evaluator = Evaluator(foundation, sets[real], config, encoder, training=taught)
        return cls(
            foundation=foundation,
            encoder=encoder,
            evaluator=evaluator,
            held_out=sets[real],
            training=taught,
            folders={path: sets[path] for path in folders},
            real=real,
        )

    def measure(self, subject: Path, progress: Progress | None = None) -> Comparison:
        """One of the subjects beside its baselines.

        Raises:
            CraftsError: it cannot be read, or there are too few images.
        """
        if subject in self.folders:
            with _blaming(subject):
                found = self.evaluator.compare_images(self.folders[subject], progress)
            return _without(found, _NEEDS_GENERATOR) if self.evaluator.has_training else found
        generator = self._generator(subject)
        with _blaming(self.real):
            evaluation = self.evaluator.compare(self.foundation.generator, generator, progress)
        if not self.evaluator.has_training:
            return evaluation
        try:
            copies = self.evaluator.memorisation(generator, progress)
        except ValueError as error:
            return _without(evaluation, f"memorisation: {error}")
        return evaluation.model_copy(update={"memorisation": copies})

    def fidelity(self, subject: Path, progress: Progress | None = None) -> Fidelity:
        """Distances of one of the subjects.

        Raises:
            CraftsError: it cannot be read, or there are too few images.
        """
        if subject in self.folders:
            with _blaming(subject):
                return self.evaluator.fidelity_of(self.folders[subject])
        with _blaming(self.real):
            return self.evaluator.fidelity(self._generator(subject), progress)

    def _generator(self, path: Path) -> Generator:
        generator = Generator.from_directory(path, device=self.foundation.device)
        require_size(path, generator, self.held_out.side_px)
        return generator


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads stores and folders as images of a foundation's scale."""

    foundation: Foundation
    _: KW_ONLY
    seed: int
    """Which images, where there are more than are read."""
    mpp: float | None = None
    """Microns per pixel of images that do not say theirs."""
    progress: Progress | None = None

    def read(self, path: Path, most: int) -> RealTiles:
        """Of a store, or of a folder."""
        if not is_store(path):
            return self.read_folder(path, most)
        store, expected = TileStore.open(path), self.foundation.manifest.tile_px
        if store.tile_px != expected:
            raise CraftsError(f"{path}: expected tiles of {expected} px, got {store.tile_px}")
        return RealTiles.read(store, rows_by_content(store, most, seed=self.seed))

    def read_folder(self, path: Path, most: int) -> RealTiles:
        """Of a folder, or of a table of images."""
        manifest = self.foundation.manifest
        scale = Scale(
            told_mpp=self.mpp,
            at_mpp=manifest.mpp,
            largest_px=manifest.tile_px,
            unit_px=manifest.tile_px // manifest.latent_shape[-1],
            foundation_hash=manifest.hash,
        )
        return read_images(path, scale, most=most, seed=self.seed, progress=self.progress)


def require_size(path: Path, generator: Generator, side_px: int) -> None:
    """Refuse a generator of a smaller foundation.

    Raises:
        CraftsError: it draws less than the real images show.
    """
    if generator.tile_px < side_px:
        raise CraftsError(
            f"{path} draws {generator.tile_px} px, the real images have {side_px}; measure it "
            "with the --foundation it was trained from"
        )


def is_store(path: Path) -> bool:
    """Whether it is a site's store, and not a folder of images."""
    return (path / MANIFEST_NAME).is_file()


def _is_generator(path: Path) -> bool:
    """Raises CraftsError where it is neither a generator nor a folder of images."""
    if (
        any((path / each).is_dir() for each in DENOISER_FOLDERS)
        or (path / "model_index.json").is_file()
    ):
        return True
    if not is_image_folder(path):
        raise CraftsError(f"{path} is no generator and holds no images")
    return False


def _without(found: Comparison, reason: str) -> Comparison:
    return found.model_copy(update={"not_measured": (*found.not_measured, reason)})


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """What is wrong with the images of a path, as one line."""
    try:
        yield
    except ValueError as error:
        raise CraftsError(f"{path}: {error}") from error
