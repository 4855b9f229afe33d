"""Ingest beside a bare OpenSlide loop that reads and JPEG-encodes the same tiles, in one run.

Slides are drawn tissue without glass, pyramids of 256 px JPEG tiles at 0.5 microns per pixel; or
``--slide FILE``, a real one. Both sides run in one process on one thread, by turns; ratios are of
seconds of a core, with those of the wall beside:

    resampled   256 px at 1 micron per pixel, from 512 px of level 0
    stored      256 px at the slide's own scale, decoded and encoded again
    small       64 px at 1 micron per pixel: what the embedded foundation takes
    copied      as ``stored``, with compressed tiles copied; the bare loop decodes and encodes
    elsewhere   as ``stored``, with every pixel read through OpenSlide, as where a slide is not
                a TIFF of plain JPEG tiles

Ingest does everything: header, thumbnail, tissue, pen and fold masks, pictures, grid, reads,
judging each tile, encoding, shard and journal with hashes, index and manifest. ``two_cores`` is the
time of one process over the time of two on the same eight slides of a quarter of the area, each
from a program of its own, start of processes included; ``memory`` the peak of a program that
ingests one of these, one four times as large, and four.

    OMP_NUM_THREADS=1 python benchmarks/ingest_speed.py --out results/ingest.json
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openslide
from PIL import Image

from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.ingest import ingest_slides
from crafts_client.ingest.readers.openslide_files import OpenSlideFile
from crafts_client.ingest.table import read_table
from crafts_client.ingest.tiling import TilingOptions
from crafts_core.procedural import phenotype, random_stain, render_region
from crafts_core.tiles import TileStore
from crafts_core.tiles.records import JPEG_QUALITY
from crafts_core.vocabulary import cancer_type, sample_attributes
from crafts_simulations.slides import write_slide

MPP = 0.5
SETTINGS = {
    "resampled": {"tile_px": 256, "mpp": 2 * MPP, "copy_stored_tiles": False},
    "stored": {"tile_px": 256, "mpp": MPP, "copy_stored_tiles": False},
    "small": {"tile_px": 64, "mpp": 2 * MPP, "copy_stored_tiles": False},
    "copied": {"tile_px": 256, "mpp": MPP, "copy_stored_tiles": True},
    "elsewhere": {"tile_px": 256, "mpp": MPP, "copy_stored_tiles": False},
}
NUM_SMALLER = 8


class Seconds(NamedTuple):
    """Of this process's cores, and of the clock on the wall."""

    core: float
    wall: float

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.core - other.core, self.wall - other.wall)


def now() -> Seconds:
    """Since some moment."""
    return Seconds(time.process_time(), time.perf_counter())


