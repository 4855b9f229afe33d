"""The table of open tiles that a foundation of open tissue is built from.

    python benchmarks/open_tissue.py DATA > open-tissue.tsv
    crafts-server foundation build OUT --tiles open-tissue.tsv

DATA holds ``real/`` (open H&E tiles with MANIFEST.tsv) and ``atlas_tiles/``. Cases are held out by
the hash of their name, one in four of every label that has at least three: what is measured on them
was never looked at.
"""

import argparse
import csv
import hashlib
import sys
from collections import defaultdict
from pathlib import Path
from typing import TextIO

COLUMNS = ("file", "case", "organ", "type", "caption", "mpp", "licence", "source", "split")
ATLAS = "Pathology Atlas, patolojiatlasi.github.io (Serdar Balci, Memorial Patoloji)"
SOURCES = {
    "patoloji_atlas": ATLAS,
    "brecahad": "BreCaHAD (Aksac et al. 2019)",
    "crc_val_he": "CRC-VAL-HE (Kather et al. 2018)",
    "ocdc": "OCDC oral cavity derived cancer (Mendeley Data)",
    "oscc": "Oral squamous cell carcinoma images (Mendeley Data)",
    "oscc224": "Oral histopathology images (Kaggle)",
    "osteosarcoma_tcia": "Osteosarcoma-Tumor-Assessment (TCIA)",
    "rings_prostate": "RINGS prostate (Mendeley Data)",
}
Row = dict[str, str]


def real(data: Path) -> list[Row]:
    """Rows of ``real/MANIFEST.tsv``."""
    rows = []
    for line in _lines(data / "real" / "MANIFEST.tsv"):
        rows.append(
            {
                "file": str(data / "real" / line["file"]),
                "case": line["case_id"],
                "organ": _organ(line["organ"]),
                "type": line["tcga"] if line["tcga"] != "other" else "",
                "caption": line["diagnosis"],
                "mpp": line["mpp"],
                "licence": line["licence"],
                "source": SOURCES[line["source"]],
            }
        )
    return rows


def atlas_tiles(data: Path, known: list[Row]) -> list[Row]:
    """More tiles of atlas cases that ``real/`` has already, at another scale."""
    scales = {
        line["slide in atlas_tiles"]: line["mpp of its tiles (top level)"]
        for line in _lines(data / "real" / "atlas_tiles_mpp.tsv")
    }
    cases = {row["case"]: row for row in known}
    rows = []
    for line in _lines(data / "atlas_tiles" / "atlas_tiles.tsv"):
        like = cases.get(f"pathologyatlas/{line['case']}")
        if like is not None:
            scale = scales[f"{line['case']}_{line['slide']}"]
            rows.append({**like, "file": str(data / line["image"]), "mpp": scale})
    return rows


def split(rows: list[Row]) -> list[Row]:
    """With ``split``: by case, one in four of each label with at least three cases."""
    groups: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        groups[row["type"] if row["type"] not in ("", "normal") else row["organ"]].add(row["case"])
    held_out: set[str] = set()
    taken: set[str] = set()
    for label in sorted(groups):
        cases = sorted(groups[label] - taken, key=_digest)
        taken |= groups[label]
        if len(cases) >= 3:
            held_out |= set(cases[: max(1, len(cases) // 4)])
    return [{**row, "split": "held-out" if row["case"] in held_out else "build"} for row in rows]


def _organ(name: str) -> str:
    return "" if "not stated" in name else name


def _digest(case: str) -> str:
    return hashlib.sha256(case.encode()).hexdigest()


def _lines(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened, delimiter="\t"))


def write(rows: list[Row], out: TextIO) -> None:
    """The table."""
    writer = csv.DictWriter(out, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    folder = parser.parse_args().data.resolve()
    found = real(folder)
    write(split(found + atlas_tiles(folder, found)), sys.stdout)
