"""Nuclei of an image as annotations: 16-bit label images and COCO's run lengths.

Shape letters: H W pixels.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Labels = npt.NDArray[np.uint16]
CATEGORY = {"id": 1, "name": "nucleus"}


def numbered(labels_HW: npt.NDArray[Any]) -> Labels:
    """Instances numbered 1, 2, ... in the order of their labels; 0 stays background.

    Raises:
        ValueError: more instances than 16 bits number.
    """
    names, places = np.unique(labels_HW, return_inverse=True)
    has_background = len(names) > 0 and names[0] == 0
    if len(names) - has_background > np.iinfo(np.uint16).max:
        raise ValueError(f"expected at most 65535 instances, got {len(names) - has_background}")
    return (places.reshape(labels_HW.shape) + (not has_background)).astype(np.uint16)


def encode_labels(labels_HW: Labels) -> bytes:
    """A PNG of one 16-bit channel: each pixel the number of its instance."""
    buffer = io.BytesIO()
    Image.fromarray(labels_HW).save(buffer, "PNG")
    return buffer.getvalue()


def instances_of(labels_HW: Labels) -> list[dict[str, Any]]:
    """One COCO object each: ``id``, ``bbox`` (x, y, width, height), ``area``, ``segmentation``."""
    found = []
    for number in range(1, int(labels_HW.max(initial=0)) + 1):
        own = labels_HW == number
        rows, columns = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        found.append(
            {
                "id": number,
                "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
                "area": int(own.sum()),
                "segmentation": run_lengths(own),
            }
        )
    return found


def run_lengths(mask_HW: npt.NDArray[np.bool_]) -> dict[str, list[int]]:
    """COCO's uncompressed RLE: lengths of runs down the columns, the first one of background."""
    flat = np.concatenate([[False], mask_HW.ravel(order="F")])
    changes = np.flatnonzero(np.diff(flat))
    edges = np.concatenate([[0], changes, [mask_HW.size]])
    return {"size": list(mask_HW.shape), "counts": np.diff(edges).tolist()}


def coco_annotations(
    images: Mapping[str, tuple[int, int]], instances: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """A COCO file's content.

    Args:
        images: File name to (height, width).
        instances: File name to what ``instances_of`` gave.
    """
    listed = [
        {"id": place, "file_name": name, "height": height, "width": width}
        for place, (name, (height, width)) in enumerate(images.items(), start=1)
    ]
    annotations: list[dict[str, Any]] = []
    for image in listed:
        for each in instances[str(image["file_name"])]:
            own = {"id": len(annotations) + 1, "image_id": image["id"], "iscrowd": 1}
            annotations.append({**each, **own, "category_id": CATEGORY["id"]})
    return {"images": listed, "annotations": annotations, "categories": [CATEGORY]}