def drawn_slide(path: Path, side_px: int, seed: int = 0) -> Path:
    """Tissue from edge to edge: a drawn square, mirrored until the slide is full."""
    rng = np.random.default_rng(seed)
    attributes = sample_attributes(rng, cancer_type("COAD"))
    square = render_region(
        rng,
        width_px=1024,
        height_px=1024,
        mpp=MPP,
        phenotype=phenotype(attributes),
        stain=random_stain(rng),
    ).image
    row = np.concatenate([square, square[:, ::-1]] * (side_px // 2048 + 1), axis=1)[:, :side_px]
    image = np.concatenate([row, row[::-1]] * (side_px // 2048 + 1), axis=0)[:side_px]
    write_slide(path, image, mpp=MPP, label="bench")
    return path


def ingest(slides: list[Path], out: Path, options: TilingOptions, processes: int) -> Seconds:
    """The whole ingest."""
    table = out.with_suffix(".csv")
    lines = [f"{slide},p{number},COAD" for number, slide in enumerate(slides)]
    table.write_text("\n".join(["file,patient,label", *lines]) + "\n")
    started = now()
    ingest_slides(
        read_table(table),
        out,
        cohort="bench",
        salt=Salt(bytes(32)),
        options=options,
        num_processes=processes,
        pictures=out.with_suffix(".pictures"),
    )
    return now() - started


def bare(slide: Path, tiles: list[tuple[int, int, float]], options: TilingOptions) -> Seconds:
    """Open, read and encode the tiles (x, y, level-0 side) and write them to a file."""
    started = now()
    handle = openslide.OpenSlide(slide)
    handle.set_cache(openslide.OpenSlideCache(32 * 2**20))
    side = options.tile_px
    with tempfile.TemporaryFile() as file:
        for x, y, extent in tiles:
            level = handle.get_best_level_for_downsample(extent / side * 1.02)
            read_px = round(extent / handle.level_downsamples[level])
            region = handle.read_region((x, y), level, (read_px, read_px)).convert("RGB")
            if read_px != side:
                region = region.resize((side, side), Image.Resampling.HAMMING)
            buffer = io.BytesIO()
            region.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            file.write(buffer.getvalue())
    handle.close()
    return now() - started


@contextlib.contextmanager
def through_openslide() -> Iterator[None]:
    """As if the slide's vendor stored its tiles in another way."""
    whole = OpenSlideFile._tiles
    OpenSlideFile._tiles = lambda _: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        OpenSlideFile._tiles = whole  # type: ignore[method-assign]


def compare(name: str, slide: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """One setting: medians over runs that take turns."""
    options = TilingOptions(**SETTINGS[name])  # type: ignore[arg-type]
    pairs = []
    for number in range(repeats + 1):  # the first warms the file cache
        out = folder / f"{name}-{number}"
        with through_openslide() if name == "elsewhere" else contextlib.nullcontext():
            ours = ingest([slide], out, options, 0)
        index = TileStore.open(out).index
        columns = (index.column(c).to_pylist() for c in ("x", "y", "level0_width"))
        tiles = list(zip(*columns, strict=True))
        pairs.append((bare(slide, tiles, options), ours, len(tiles)))
    num_tiles = pairs[0][2]
    ratios = sorted(theirs.core / ours.core for theirs, ours, _ in pairs[1:])
    return {
        "setting": name,
        "tiles": num_tiles,
        "bare_tiles_per_core_s": round(num_tiles / statistics.median(p[0].core for p in pairs[1:])),
        "ingest_tiles_per_core_s": round(
            num_tiles / statistics.median(p[1].core for p in pairs[1:])
        ),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio_by_the_wall": round(
            statistics.median(theirs.wall / ours.wall for theirs, ours, _ in pairs[1:]), 3
        ),
    }


class Alone(NamedTuple):
    """What one ingest took in a program of its own."""

    wall_s: float
    peak_mib: float
    """Of the program itself, without its workers."""


def alone(setting: str, processes: int, out: Path, slides: list[Path]) -> Alone:
    """Run ``print_alone`` in a new program."""
    asked = [setting, str(processes), str(out), *map(str, slides)]
    command = [sys.executable, __file__, "--alone", *asked]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Alone(**json.loads(done.stdout))


def print_alone(setting: str, processes: str, out: str, *slides: str) -> None:
    """Ingest in this program and print what it took."""
    options = TilingOptions(**SETTINGS[setting])  # type: ignore[arg-type]
    took = ingest([Path(slide) for slide in slides], Path(out), options, int(processes))
    # Not ru_maxrss, which begins with what the parent had.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [peak] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    print(json.dumps(Alone(round(took.wall, 3), round(int(peak) / 1024, 1))._asdict()))


def two_cores(slides: list[Path], folder: Path, repeats: int) -> dict[str, Any]:
    """The same slides with one process and with two."""
    ratios = []
    for number in range(repeats + 1):  # the first warms the file cache
        one, two = (
            alone("stored", processes, folder / f"cores-{processes}-{number}", slides).wall_s
            for processes in (1, 2)
        )
        ratios.append(round(one / two, 3))
    median = round(statistics.median(ratios[1:]), 3)
    return {"slides": len(slides), "ratio": median, "ratios": sorted(ratios[1:])}


def memory(slides: dict[str, list[Path]], folder: Path) -> dict[str, float]:
    """Peak resident MiB of a program that does everything itself."""
    return {
        name: alone("small", 0, folder / f"memory-{name}", some).peak_mib
        for name, some in slides.items()
    }


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slide", type=Path, help="a real slide instead of a drawn one")
    parser.add_argument("--side", type=int, default=16384, help="of the drawn slide")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print_alone(*arguments.alone)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        slide = arguments.slide or drawn_slide(folder / "large.svs", arguments.side)
        result: dict[str, Any] = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "openslide": openslide.__library_version__,
            "slide": arguments.slide.name if arguments.slide else f"drawn, {arguments.side} px",
            "settings": [],
        }
        for name in SETTINGS:
            result["settings"].append(compare(name, slide, folder, arguments.repeats))
            print(result["settings"][-1])
        if not arguments.slide:
            smaller = [
                drawn_slide(folder / f"{n}.svs", arguments.side // 2, n) for n in range(NUM_SMALLER)
            ]
            result["two_cores"] = two_cores(smaller, folder, max(1, arguments.repeats // 2))
            print(result["two_cores"])
            some = {"one": smaller[:1], "four times as large": [slide], "four": smaller[:4]}
            result["peak_mib"] = memory(some, folder)
            print(result["peak_mib"])
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
