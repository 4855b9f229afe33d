"""What ingest makes of each file of some folders, as a table.

Every file is ingested as a slide of its own patient, together with a drawn slide that gives tiles
whatever the file is. Tiles are of 64 px at 1 micron per pixel, or at the file's own scale where
that is coarser; files without a scale are tried as they are, then with one that is assumed.

    python benchmarks/ingest_files.py DIR... --out results/ingest-files.md
"""

import argparse
import os
import re
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.ingest import ingest_slides
from crafts_client.ingest.report import SourceOutcome
from crafts_client.ingest.table import TableRow
from crafts_client.ingest.tiling import TilingOptions
from crafts_simulations.slides import write_slide

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_COLUMNS = ("file", "read by", "scanner", "microns per pixel", "pixels", "tiles", "copied",
    "rejected", "identifying, not carried", "why nothing", "s")  # fmt: skip


def one(path: Path, name: str, folder: Path, mpp: float | None, drawn: Path) -> list[str]:
    """The file's line."""
    wanted = 1.0
    while True:
        started = time.monotonic()
        try:
            outcome = _outcome(path, name, folder / f"at-{wanted}", mpp, drawn, wanted)
        except IngestError as error:
            reason = error.problems[-1].removeprefix(f"line 1: {name}: ")
            return [name, *[""] * 8, reason, f"{time.monotonic() - started:.1f}"]
        coarse = re.search(r"its ([0-9.]+) microns per pixel are coarser", outcome.skipped or "")
        if coarse is None:
            return _cells(outcome, wanted, time.monotonic() - started)
        wanted = float(coarse[1])


def _outcome(
    path: Path, name: str, folder: Path, mpp: float | None, drawn: Path, wanted: float
) -> SourceOutcome:
    rows = [
        TableRow(
            line=n, name=name, path=path, patient=f"p{n}", case="", label="", caption="t", mpp=mpp
        )
        for n, name, path, mpp in ((1, name, path, mpp), (2, "drawn", drawn, wanted))
    ]
    report = ingest_slides(
        rows,
        folder,
        cohort="x",
        salt=Salt(bytes(32)),
        options=TilingOptions(tile_px=64, mpp=wanted),
        num_processes=1,
    )
    return report.sources[0]


def _cells(outcome: SourceOutcome, mpp: float, seconds: float) -> list[str]:
    return [
        outcome.file,
        outcome.reader or "",
        outcome.scanner or "",
        f"{outcome.mpp:.4g}" if outcome.mpp else "",
        " x ".join(map(str, outcome.size_px or ())),
        f"{outcome.num_tiles} at {mpp:g}",
        str(outcome.copied or ""),
        ", ".join(f"{number} {why}" for why, number in outcome.rejected.items()),
        ", ".join(outcome.identifiers),
        outcome.skipped or "",
        f"{seconds:.1f}",
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Ingest each file and print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--image-mpp", type=float, default=4.0, help="assumed of plain images")
    parser.add_argument("--slide-mpp", type=float, default=0.5, help="assumed of other files")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        drawn = Path(temporary) / "drawn.svs"
        is_nucleus = np.random.default_rng(0).random((512, 512, 1)) < 0.2
        tissue = np.where(is_nucleus, (90, 50, 130), (225, 160, 200)).astype(np.uint8)
        write_slide(drawn, tissue, mpp=1.0, label="")
        for folder in arguments.folders:
            for path in sorted(p for p in folder.iterdir() if p.is_file()):
                name = f"{folder.name}/{path.name}"
                out = Path(temporary) / folder.name / path.name
                mpp = arguments.image_mpp if path.suffix.lower() in _IMAGES else None
                lines.append(one(path, name, out, mpp, drawn))
                if "microns per pixel" in lines[-1][9]:
                    told = one(path, name, out / "told", arguments.slide_mpp, drawn)
                    lines.append([f"the same, said to have {arguments.slide_mpp:g}", *told[1:]])
                print(lines[-1])
    table = ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
    text = "\n".join(
        [
            f"# What ingest made of each file, {datetime.now(UTC):%Y-%m-%d}",
            "",
            f"Made by `benchmarks/{Path(__file__).name}`, {os.cpu_count()} cores. Tiles of 64 px "
            "at 1 micron per pixel, or at the file's own scale where that is coarser. Plain images "
            f"are slides here that were said to have {arguments.image_mpp:g} microns per pixel.",
            "",
            "| " + " | ".join(_COLUMNS) + " |",
            "|" + "---|" * len(_COLUMNS),
            *table,
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
