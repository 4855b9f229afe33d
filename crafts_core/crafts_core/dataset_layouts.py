"""One drawn data set in the layouts that people load.

``imagefolder`` is what is drawn: a folder for each split and class, with ``metadata.jsonl`` as
Hugging Face ``datasets`` reads it; image folders of torchvision read the same. ``webdataset`` and
``parquet`` are packed from it. The same images give the same bytes.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crafts_core.dataset_plan import DatasetImage
from crafts_core.image_folder import WRITING, write_whole
from crafts_core.instance_masks import coco_text, encode_labels, instances_of, numbered
from crafts_core.tiles.conditions import read_labels

IMAGES, MASKS, ANNOTATIONS, METADATA = "imagefolder", "masks", "annotations", "metadata.jsonl"
SHARD_IMAGES, ROW_GROUP = 1000, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFiles:
    """What the layouts are made of: a data set's folder, its images, and its classes in order."""

    root: Path
    images: Sequence[DatasetImage]
    labels: tuple[str, ...]
    tile_px: int
    mpp: float | None = None
    """Microns per pixel, where the generator says them."""

    def of_split(self) -> Iterator[tuple[str, list[DatasetImage]]]:
        """The images of each split, class after class."""
        splits = dict.fromkeys(image.split for image in self.images)
        for split in splits:
            yield split, [image for image in self.images if image.split == split]

    def image_path(self, image: DatasetImage) -> Path:
        return self.root / IMAGES / image.split / image.file_name

    def mask_path(self, image: DatasetImage) -> Path:
        return self.root / MASKS / image.split / image.file_name

    def row(self, image: DatasetImage) -> dict[str, Any]:
        """What is known of an image, in every layout."""
        row: dict[str, Any] = {
            "key": image.key,
            "label": image.label,
            "label_id": self.labels.index(image.label),
            "caption": image.request.prompt,
            "synthetic": True,
        }
        if self.mpp is not None:
            row["mpp"] = self.mpp
        if image.attributes is not None:
            row |= {**asdict(image.attributes), "features": list(image.attributes.features)}
        return row


def write_metadata(files: DatasetFiles) -> None:
    """``metadata.jsonl`` for each split, and where there are masks these and COCO's annotations.

    One image at a time: run lengths of all nuclei of a large data set fill no memory.
    """
    for split, images in files.of_split():
        metadata = files.root / IMAGES / split / METADATA
        _write_lines(metadata, (_metadata_line(files, image) for image in images))
        masked = [image.file_name for image in images if image.request.mask is not None]
        if masked:
            sizes = dict.fromkeys(masked, (files.tile_px, files.tile_px))
            with metadata.open(encoding="utf-8") as lines:
                rows = (json.loads(line) for line in lines)
                found = (row["instances"] for row in rows if "instances" in row)
                text = coco_text(sizes, found)
                _write_lines(files.root / ANNOTATIONS / f"{split}.json", text)


def _metadata_line(files: DatasetFiles, image: DatasetImage) -> str:
    row = {"file_name": image.file_name, **files.row(image)}
    if image.request.mask is not None:
        mask = f"{MASKS}/{image.split}/{image.file_name}"
        row |= {"mask": mask, "instances": _write_mask(files, image)}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write_lines(path: Path, parts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{WRITING}")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines(parts)
    temporary.replace(path)


def _write_mask(files: DatasetFiles, image: DatasetImage) -> list[dict[str, Any]]:
    assert image.request.mask is not None
    labels_HW = numbered(read_labels(image.request.mask, tile_px=files.tile_px))
    write_whole(files.mask_path(image), encode_labels(labels_HW))
    return instances_of(labels_HW)


# ---- WebDataset ------------------------------------------------------------------------------


def write_webdataset(files: DatasetFiles) -> None:
    """Tar shards: of each image ``png``, ``cls`` (its class), ``txt``, ``json``, ``mask.png``."""
    for split, images in files.of_split():
        for number, shard in enumerate(batches(images, SHARD_IMAGES)):
            path = files.root / "webdataset" / f"{split}-{number:06d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}{WRITING}")
            with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
                for image in shard:
                    for suffix, content in _members(files, image):
                        member = tarfile.TarInfo(f"{image.key}.{suffix}")
                        member.size, member.mode = len(content), 0o644
                        archive.addfile(member, io.BytesIO(content))
            temporary.replace(path)


def _members(files: DatasetFiles, image: DatasetImage) -> Iterator[tuple[str, bytes]]:
    row = files.row(image)
    yield "png", files.image_path(image).read_bytes()
    yield "cls", str(row["label_id"]).encode()
    yield "txt", image.request.prompt.encode()
    yield "json", json.dumps(row, ensure_ascii=False).encode()
    if image.request.mask is not None:
        yield "mask.png", files.mask_path(image).read_bytes()


# ---- Parquet ---------------------------------------------------------------------------------


def write_parquet(files: DatasetFiles) -> None:
    """Files with images inside; their schema tells ``datasets`` what is an image or a class."""
    schema = _schema(files)
    for split, images in files.of_split():
        shards = list(batches(images, SHARD_IMAGES))
        for number, shard in enumerate(shards):
            path = files.root / "parquet" / f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}{WRITING}")
            with pq.ParquetWriter(temporary, schema) as writer:
                for group in batches(shard, ROW_GROUP):
                    rows = [_parquet_row(files, image) for image in group]
                    writer.write_table(pa.Table.from_pylist(rows, schema))
            temporary.replace(path)


def _parquet_row(files: DatasetFiles, image: DatasetImage) -> dict[str, Any]:
    row = files.row(image)
    row["label"] = row.pop("label_id")
    row["image"] = {"bytes": files.image_path(image).read_bytes(), "path": f"{image.key}.png"}
    if image.request.mask is not None:
        row["mask"] = {"bytes": files.mask_path(image).read_bytes(), "path": f"{image.key}.png"}
    return row


def _schema(files: DatasetFiles) -> pa.Schema:
    """Columns by their Arrow type and by their name in ``datasets``."""
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = {"dtype": "string", "_type": "Value"}
    names = {"names": list(files.labels), "_type": "ClassLabel"}
    columns: dict[str, tuple[pa.DataType, Any]] = {
        "key": (pa.string(), text),
        "image": (picture, {"_type": "Image"}),
        "label": (pa.int64(), names),
        "caption": (pa.string(), text),
        "synthetic": (pa.bool_(), {"dtype": "bool", "_type": "Value"}),
    }
    if files.mpp is not None:
        columns["mpp"] = (pa.float64(), {"dtype": "float64", "_type": "Value"})
    if files.images[0].attributes is not None:
        for name in ("growth_pattern", "nuclear_grade", "stroma"):
            columns[name] = (pa.string(), text)
        columns["features"] = (pa.list_(pa.string()), {"feature": text, "_type": "List"})
    if files.images[0].request.mask is not None:
        columns["mask"] = (picture, {"_type": "Image"})
    told = {"info": {"features": {name: feature for name, (_, feature) in columns.items()}}}
    fields = [(name, arrow) for name, (arrow, _) in columns.items()]
    return pa.schema(fields, metadata={"huggingface": json.dumps(told)})


def batches(images: Sequence[DatasetImage], size: int) -> Iterator[Sequence[DatasetImage]]:
    """Neighbours, at most ``size`` at a time."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
