"""The table of open tiles with nuclei marked by hand that ``control_real.toml`` deals to hospitals.

    python benchmarks/nuclei_masks.py DATA > nuclei.tsv

DATA holds ``nuinsseg/``: NuInsSeg (Mahbod et al. 2024, CC BY 4.0), images of 512 px at about 0.25
microns per pixel, of which one fills a tile of the embedded foundation. Whose tissue each shows is
not told, so an image counts as a patient. None taught the foundation.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import TextIO

COLUMNS = ("file", "patient", "label", "caption", "mpp", "nuclei")
MPP = 0.25  # nominal of a 40x scan
TUMOURS = {"melanoma": "cutaneous melanoma, skin"}


def write(data: Path, out: TextIO) -> None:
    """A line an image."""
    writer = csv.DictWriter(out, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    with (data / "nuinsseg" / "nuinsseg.tsv").open(encoding="utf-8", newline="") as opened:
        for line in csv.DictReader(opened, delimiter="\t"):
            organ = line["organ_inferred"]
            writer.writerow(
                {
                    "file": data / line["image"],
                    "patient": Path(line["image"]).stem,
                    "label": organ,
                    "caption": f"H&E, {TUMOURS.get(organ, f'normal {organ}')}",
                    "mpp": MPP,
                    "nuclei": data / line["instances"],
                }
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    write(parser.parse_args().data.resolve(), sys.stdout)
