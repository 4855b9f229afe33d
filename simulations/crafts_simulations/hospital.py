"""A synthetic hospital: patients, their slides as real files, and the table an operator would keep.

Everything follows from the configuration: which patient has what, what each slide shows, and every
pixel. So a half-made hospital is completed by making it again, and two runs agree to the byte.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from crafts_client.ingest.pool import Beat, Pool
from crafts_core.durable import write_file
from crafts_core.errors import CraftsError
from crafts_core.procedural import Stain, phenotype, render_region
from crafts_core.vocabulary import (
    CancerType,
    TissueAttributes,
    VocabularyError,
    cancer_type,
    compose_caption,
    label_caption,
    sample_attributes,
)
from crafts_simulations.slides import write_slide

CountProgress = Callable[[int, int], None]

Holdings = Literal["slides", "tiles"]
TABLE_NAME = "slides.csv"
_CONFIG_NAME = "hospital.json"
_TISSUE_PART = 0.72
"""Rough part of a slide that is tissue; the rest is glass."""
_EDGE_PX = 1.5


class HospitalError(CraftsError):
    """The hospital asked for cannot be made, or another one lies where it should be."""


def round_size(num_patients: int) -> int:
    """What a site says about its size: two leading digits at most, never zero."""
    step = int(10 ** max(0, len(str(num_patients)) - 2))
    return max(1, round(num_patients / step) * step)


@dataclass(frozen=True, slots=True, kw_only=True)
class HospitalConfig:
    """One hospital. The stain is the laboratory's and its scanner's: common to all its slides."""

    name: str
    num_patients: int
    slides_per_patient: int
    slide_px: int
    mpp: float
    cancer_mix: Mapping[str, float]
    """TCGA code, or ``normal <organ>``, to its weight among the patients."""
    stain: Stain
    seed: int
    holdings: Holdings = "slides"
    """Slides on glass, or ready tiles of ``slide_px`` with an image of numbered nuclei each."""

    def __post_init__(self) -> None:
        if min(self.num_patients, self.slides_per_patient) < 1 or self.slide_px < 64:
            raise ValueError("a hospital needs patients, slides, and slides of at least 64 px")
        weights = list(self.cancer_mix.values())
        if not weights or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"expected weights that are not all zero, got {self.cancer_mix}")
        for label in self.cancer_mix:
            label_caption(label)

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides the slides."""
        values = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSlide:
    """One slide before it is drawn."""

    path: Path
    nuclei: Path | None
    """Where the image of its numbered nuclei goes, if it is a ready tile."""
    patient: str
    label: str
    caption: str
    attributes: TissueAttributes
    seed: tuple[int, ...]
    config: HospitalConfig


def make_hospital(
    folder: Path,
    config: HospitalConfig,
    *,
    num_processes: int = 2,
    progress: CountProgress | None = None,
) -> Path:
    """Draw the slides that are missing and write the table; returns the table's path.

    Slides (or tiles) lie in ``folder/slides``, images of nuclei in ``folder/nuclei``; ``progress``
    gets slides done and slides in all.

    Raises:
        HospitalError: the folder holds a hospital of another configuration.
    """
    for name in ("slides", "nuclei") if config.holdings == "tiles" else ("slides",):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _claim(folder / _CONFIG_NAME, config)
    planned = plan_slides(folder, config)
    missing = [slide for slide in planned if not slide.path.exists()]
    done = len(planned) - len(missing)
    with Pool(num_processes) as pool:
        for _ in pool.run(_draw, missing):
            done += 1
            if progress is not None:
                progress(done, len(planned))
    table = folder / TABLE_NAME
    _write_table(table, planned)
    return table


def _draw(slide: "PlannedSlide", beat: Beat) -> None:
    draw_slide(slide)
    beat(1)


