"""The tile store: what goes in comes out by patient, all of it or none."""

import tarfile
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crafts_core.durable import write_file
from crafts_core.tiles import TileRecord, TileStore, TileStoreError, TileStoreWriter, encode_tile
from crafts_core.tiles import writer as writer_module
from crafts_core.tiles.records import decode_tile
from crafts_core.tiles.writer import ShardWriter, commit_store, describe_file, shard_path

TILE_PX = 16
PATIENTS = ("a", "a", "a", "b", "c", "c")


def record(row: int, patient: str, **changes: object) -> TileRecord:
    values: dict[str, object] = {
        "tile_id": f"tile{row}",
        "patient": patient,
        "case": f"case-{patient}",
        "slide": f"slide-{patient}",
        "x": row,
        "y": 2 * row,
        "level0_width": 32.5,
        "level0_height": 32.5,
        "mpp": 1.0,
        "caption": f"caption {row % 2}",
        "label": f"label-{patient}",
        "tissue_fraction": 0.75,
        "sharpness": 100.0,
    }
    return TileRecord(**(values | changes))  # type: ignore[arg-type]


def jpeg(row: int) -> bytes:
    return encode_tile(np.random.default_rng(row).integers(0, 256, (TILE_PX, TILE_PX, 3), np.uint8))


def write_store(path: Path, *, shard_bytes: int = 2**20) -> Path:
    with TileStoreWriter(
        path, cohort="lung", tile_px=TILE_PX, mpp=1.0, shard_bytes=shard_bytes
    ) as writer:
        for row, patient in enumerate(PATIENTS):
            writer.add(record(row, patient), jpeg(row))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "store", shard_bytes=3000)


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_every_patient_has_its_own_contiguous_rows(path: Path) -> None:
    store = TileStore.open(path)
    rows = [store.tile_rows_of(patient).tolist() for patient in range(store.num_patients)]
    assert store.patients == ("a", "b", "c")
    assert rows == [[0, 1, 2], [3], [4, 5]]
    assert store.patient_indices([5, 0]).tolist() == [2, 0]


def test_captions_are_stored_once_each(path: Path) -> None:
    store = TileStore.open(path)
    assert store.captions == ("caption 0", "caption 1")
    assert store.caption_ids([0, 1, 2]).tolist() == [0, 1, 0]
    assert store.labels[4] == "label-c"


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, len(PATIENTS) - 1), max_size=9))
def test_images_come_in_the_order_asked_for(path: Path, rows: list[int]) -> None:
    images = TileStore.open(path).read_images(rows)
    assert images.shape == (len(rows), TILE_PX, TILE_PX, 3)
    for image, row in zip(images, rows, strict=True):
        np.testing.assert_array_equal(image, decode_tile(jpeg(row), TILE_PX))


def test_store_of_the_same_tiles_is_the_same_to_the_byte(tmp_path: Path) -> None:
    assert files_of(write_store(tmp_path / "one")) == files_of(write_store(tmp_path / "two"))


def test_shards_are_plain_tars_that_say_nothing_but_ids(path: Path) -> None:
    members = []
    for shard in sorted((path / "shards").iterdir()):
        with tarfile.open(shard) as tar:
            members += tar.getmembers()
    assert len(list((path / "shards").iterdir())) > 1
    assert [m.name for m in members] == [f"tile{row}.jpg" for row in range(len(PATIENTS))]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


@pytest.mark.parametrize(("name", "size"), [("a.jpg", 0), ("b" * 90, 8**11 - 1), ("c.jpg", 513)])
def test_headers_are_what_the_library_writes(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert writer_module._tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_patient_who_comes_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="follow each other"):
        write_tiles(tmp_path / "s", [record(row, patient) for row, patient in enumerate("aba")])


def test_tile_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unique"):
        write_tiles(tmp_path / "s", [record(0, "a"), record(0, "a")])


def test_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        write_tiles(tmp_path / "s", [record(0, "a"), None])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def write_tiles(path: Path, records: list[TileRecord]) -> None:
    with TileStoreWriter(path, cohort="x", tile_px=TILE_PX, mpp=1.0) as writer:
        for row, tile in enumerate(records):
            writer.add(tile, jpeg(row))


def test_store_without_tiles_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(TileStoreError, match="at least one"),
        TileStoreWriter(tmp_path / "s", cohort="x", tile_px=TILE_PX, mpp=1.0),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(TileStoreError, match="exists"):
        TileStoreWriter(tmp_path / "s", cohort="x", tile_px=TILE_PX, mpp=1.0)


def test_missing_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(TileStoreError, match="crafts-client ingest"):
        TileStore.open(tmp_path / "nowhere")


def test_unfinished_store_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    (path / "store.json").unlink()
    with pytest.raises(TileStoreError, match="unfinished"):
        TileStore.open(path)


