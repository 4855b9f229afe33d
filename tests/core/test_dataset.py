"""A drawn data set is what the libraries that load it say it is, and keeps its promises."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from typer.testing import CliRunner

from crafts_core.cli import app
from crafts_core.control_net import build_control_net, num_halvings_of
from crafts_core.dataset import Dataset, draw_dataset
from crafts_core.dataset_plan import (
    PACKED,
    DatasetConfig,
    DatasetError,
    list_masks,
    plan_images,
    read_splits,
    shares,
    splits_in_turn,
)
from crafts_core.evaluation.image_sets import ImageSetError, Scale, read_images
from crafts_core.foundation import Foundation
from crafts_core.foundation_manifest import sha256_of
from crafts_core.instance_masks import coco_text, instances_of, numbered, run_lengths
from crafts_core.provenance import read_provenance
from crafts_core.sampler_config import SamplerConfig
from crafts_core.studio import Studio
from crafts_core.tiles.conditions import read_labels
from crafts_core.tissue_types import read_types
from crafts_core.vocabulary import CANCER_TYPES, VocabularyError
from support.foundations import randomise, write_tiny_pipeline

TORCHVISION = Path(sys.prefix) / "torchvision"
READER = Path(__file__).parents[1] / "support" / "torchvision_folder.py"
SAMPLER = SamplerConfig(num_inference_steps=1, guidance_scale=1.0)
CONFIG = DatasetConfig(labels=("LUAD", "normal colon"), per_type=10, seed=4)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of numbered squares, not all of the size of a tile."""
    folder: Path = tmp_path_factory.mktemp("masks")
    for number in range(6):
        labels = np.zeros((32, 48 if number == 5 else 32), np.uint16)
        for place in range(number + 1):
            row, column = divmod(place, 3)
            labels[10 * row + 1 : 10 * row + 8, 10 * column + 2 : 10 * column + 9] = 300 + 7 * place
        Image.fromarray(labels).save(folder / f"m{number}.png")
    return folder


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A tiny generator with a ControlNet of random weights."""
    path = write_tiny_pipeline(tmp_path_factory.mktemp("generator") / "tiny", seed=3)
    opened = Studio.open(path)
    network: ControlNetModel = build_control_net(
        opened.generator.denoiser, "nuclei", num_halvings=num_halvings_of(opened.generator)
    )
    randomise(network, torch.Generator().manual_seed(0))
    network.save_pretrained(path / "controlnet" / "nuclei")
    return Studio.open(path)


@pytest.fixture(scope="module")
def drawn(studio: Studio, masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    told: list[str] = []
    made = draw_dataset(
        studio, tmp_path_factory.mktemp("data") / "set", CONFIG, SAMPLER, layouts=PACKED,
        masks=list_masks(masks), batch_size=20, warn=told.append,
    )  # fmt: skip
    assert [line for line in told if "48x32" in line]
    return made


def make(studio: Studio, root: Path, config: DatasetConfig, **options: Any) -> Dataset:
    """The tiny text encoder reads no caption to its end, and says so."""
    return draw_dataset(studio, root, config, SAMPLER, warn=lambda line: None, **options)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def bytes_of(root: Path) -> dict[str, bytes]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


# ---- as others load it -------------------------------------------------------------------------


@pytest.mark.slow
def test_datasets_loads_image_folder_and_parquet_alike(drawn: Dataset, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cache = str(tmp_path)
    folder = datasets.load_dataset(str(drawn.path), cache_dir=cache)
    packed = datasets.load_dataset(
        "parquet",
        data_files={split: f"{drawn.path}/parquet/{split}-*.parquet" for split in folder},
        cache_dir=cache,
    )
    assert {split: len(rows) for split, rows in folder.items()} == drawn.manifest.num_images
    assert packed["train"].features["label"].names == ["LUAD", "normal colon"]
    for split, rows in folder.items():
        by_key = {row["key"]: row for row in packed[split]}
        assert len(by_key) == len(rows)
        for row in rows:
            other = by_key[row["key"]]
            assert row["image"].tobytes() == other["image"].tobytes()
            assert row["label"] == packed[split].features["label"].int2str(other["label"])
            assert (row["caption"], row["features"]) == (other["caption"], other["features"])
            assert np.asarray(other["mask"]).max() == len(row["instances"])


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # it leaves its shards open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_its_shards(drawn: Dataset) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards = sorted(map(str, (drawn.path / "webdataset").glob("train-*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    rows = {row["key"]: row for row in drawn.rows("train")}
    assert [sample["__key__"] for sample in samples] == list(rows)
    for sample in samples:
        row = rows[sample["__key__"]]
        assert (sample["cls"], sample["txt"]) == (row["label_id"], row["caption"])
        assert np.array_equal(np.asarray(sample["png"]), pixels(row["file"]))
        assert np.asarray(sample["mask.png"]).max() == len(row["instances"])
        assert sample["json"]["label"] == row["label"]


@pytest.mark.slow
@pytest.mark.skipif(not TORCHVISION.exists(), reason="`make install` puts torchvision there")
def test_torchvision_reads_image_folders_by_class(drawn: Dataset) -> None:
    """In a process of its own: tests/support/torchvision_folder.py says why."""
    num_images = drawn.manifest.num_images
    done = subprocess.run(
        [sys.executable, READER, *(drawn.path / "imagefolder" / split for split in num_images)],
        env=os.environ | {"PYTHONPATH": str(TORCHVISION)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folders = json.loads(done.stdout)
    for (split, count), found in zip(num_images.items(), folders, strict=True):
        assert found["classes"] == ["LUAD", "normal-colon"]
        assert len(found["images"]) == count
        by_file = {image["file"]: image for image in found["images"]}
        for row in drawn.rows(split):
            image = by_file[str(row["file"])]
            assert (image["class"], image["size"]) == (row["label"].replace(" ", "-"), [32, 32])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_cocos_own_reader_finds_the_masks(drawn: Dataset) -> None:
    for split in drawn.manifest.num_images:
        coco = COCO(drawn.path / "annotations" / f"{split}.json")
        assert len(coco.imgs) == drawn.manifest.num_images[split]
        for number, image in coco.imgs.items():
            labels = pixels(drawn.path / "masks" / split / image["file_name"])
            assert labels.dtype == np.uint16
            found = np.zeros_like(labels)
            for annotation in coco.imgToAnns[number]:
                mask = coco.annToMask(annotation).astype(bool)
                assert annotation["area"] == mask.sum()
                assert tuple(annotation["bbox"]) == tuple(
                    coco_mask.toBbox(coco.annToRLE(annotation)).astype(int)
                )
                found[mask] = found.max() + 1
            assert np.array_equal(found, labels)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_run_lengths_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for share in (0, 0.1, 0.5, 1):
        mask = rng.random((7, 5)) < share
        rle = run_lengths(mask)
        packed = coco_mask.frPyObjects(rle, 7, 5)
        assert np.array_equal(coco_mask.decode(packed).astype(bool), mask)


def test_parquet_says_which_column_is_an_image(drawn: Dataset) -> None:
    (path,) = (drawn.path / "parquet").glob("test-*.parquet")
    told = json.loads(pq.read_schema(path).metadata[b"huggingface"])["info"]["features"]
    assert (told["image"]["_type"], told["mask"]["_type"]) == ("Image", "Image")
    assert told["label"]["names"] == ["LUAD", "normal colon"]


# ---- what it promises --------------------------------------------------------------------------


def test_masks_are_those_that_steered(drawn: Dataset, masks: Path) -> None:
    by_hash = {read_provenance(row["file"]).control_sha256: row for row in drawn.rows("train")}
    assert len(by_hash) > 1
    known = {}
    for path in list_masks(masks):
        known[sha256_of(path)] = numbered(read_labels(path, tile_px=32))
    for digest, row in by_hash.items():
        labels = pixels(drawn.path / row["mask"])
        assert np.array_equal(labels, known[digest])


def test_no_mask_is_in_two_splits(drawn: Dataset) -> None:
    hashes = {
        split: {read_provenance(row["file"]).control_sha256 for row in drawn.rows(split)}
        for split in drawn.manifest.num_images
    }
    assert set(hashes) == {"train", "validation", "test"}
    assert not hashes["train"] & hashes["test"]
    assert not hashes["train"] & hashes["validation"]
    assert not hashes["validation"] & hashes["test"]


def test_fewer_masks_than_splits_are_refused(masks: Path) -> None:
    config = DatasetConfig(labels=("LUAD",), per_type=10)
    with pytest.raises(DatasetError, match="expected at least 3 masks, one a split, got 2"):
        plan_images(config, list_masks(masks)[:2])


@pytest.mark.parametrize("is_steered", [False, True])
def test_an_image_depends_on_its_type_and_number_alone(masks: Path, is_steered: bool) -> None:
    """Its split and its mask, too: what was in the test set does not come into training."""
    steered_by = list_masks(masks) if is_steered else []

    def requests(config: DatasetConfig) -> dict[str, object]:
        return {
            image.key: (image.request, image.split) for image in plan_images(config, steered_by)
        }

    small = requests(DatasetConfig(labels=("LUAD",), per_type=4))
    large = requests(DatasetConfig(labels=("COAD", "LUAD"), per_type=9))
    other = requests(DatasetConfig(labels=("LUAD",), per_type=4, seed=1))
    assert small.items() <= large.items()
    assert not small.items() & other.items()
    assert len({image.seed for image, _ in large.values()}) == 18  # type: ignore[misc]


def test_splits_keep_to_their_shares_at_every_number() -> None:
    parts = {"train": 0.8, "validation": 0.1, "test": 0.1}
    turns = splits_in_turn(40, parts)
    for count in (10, 20, 30, 40):
        given = {name: turns[:count].count(name) for name in parts}
        assert given == shares(count, parts)
    assert splits_in_turn(17, parts) == turns[:17]


def test_class_numbers_are_those_of_image_folders(studio: Studio, tmp_path: Path) -> None:
    """Which sort; people list types as they come to mind."""
    config = DatasetConfig(labels=("LUSC", "LUAD"), per_type=1, splits=(("train", 1.0),))
    made = make(studio, tmp_path / "set", config)
    folders = sorted(
        path.name for path in (made.path / "imagefolder/train").iterdir() if path.is_dir()
    )
    for row in made.rows("train"):
        assert folders[row["label_id"]] == row["label"]


def test_a_split_that_is_not_there_is_named(drawn: Dataset) -> None:
    with pytest.raises(DatasetError, match="has no split 'dev'; it has train, validation, test"):
        next(drawn.rows("dev"))


def test_what_file_managers_leave_is_no_change(studio: Studio, tmp_path: Path) -> None:
    config = DatasetConfig(labels=("LUAD",), per_type=1, splits=(("train", 1.0),))
    made = make(studio, tmp_path / "set", config)
    (made.path / ".DS_Store").write_bytes(b"x")
    made.verify()


def test_a_data_set_says_its_scale_to_whoever_measures_it(
    foundation: Foundation, tmp_path: Path
) -> None:
    """At another scale than the foundation's it would be measured wrongly in silence."""
    studio = Studio.open(foundation.path)
    config = DatasetConfig(labels=("LUAD",), per_type=2, splits=(("train", 1.0),))
    made = make(studio, tmp_path / "set", config)
    mpp = foundation.manifest.mpp
    assert {row["mpp"] for row in made.rows("train")} == {mpp}
    scale = Scale(
        told_mpp=None, at_mpp=mpp, largest_px=32, unit_px=4, foundation_hash="",
    )  # fmt: skip
    for folder in (made.path, made.path / "imagefolder/train/LUAD"):
        found = read_images(folder, scale, most=9, seed=0)
        assert found.side_px == 32
    with pytest.raises(ImageSetError, match="at least"):
        read_images(made.path, replace(scale, at_mpp=100 * mpp), most=9, seed=0)


