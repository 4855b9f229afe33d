"""A folder of drawn images that a run fills, leaves at any moment, and goes on with.

Every file says how it was drawn, so the folder needs no other memory: a file that says what this
run would draw is kept, one that another run drew is removed, and one that no generator drew is
nobody's to remove. Files appear whole, by renaming.
"""

import bisect
import io
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from crafts_core.durable import write_file
from crafts_core.errors import CraftsError
from crafts_core.foundation_manifest import sha256_of
from crafts_core.image_requests import MAX_SEED, ImageRequest, num_images
from crafts_core.plan_sections import Modality
from crafts_core.provenance import Provenance, ProvenanceError, encode_png, read_provenance
from crafts_core.sampler_config import SamplerConfig
from crafts_core.sampling import Drawing, Images, contact_sheet
from crafts_core.studio import Studio
from crafts_core.tiles.conditions import encode_condition

SHEET = "sheet.png"
WRITING = ".writing"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_MAX_ON_SHEET, _MAX_SHEET_PX = 100, 4096


class ImageFolderError(CraftsError):
    """A folder that cannot take the images of this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedImage:
    """One file of a run, before it is drawn."""

    name: str
    """Relative to the folder."""
    drawing: Drawing
    provenance: Provenance
    control: Modality | None
    mask: Path | None


class ImagePlan(Sequence[PlannedImage]):
    """All images that requests ask for, in order; each is made up when it is looked at.

    Args:
        requests: What to draw.
        common: Provenance that all share.
        seed: Of requests without a seed of their own.
        name: File name of image ``i``.
        pattern: What all such names match; other files of a folder are left alone.
    """

    def __init__(
        self,
        requests: Sequence[ImageRequest],
        common: Provenance,
        *,
        seed: int,
        name: Callable[[int], str] = "tile-{:04d}.png".format,
        pattern: str = "*.png",
    ) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise ImageFolderError(f"expected a seed from 0 to {MAX_SEED}, got {seed}")
        self.requests = requests
        self.common = common
        self._seed = seed
        self.name = name
        self.pattern = pattern
        self._length = num_images(requests)
        self._ends = list(itertools.accumulate(request.count for request in requests))
        self._sha256 = {
            mask: sha256_of(mask) for mask in {r.mask for r in requests} if mask is not None
        }

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> PlannedImage:  # type: ignore[override]  # no slices
        if not 0 <= place < self._length:
            raise IndexError(place)
        row = bisect.bisect_right(self._ends, place)
        request = self.requests[row]
        first = self._ends[row] - request.count
        own_seed = request.seed is not None
        drawing = Drawing(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=self._seed if request.seed is None else request.seed,
            index=place - first if own_seed else place,
        )
        provenance = self.common.of_image(
            drawing.prompt,
            index=drawing.index,
            seed=drawing.seed,
            negative_prompt=drawing.negative_prompt,
            control=request.control or "",
            control_sha256="" if request.mask is None else self._sha256[request.mask],
        )
        return PlannedImage(
            name=self.name(place),
            drawing=drawing,
            provenance=provenance,
            control=request.control,
            mask=request.mask,
        )

    @cached_property
    def place_of_name(self) -> dict[str, int]:
        return {self.name(place): place for place in range(self._length)}


def draw_into(
    folder: Path,
    plan: ImagePlan,
    studio: Studio,
    config: SamplerConfig,
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    before_change: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Draw what is missing of a plan; afterwards the folder holds these images and no others.

    Images of other runs stay until the first of this one is drawn: what cannot be drawn at all
    costs nobody theirs.

    Args:
        folder: Made with the first image.
        plan: What to draw.
        studio: Who draws.
        config: How; the same as in the plan's provenance.
        batch_size: Images at a time; chosen by the device if None.
        progress: Called with (images done, images in all).
        before_change: Called once, before any file is written or removed.

    Returns:
        The file of each image.

    Raises:
        ImageFolderError: the folder holds images that no generator drew, or the disk is too small.
        CraftsError: an image is not finite, or a ControlNet was not trained; those of earlier
            batches are there.
    """
    missing, strangers = _survey(folder, plan)
    check_space(folder, len(missing), studio.generator.tile_px)
    studio.check_controls({request.control for request in plan.requests if request.control})

    def begin() -> None:
        before_change()
        for path in strangers:
            path.unlink()

    done = len(plan) - len(missing)
    is_steered = any(request.control for request in plan.requests)
    size = batch_size or (studio.batch_size(config, is_steered=is_steered) if missing else 1)
    for batch in batches((plan[place] for place in missing), size):
        images = studio.draw(
            [each.drawing for each in batch],
            config,
            control=batch[0].control,
            masks=[each.mask for each in batch if each.mask is not None],
        )
        if done == len(plan) - len(missing):
            begin()
        for each, image in zip(batch, images, strict=True):
            write_whole(folder / each.name, encode_png(Image.fromarray(image), each.provenance))
        done += len(batch)
        if progress is not None:
            progress(done, len(plan))
    if not missing:
        begin()
    return [folder / plan.name(place) for place in range(len(plan))]