def test_unknown_manifest_key_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    text = (path / "store.json").read_text()
    (path / "store.json").write_text(text.replace('"cohort"', '"extra": 1, "cohort"'))
    with pytest.raises(TileStoreError, match="extra: unknown key"):
        TileStore.open(path)


def test_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    (path / "store.json").write_text("{")
    with pytest.raises(TileStoreError, match="cannot read"):
        TileStore.open(path)


def test_torn_shard_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    shard = path / "shards" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(TileStoreError, match=r"000000.tar is missing or torn"):
        TileStore.open(path)


@pytest.mark.parametrize("kind", ["index", "captions"])
def test_changed_index_is_refused(tmp_path: Path, kind: str) -> None:
    path = write_store(tmp_path / "s")
    [file] = path.glob(f"{kind}-*.parquet")
    flip_byte(file, 40)
    with pytest.raises(TileStoreError, match=f"{file.name} was changed"):
        TileStore.open(path)


def test_rows_are_what_was_committed(path: Path) -> None:
    rows = TileStore.open(path).rows()
    assert rows.column("caption").to_pylist() == [f"caption {row % 2}" for row in range(6)]
    assert rows.column("patient").to_pylist() == list(PATIENTS)


def test_store_shrinks_and_grows_in_place(tmp_path: Path) -> None:
    """Fewer rows, then all of them again: every time exactly what the manifest names is there."""
    path = write_store(tmp_path / "s", shard_bytes=3000)
    whole, files = TileStore.open(path), files_of(path)
    rows, about = whole.rows(), {"cohort": "lung", "tile_px": TILE_PX, "mpp": 1.0, "sources": {}}
    shards = whole.shards
    kept = rows.filter(pc.not_equal(rows["patient"], "c"))
    names = set(kept["shard"].to_pylist())
    left = {name: (path / shard_path(name)).read_bytes() for name in shards.keys() - names}
    commit_store(path, kept, shards={name: shards[name] for name in names}, **about)
    fewer = TileStore.open(path)
    fewer.verify()
    assert fewer.patients == ("a", "b")
    assert not any((path / shard_path(name)).exists() for name in left)
    for name, content in left.items():
        (path / shard_path(name)).write_bytes(content)
    commit_store(path, rows, shards=shards, **about)
    assert files_of(path) == files


def test_former_content_counts_until_the_manifest_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_store(tmp_path / "s")
    store = TileStore.open(path)

    def killed(file: Path, content: object) -> None:
        if file.name == "store.json":
            raise KeyboardInterrupt
        write_file(file, content)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        commit_store(
            path, store.rows()[:3], cohort="lung", tile_px=TILE_PX, mpp=1.0, shards=store.shards,
            sources={},
        )  # fmt: skip
    TileStore.open(path).verify()
    assert TileStore.open(path).num_tiles == 6


def test_shard_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "whole.tar") as whole:
        for row in range(3):
            whole.append(f"{row}.jpg", jpeg(row))
        whole.finish()
    with ShardWriter(tmp_path / "cut.tar") as begun:
        begun.append("0.jpg", jpeg(0))
        kept, digest = begun.num_bytes, begun.sha256
        begun.append("torn.jpg", b"half of it")
    with ShardWriter(tmp_path / "cut.tar", keep_bytes=kept, digest=digest) as again:
        for row in (1, 2):
            again.append(f"{row}.jpg", jpeg(row))
        assert again.finish() == describe_file(tmp_path / "whole.tar")
    assert (tmp_path / "cut.tar").read_bytes() == (tmp_path / "whole.tar").read_bytes()


@pytest.mark.parametrize("damage", ["changed", "too short"])
def test_shard_that_is_not_what_was_written_does_not_go_on(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.tar"
    with ShardWriter(path) as shard:
        shard.append("0.jpg", jpeg(0))
        kept, digest = shard.num_bytes, shard.sha256
    if damage == "changed":
        flip_byte(path, 600)
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TileStoreError, match="not what was written"):
        ShardWriter(path, keep_bytes=kept, digest=digest)


def test_changed_pixel_is_found_by_verify(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    store = TileStore.open(path)
    store.verify()
    flip_byte(path / "shards" / "000000.tar", 900)
    with pytest.raises(TileStoreError, match="was changed"):
        store.verify()


def test_tile_that_is_no_jpeg_names_itself_so() -> None:
    with pytest.raises(TileStoreError, match="not a readable JPEG"):
        decode_tile(b"not a picture", TILE_PX)


def test_tile_of_another_size_is_refused() -> None:
    with pytest.raises(TileStoreError, match="16x16 pixels, expected 32x32"):
        decode_tile(jpeg(0), 32)


def test_patient_outside_the_store_is_an_index_error(path: Path) -> None:
    with pytest.raises(IndexError):
        TileStore.open(path).tile_rows_of(-1)


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