def test_captions_say_what_the_row_says(drawn: Dataset) -> None:
    for row in drawn.rows("train"):
        for word in (row["nuclear_grade"], f"{row['stroma']} stroma", *row["features"]):
            assert word in row["caption"]


def test_every_image_says_where_it_comes_from(drawn: Dataset, studio: Studio) -> None:
    for split in drawn.manifest.num_images:
        for row in drawn.rows(split):
            said = read_provenance(row["file"])
            assert said.origin == studio.origin
            assert said.prompts == (row["caption"],)


def test_the_same_call_gives_the_same_bytes_after_any_end(
    drawn: Dataset, studio: Studio, masks: Path, tmp_path: Path
) -> None:
    """Its images are there in part, its manifest says that it is not complete."""
    root = tmp_path / "set"
    content = bytes_of(drawn.path)
    for name in [name for name in content if name.endswith(".png")][::2]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content[name])
    half = drawn.manifest.model_copy(update={"is_complete": False, "files": {}})
    (root / "manifest.json").write_text(half.model_dump_json())
    with pytest.raises(DatasetError, match="is not complete"):
        Dataset.open(root)
    again = make(studio, root, CONFIG, layouts=PACKED, masks=list_masks(masks), batch_size=20)
    assert bytes_of(again.path) == content


