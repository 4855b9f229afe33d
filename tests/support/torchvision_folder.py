"""What ``torchvision.datasets.ImageFolder`` reads of a folder, as JSON; run as a program.

In a process of its own, with torchvision's folder in PYTHONPATH: the build of torchvision that is
on the indexes needs CUDA's libraries, so beside the CPU build of torch its compiled operators do
not load, and other libraries that find it would fail. Reading image folders needs none of them;
they are declared here only so that the import goes through.

    PYTHONPATH=.venv/torchvision python tests/support/torchvision_folder.py ROOT...
"""

import json
import sys

import torch

library = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")

from torchvision.datasets import ImageFolder  # noqa: E402


def read(root: str) -> dict[str, list[object]]:
    folder = ImageFolder(root)
    images = [
        {"file": path, "class": folder.classes[number], "size": folder[place][0].size}
        for place, (path, number) in enumerate(folder.samples)
    ]
    return {"classes": folder.classes, "images": images}


if __name__ == "__main__":
    json.dump([read(root) for root in sys.argv[1:]], sys.stdout)