def write_sheet(folder: Path, files: Sequence[Path], plan: ImagePlan, *, columns: int) -> Path:
    """One picture of the first hundred images, at most 4,096 pixels wide and high."""
    shown = files[:_MAX_ON_SHEET]
    images: list[Images] = []
    for path in shown:
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB")))
    sheet = contact_sheet(np.stack(images), min(columns, 10))
    sheet.thumbnail((_MAX_SHEET_PX, _MAX_SHEET_PX))
    prompts = [request.prompt for request in plan.requests][:_MAX_ON_SHEET]
    write_whole(folder / SHEET, encode_png(sheet, plan.common.of_sheet(prompts)))
    return folder / SHEET


def write_conditions(folder: Path, plan: ImagePlan, studio: Studio) -> list[Path]:
    """A picture of what was read of each mask: ``condition.png``, then ``condition-2.png``.

    It is no synthetic image, and of fluorescence a patient's own pixels: it says so.
    """
    steered = [(r.control, r.mask) for r in plan.requests if r.control and r.mask]
    files = []
    for number, (control, mask) in enumerate(dict.fromkeys(steered), start=1):
        path = folder / ("condition.png" if number == 1 else f"condition-{number}.png")
        with Image.open(
            io.BytesIO(encode_condition(studio.condition(control, mask), control))
        ) as seen:
            write_whole(path, encode_png(seen, plan.common.of_condition(control)))
        files.append(path)
    return files


def check_space(folder: Path, count: int, tile_px: int) -> None:
    """Refuse what cannot fit, before hours are spent on it.

    Raises:
        ImageFolderError: the disk has less room than the pixels need.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed, free = count * tile_px * tile_px * 3, shutil.disk_usage(there).free
    if needed > free:
        raise ImageFolderError(
            f"{count:,} images of {tile_px} px need about {needed / 1e9:,.1f} GB, {there} has "
            f"{free / 1e9:,.1f} GB free; ask for fewer, or name another folder"
        )


def write_whole(path: Path, content: bytes) -> None:
    """A reader, or a run that goes on after a kill or a power cut, sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content)


def _survey(folder: Path, plan: ImagePlan) -> tuple[list[int], list[Path]]:
    """Places of the plan without a file, and files of other runs, which are in the way."""
    kept: set[int] = set()
    strangers: list[Path] = []
    for path in sorted(folder.glob(plan.pattern)):
        place = plan.place_of_name.get(path.relative_to(folder).as_posix())
        if place is not None and not _is_whole(path):
            strangers.append(path)
            continue
        try:
            said = read_provenance(path)
        except ProvenanceError as error:
            raise ImageFolderError(
                f"{error}: {folder} holds other images; name another folder with --out"
            ) from error
        if place is not None and said == plan[place].provenance:
            kept.add(place)
        else:
            strangers.append(path)
    masks = {request.mask.resolve() for request in plan.requests if request.mask is not None}
    if not masks.isdisjoint(path.resolve() for path in strangers):
        raise ImageFolderError(f"a mask is in {folder}, which is written anew; move it out")
    strangers += folder.glob(f"{plan.pattern}{WRITING}")
    return [place for place in range(len(plan)) if place not in kept], strangers


def _is_whole(path: Path) -> bool:
    """Whether a PNG has its end: an older program, or a copy, may have left a piece of one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_PNG_END)))
        return file.read() == _PNG_END


def batches(images: Iterable[PlannedImage], size: int) -> Iterator[list[PlannedImage]]:
    """Neighbours that are steered alike, at most ``size`` at a time."""
    for _, alike in itertools.groupby(images, key=lambda each: each.control):
        while batch := list(itertools.islice(alike, size)):
            yield batch