def plan_slides(folder: Path, config: HospitalConfig) -> tuple[PlannedSlide, ...]:
    """Who has what, and what each slide shows. Draws no pixel."""
    labels = sorted(config.cancer_mix)
    weights = np.array([config.cancer_mix[label] for label in labels], dtype=np.float64)
    planned = []
    for patient in range(config.num_patients):
        patient_rng = np.random.default_rng([config.seed, patient])
        label = labels[int(patient_rng.choice(len(labels), p=weights / weights.sum()))]
        name = f"{config.name}-{patient:05d}"
        for number in range(config.slides_per_patient):
            seed = (config.seed, patient, number + 1)
            cancer, organ = _tissue(label)
            attributes = sample_attributes(np.random.default_rng(seed), cancer, organ=organ)
            stem, is_tile = f"{name}-{number:02d}", config.holdings == "tiles"
            planned.append(
                PlannedSlide(
                    path=folder / "slides" / f"{stem}.{'png' if is_tile else 'svs'}",
                    nuclei=folder / "nuclei" / f"{stem}.png" if is_tile else None,
                    patient=name,
                    label=label,
                    caption=compose_caption(cancer, attributes, organ=organ),
                    attributes=attributes,
                    seed=seed,
                    config=config,
                )
            )
    return tuple(planned)


def draw_slide(slide: PlannedSlide) -> None:
    """Render one slide, lay it on glass and write the file; a ready tile is tissue all over."""
    config = slide.config
    rng = np.random.default_rng([*slide.seed, 1])
    side = config.slide_px
    region = render_region(
        rng,
        width_px=side,
        height_px=side,
        mpp=config.mpp,
        phenotype=phenotype(slide.attributes),
        stain=config.stain,
    )
    if slide.nuclei is not None:
        write_file(slide.nuclei, _png(region.instances.astype(np.uint16)))
        write_file(slide.path, _png(region.image))
        return
    white = np.array(config.stain.white)
    glass = (white + rng.normal(0, config.stain.noise, (side, side, 3))) * 255
    tissue_HW1 = tissue_outline(rng, side)[..., None]
    light = region.image * tissue_HW1 + glass * (1 - tissue_HW1)
    image = (np.clip(light, 0, 255) + 0.5).astype(np.uint8)
    write_slide(slide.path, image, mpp=config.mpp, label=slide.path.stem)


def _png(pixels: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tissue_outline(rng: np.random.Generator, side_px: int) -> npt.NDArray[np.float64]:
    """One irregular piece: 1 on tissue, 0 on glass, soft over a few pixels at the edge."""
    axis = np.linspace(-1, 1, side_px)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    coarse = ndimage.gaussian_filter(rng.standard_normal((32, 32)), 3, mode="wrap")
    wave = ndimage.zoom(coarse / coarse.std(), side_px / 32, order=1)
    radius = np.hypot(x, y) ** 2 + 0.18 * wave
    outline = radius < np.quantile(radius, _TISSUE_PART)
    soft: npt.NDArray[np.float64] = ndimage.gaussian_filter(outline.astype(np.float64), _EDGE_PX)
    return soft


def _tissue(label: str) -> tuple[CancerType | None, str | None]:
    """The cancer type of a label, or None and the organ of a normal one."""
    try:
        return cancer_type(label), None
    except VocabularyError:
        return None, label.lower().removeprefix("normal ")


def _claim(path: Path, config: HospitalConfig) -> None:
    """Write down whose folder this is, or check that it is ours."""
    if path.exists():
        if path.read_text(encoding="utf-8").strip() != config.hash:
            raise HospitalError(
                f"{path.parent} holds a hospital of another configuration; remove it or choose "
                "another folder"
            )
        return
    write_file(path, config.hash + "\n")


def _write_table(path: Path, planned: tuple[PlannedSlide, ...]) -> None:
    rows = [
        (
            slide.path.relative_to(path.parent).as_posix(),
            slide.patient,
            slide.label,
            slide.caption,
            # A slide knows its scale.
            *(
                [slide.config.mpp, slide.nuclei.relative_to(path.parent).as_posix()]
                if slide.nuclei
                else []
            ),
        )
        for slide in planned
    ]
    header = ("file", "patient", "cancer_type", "caption", "mpp", "nuclei")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header[: len(rows[0])])
    writer.writerows(rows)
    write_file(path, text.getvalue())