def test_another_call_leaves_nothing_of_the_first(studio: Studio, tmp_path: Path) -> None:
    root = tmp_path / "set"
    first = DatasetConfig(labels=("COAD", "LUAD"), per_type=3)
    make(studio, root, first, layouts=PACKED, batch_size=6)
    second = DatasetConfig(labels=("LUAD",), per_type=2, splits=(("test", 1.0),))
    made = make(studio, root, second, batch_size=6)
    made.verify()
    assert sorted(bytes_of(root)) == [
        "README.md",
        "imagefolder/test/LUAD/LUAD-000000.png", "imagefolder/test/LUAD/LUAD-000001.png",
        "imagefolder/test/metadata.jsonl", "manifest.json",
    ]  # fmt: skip
    assert not (root / "imagefolder" / "test" / "COAD").exists()


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_a_folder_of_something_else_is_not_touched(
    studio: Studio, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(DatasetError, match=r"name a new folder|name another folder"):
        make(studio, tmp_path, CONFIG)
    assert bytes_of(tmp_path) == {name: b"{}"}


def test_masks_inside_the_data_set_are_not_removed(studio: Studio, tmp_path: Path) -> None:
    made = make(studio, tmp_path / "set", DatasetConfig(labels=("LUAD",), per_type=1))
    inside = made.path / "masks" / "m.png"
    inside.parent.mkdir()
    Image.new("L", (32, 32), 1).save(inside)
    config = DatasetConfig(labels=("LUAD",), per_type=1, splits=(("train", 1.0),))
    with pytest.raises(DatasetError, match="move them out"):
        make(studio, made.path, config, masks=[inside])
    assert inside.exists()


@pytest.mark.parametrize("change", ["flip", "remove", "add"])
def test_a_changed_file_is_found(studio: Studio, tmp_path: Path, change: str) -> None:
    config = DatasetConfig(labels=("LUAD",), per_type=1, splits=(("train", 1.0),))
    make(studio, tmp_path / "set", config)
    made = Dataset.open(tmp_path / "set")
    made.verify()
    (row,) = made.rows("train")
    content = row["file"].read_bytes()
    if change == "flip":
        row["file"].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif change == "remove":
        row["file"].unlink()
    else:
        row["file"].with_name("more.png").write_bytes(content)
    with pytest.raises(DatasetError, match=r"altered|missing|not in manifest"):
        made.verify()


def test_the_card_tells_what_it_is(drawn: Dataset) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.DatasetCard.load(drawn.path / "README.md")
    assert card.data.configs[0]["data_files"][0]["split"] == "train"
    assert "image-segmentation" in card.data.task_categories
    for part in ("none shows a patient's tissue", "LUAD, normal colon", "train 16", "16-bit PNG"):
        assert part in card.text


# ---- parts and command -------------------------------------------------------------------------


def test_whole_numbers_add_up() -> None:
    for total in range(12):
        counts = shares(total, {"train": 0.8, "validation": 0.1, "test": 0.1})
        assert sum(counts.values()) == total
    assert shares(10, {"a": 0.8, "b": 0.1, "c": 0.1}) == {"a": 8, "b": 1, "c": 1}


@pytest.mark.parametrize(
    "text", ["", "train", "train=0", "train=nan", "train=1,train=1", "dev=1", "train=inf"]
)
def test_splits_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(DatasetError, match="with a share each"):
        read_splits(text)


@pytest.mark.parametrize(
    "wrong", [{"per_type": 0}, {"labels": ()}, {"splits": ()}, {"splits": (("dev", 1.0),)}]
)
def test_a_data_set_of_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        DatasetConfig(**{"labels": ("LUAD",), "per_type": 1, **wrong})  # type: ignore[arg-type]


def test_types_are_codes_names_and_normal_tissue() -> None:
    assert read_types(["luad, TCGA-COAD", "lung adenocarcinoma,normal colon", "colon_n"]) == [
        "LUAD", "COAD", "normal colon",
    ]  # fmt: skip
    assert read_types(["all"]) == [cancer.code for cancer in CANCER_TYPES]
    with pytest.raises(VocabularyError, match="XXXX"):
        read_types(["LUAD,XXXX"])
    with pytest.raises(VocabularyError, match="no type is named"):
        read_types([" , "])


def test_instances_are_numbered_from_one() -> None:
    labels = np.array([[70000, 0], [5, 5]])
    assert numbered(labels).tolist() == [[2, 0], [1, 1]]
    assert numbered(np.array([[9, 9]])).tolist() == [[1, 1]]
    assert instances_of(numbered(np.zeros((2, 2), int))) == []
    with pytest.raises(ValueError, match="at most 65535 instances"):
        numbered(np.arange(65_537).reshape(1, -1))


def test_annotations_are_numbered_through() -> None:
    one = instances_of(numbered(np.array([[1, 2]])))
    listed = json.loads("".join(coco_text({"a": (1, 2), "b": (1, 2)}, [one, one])))
    assert [each["id"] for each in listed["annotations"]] == [1, 2, 3, 4]
    assert [each["image_id"] for each in listed["annotations"]] == [1, 1, 2, 2]
    assert [each["file_name"] for each in listed["images"]] == ["a", "b"]
    assert {each["iscrowd"] for each in listed["annotations"]} == {0}, "a crowd is never scored"


def test_the_program_draws_a_data_set(foundation: Foundation, tmp_path: Path) -> None:
    words = [
        "dataset", str(tmp_path / "set"), "--generator", str(foundation.path), "--types", "LUAD",
        "--per-type", "2", "--splits", "train=1,test=1", "--steps", "1", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_images"] == {"train": 1, "test": 1}
    Dataset.open(tmp_path / "set").verify()


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--types", "XXXX"], 1, "unknown cancer type 'XXXX'"),
        (["--types", "all", "--per-type", "900000"], 1, "more than one run draws"),
        (["--splits", "dev=1"], 1, "with a share each"),
        (["--control", "nuclei"], 2, "belong together"),
        (["--layout", "zip"], 2, "must be webdataset or parquet, beside"),
    ],
)
def test_what_cannot_be_made_is_told_before_it_is_begun(
    foundation: Foundation, tmp_path: Path, options: list[str], code: int, told: str
) -> None:
    words = ["dataset", str(tmp_path / "set"), "--generator", str(foundation.path)]
    given = [] if "--types" in options else ["--types", "LUAD"]
    given += [] if "--per-type" in options else ["--per-type", "2"]
    result = CliRunner().invoke(app, [*words, *given, *options])
    assert result.exit_code == code, result.output
    assert told in " ".join(result.stderr.replace("│", "").split())
    assert not (tmp_path / "set").exists()


def test_what_a_mac_or_a_person_puts_beside_masks_is_none(tmp_path: Path) -> None:
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "b.tif").mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    assert list_masks(tmp_path) == [tmp_path / "a.png"]
