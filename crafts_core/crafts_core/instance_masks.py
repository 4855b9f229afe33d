"""Nuclei of an image as annotations: 16-bit label images and COCO's run lengths.

Shape letters: H W pixels.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

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
    for number, place in enumerate(ndimage.find_objects(labels_HW), start=1):
        own = labels_HW == number
        rows, columns = place
        found.append(
            {
                "id": number,
                "bbox": [
                    columns.start,
                    rows.start,
                    columns.stop - columns.start,
                    rows.stop - rows.start,
                ],
                "area": int(np.count_nonzero(own)),
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


def coco_text(
    images: Mapping[str, tuple[int, int]], instances: Iterable[list[dict[str, Any]]]
) -> Iterator[str]:
    """A COCO file piece by piece.

    Args:
        images: File name to (height, width).
        instances: Of each image in turn what ``instances_of`` gave.
    """
    listed = [
        {"id": place, "file_name": name, "height": height, "width": width}
        for place, (name, (height, width)) in enumerate(images.items(), start=1)
    ]
    yield f'{{"images": {json.dumps(listed)}, "annotations": ['
    number = 0
    for image, own in zip(listed, instances, strict=True):
        for each in own:
            number += 1
            told = {"id": number, "image_id": image["id"], "iscrowd": 0}
            yield ", " if number > 1 else ""
            yield json.dumps({**each, **told, "category_id": CATEGORY["id"]})
    yield f'], "categories": {json.dumps([CATEGORY])}}}'
