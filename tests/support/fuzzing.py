"""A process of its own that reads mutants of slides and says how each one went.

``python fuzzing.py SOURCES WORK FIRST COUNT``: SOURCES is a folder of small slides. A line per
mutant is written before it is touched, so that the parent knows which one killed or hung it.
"""

import resource
import shutil
import sys
import time
from pathlib import Path

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.lossless import tile_copier
from crafts_client.ingest.slides import Slide
from crafts_client.ingest.source_audit import audit_source
from support.mutants import mutant

MAX_BYTES = 3 * 2**30
"""Room for the libraries themselves; a decoder that wants what a header claims hits it."""
TILE_PX = 64


def main() -> None:
    sources, work, first, count = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    originals = sorted(path for path in sources.rglob("*") if path.is_file())
    for seed in range(first, first + count):
        original = originals[seed % len(originals)]
        print("begin", seed, original.name, flush=True)
        start = time.monotonic()
        outcome = read_mutant(original, work, seed)
        print("end", seed, f"{time.monotonic() - start:.3f}", outcome, flush=True)


def read_mutant(original: Path, work: Path, seed: int) -> str:
    """Make one mutant, do all with it that ingest does, and say what came of it."""
    folder = work / str(seed)
    folder.mkdir()
    path = folder / original.name
    path.write_bytes(mutant(original.read_bytes(), seed))
    try:
        return _read(path)
    except SlideError as error:
        return "leaked" if str(folder) in str(error) or path.name in str(error) else "refused"
    except Exception as error:  # what must not be: the test names it
        return f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        shutil.rmtree(folder)


def _read(path: Path) -> str:
    with Slide.open(path, mpp=0.5) as slide:
        audit_source(path, slide)
        copier = tile_copier(path, slide, TILE_PX, slide.mpp_x)
        failures = 0
        for attempt in ("thumbnail", "corner", "middle", "end", "coarse"):
            try:
                _look(slide, attempt)
            except SlideError:
                failures += 1
        if copier is not None:
            copier.copy(0, 0)
            copier.copy(TILE_PX, TILE_PX)
    return f"read with {failures} places damaged" if failures else "read"


def _look(slide: Slide, attempt: str) -> None:
    width, height = slide.size_px
    size = (TILE_PX, TILE_PX)
    if attempt == "thumbnail":
        # A slide that claims a metre of glass takes its time; the pool's watchdog sees it move.
        if width * height < 10**8:
            slide.thumbnail(max_px=256, min_mpp=1.0)
        return
    x, y, scale = {
        "corner": (0, 0, 1),
        "middle": (width // 2, height // 2, 1),
        "end": (max(0, width - TILE_PX), max(0, height - TILE_PX), 1),
        "coarse": (0, 0, 4),
    }[attempt]
    slide.read((x, y, TILE_PX * scale, TILE_PX * scale), size)


if __name__ == "__main__":
    main()
