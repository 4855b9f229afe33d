"""Images that lie over ready tiles: taken along, checked first, and gone with their patient."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from crafts_client.ingest import shard_cut
from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.ingest import ingest_slides, ingest_tiles
from crafts_client.ingest.ingest_page import write_ingest_page
from crafts_client.ingest.report import IngestReport
from crafts_client.ingest.store_update import remove_patient
from crafts_client.ingest.table import read_table
from crafts_client.ingest.tiling import TilingOptions
from crafts_core.tiles import TileStore, TileStoreError
from crafts_core.tiles.conditions import (
    fluorescence_condition,
    nuclei_condition,
    to_bytes,
)

SALT = Salt(bytes(range(32)))
PX = 32


def labels_of(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return np.kron(rng.integers(0, 4, (8, 8)), np.ones((4, 4))).astype(np.uint16)


def light_of(number: int) -> np.ndarray:
    return np.random.default_rng(100 + number).integers(1, 255, (PX, PX, 3), dtype=np.uint8)


def make_folder(folder: Path, num_tiles: int = 6) -> Path:
    """Tiles of three patients: every second has nuclei, the third of each patient light."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    note = PngInfo()
    note.add_text("Patient", "DOE JANE")
    lines = ["file,patient,caption,nuclei,fluorescence"]
    for number in range(num_tiles):
        pixels = rng.integers(0, 256, (PX, PX, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"t{number}.png")
        cells = [f"t{number}.png", f"DOE-{number % 3}", f"glands {number}", "", ""]
        if number % 2 == 0:
            Image.fromarray(labels_of(number)).save(folder / f"DOE-n{number}.png", pnginfo=note)
            cells[3] = f"DOE-n{number}.png"
        if number % 3 == 2:
            Image.fromarray(light_of(number)).save(folder / f"f{number}.png")
            cells[4] = f"f{number}.png"
        lines.append(",".join(cells))
    (folder / "tiles.csv").write_text("\n".join(lines) + "\n")
    return folder / "tiles.csv"


def run(table: Path, out: Path, processes: int = 0) -> IngestReport:
    return ingest_tiles(
        read_table(table), out, cohort="colon", salt=SALT, tile_px=PX, num_processes=processes
    )


def files_of(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "ingest.lock"
    }


def row_of(store: TileStore, number: int) -> int:
    ids = store.caption_ids(range(store.num_tiles))
    return [store.captions[place] for place in ids].index(f"glands {number}")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "in")


@pytest.fixture
def store(table: Path, tmp_path: Path) -> TileStore:
    run(table, tmp_path / "store")
    return TileStore.open(tmp_path / "store")


def test_each_tile_has_its_own_condition(store: TileStore) -> None:
    for number in range(6):
        row = row_of(store, number)
        assert store.has_condition([row], "nuclei")[0] == (number % 2 == 0)
        assert store.has_condition([row], "fluorescence")[0] == (number % 3 == 2)
    rows = [row_of(store, 4), row_of(store, 0)]
    expected = [to_bytes(nuclei_condition(labels_of(n)), "nuclei") for n in (4, 0)]
    assert np.array_equal(store.read_conditions(rows, "nuclei"), np.stack(expected))
    bands = list(np.moveaxis(light_of(5), -1, 0))
    assert np.array_equal(
        store.read_conditions([row_of(store, 5)], "fluorescence")[0],
        to_bytes(fluorescence_condition(bands), "fluorescence"),
    )
    with pytest.raises(ValueError):
        store.read_conditions([row_of(store, 1)], "nuclei")


def test_the_central_square_is_that_of_the_tile(tmp_path: Path) -> None:
    """A tile of twice the width and half the scale: the same cut goes through both images."""
    folder = tmp_path / "in"
    folder.mkdir()
    wide = np.zeros((64, 128), np.uint8)
    wide[:, 32:96] = np.kron(labels_of(3), np.ones((2, 2), np.uint8))
    Image.fromarray(wide).save(folder / "m.png")
    Image.fromarray(np.stack([wide * 60] * 3, axis=-1)).save(folder / "t.png")
    (folder / "tiles.csv").write_text("file,patient,caption,nuclei\nt.png,p,glands,m.png\n")
    run(folder / "tiles.csv", tmp_path / "store")
    store = TileStore.open(tmp_path / "store")
    expected = to_bytes(nuclei_condition(labels_of(3)), "nuclei")
    assert np.array_equal(store.read_conditions([0], "nuclei")[0], expected)


def test_no_name_and_no_label_number_is_in_the_store(store: TileStore) -> None:
    assert not any(b"DOE" in content for content in files_of(store.path).values())


def test_the_store_is_the_same_to_the_byte(table: Path, store: TileStore, tmp_path: Path) -> None:
    run(table, tmp_path / "again", processes=1)
    assert files_of(tmp_path / "again") == files_of(store.path)
    report = run(table, tmp_path / "again")
    assert report.already == 6
    assert files_of(tmp_path / "again") == files_of(store.path)


def test_an_interrupted_run_goes_on(
    table: Path, store: TileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cut, "_COMMIT_EVERY_S", 0.0)
    keep, count = shard_cut.ShardCut.keep, [0]

    def stopping(self: shard_cut.ShardCut, *arguments: object) -> None:
        keep(self, *arguments)  # type: ignore[arg-type]
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(shard_cut.ShardCut, "keep", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(table, tmp_path / "again")
    run(table, tmp_path / "again")
    assert count[0] == 6, "no tile was cut twice"
    assert files_of(tmp_path / "again") == files_of(store.path)


def test_a_changed_added_or_removed_mask_changes_its_tile_alone(
    table: Path, store: TileStore
) -> None:
    before = files_of(store.path)
    text = table.read_text()
    Image.fromarray(labels_of(77)).save(table.parent / "DOE-n0.png")
    Image.fromarray(labels_of(88)).save(table.parent / "new.png")
    table.write_text(
        text.replace("glands 1,,", "glands 1,new.png,").replace("glands 4,DOE-n4.png", "glands 4,")
    )
    assert run(table, store.path).already == 3
    changed = TileStore.open(store.path)
    changed.verify()
    for number, labels in ((0, labels_of(77)), (1, labels_of(88)), (2, labels_of(2))):
        found = changed.read_conditions([row_of(changed, number)], "nuclei")[0]
        assert np.array_equal(found, to_bytes(nuclei_condition(labels), "nuclei"))
    assert not changed.has_condition([row_of(changed, 4)], "nuclei")[0]
    assert files_of(store.path) != before


def test_masks_of_who_is_forgotten_are_gone(store: TileStore) -> None:
    patient = SALT.patient_id("DOE-0")
    rows = store.tile_rows_of(store.patients.index(patient))
    shards = {store.index["shard"][int(row)].as_py() for row in rows}
    half_written = store.path / ".captions-0123456789abcdef.parquet.writing"
    half_written.write_bytes(b"glands 0")  # killed there
    assert remove_patient(store.path, patient) == 2
    assert not half_written.exists()
    left = TileStore.open(store.path)
    left.verify()
    assert left.has_condition(range(left.num_tiles), "nuclei").sum() == 2
    assert not any((store.path / "shards" / f"{shard}.tar").exists() for shard in shards)


def test_one_flipped_bit_of_a_mask_is_found(store: TileStore) -> None:
    offset = int(store.index["nuclei_offset"][row_of(store, 2)].as_py())
    name = store.index["shard"][row_of(store, 2)].as_py()
    path = store.path / "shards" / f"{name}.tar"
    content = bytearray(path.read_bytes())
    content[offset + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match="was changed"):
        TileStore.open(store.path).verify()


def test_everything_wrong_is_named_before_work_starts(table: Path, tmp_path: Path) -> None:
    folder = table.parent
    Image.fromarray(np.zeros((PX, 16), np.uint8)).save(folder / "DOE-n0.png")
    Image.fromarray(np.zeros((PX, PX, 3), np.uint8)).save(folder / "DOE-n2.png")
    (folder / "f5.png").write_text("no image")
    with pytest.raises(IngestError) as error:
        run(table, tmp_path / "store")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for line, (number, text) in zip(
        lines,
        [(2, "16x32 pixels, its tile 32x32"), (4, "not an integer label image"),
         (7, "not a readable image")],
        strict=True,
    ):  # fmt: skip
        assert f"line {number}: " in line
        assert text in line
    assert not (tmp_path / "store" / "store.json").exists()


def test_a_mask_must_be_a_file_of_its_own_below_the_folder(table: Path) -> None:
    shutil.copy(table.parent / "DOE-n0.png", table.parent.parent / "outside.png")
    (table.parent / "folder").mkdir()
    (table.parent / "link.png").symlink_to(table.parent.parent / "outside.png")
    text = table.read_text()
    for name, message in (
        ("../outside.png", "leaves"),
        ("link.png", "leaves"),
        ("missing.png", "does not exist"),
        ("folder", "is a folder"),
        ("DOE-n0.png", "also that of line 2"),
        ("t1.png", "is the tile of line 3"),
    ):
        table.write_text(text.replace("DOE-n2.png", name))
        with pytest.raises(IngestError, match=f"line 4: nuclei file .*{message}"):
            read_table(table)


def test_a_mask_that_breaks_later_takes_its_tile_along_by_name(table: Path, tmp_path: Path) -> None:
    whole = (table.parent / "DOE-n4.png").read_bytes()
    (table.parent / "DOE-n4.png").write_bytes(whole[: len(whole) - 40])
    report = run(table, tmp_path / "store")
    (skipped,) = report.skipped
    assert skipped.line == 6
    assert "nuclei image DOE-n4.png is damaged" in (skipped.skipped or "")
    assert TileStore.open(tmp_path / "store").num_tiles == 5


def test_masks_over_whole_slides_are_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(IngestError, match="whole slides"):
        ingest_slides(
            read_table(table), tmp_path / "s", cohort="colon", salt=SALT,
            options=TilingOptions(tile_px=PX, mpp=1.0), num_processes=0,
        )  # fmt: skip


@pytest.mark.parametrize("then", ["is_forgotten", "goes_on"])
def test_nothing_of_a_corrected_tile_stays_where_it_lay(
    table: Path, store: TileStore, then: str
) -> None:
    """Else the pixels of a patient would outlive ``forget`` in a shard of somebody else."""
    row = row_of(store, 3)
    (shard,) = (store.path / "shards").glob(f"{store.index['shard'][row].as_py()}.tar")
    start, length = (store.index[column][row].as_py() for column in ("offset", "length"))
    jpeg = shard.read_bytes()[start : start + length]
    others = [number for number in range(6) if number % 3 and number != 3]
    images = store.read_images([row_of(store, number) for number in (0, *others)])
    own = store.read_conditions([row_of(store, 0)], "nuclei")
    assert sum(jpeg in content for content in files_of(store.path).values()) == 1

    table.write_text(table.read_text().replace("t3.png,DOE-0", "t3.png,DOE-1"))
    run(table, store.path)
    store = TileStore.open(store.path)
    store.verify()
    assert sum(jpeg in content for content in files_of(store.path).values()) == 1
    if then == "is_forgotten":
        assert remove_patient(store.path, SALT.patient_id("DOE-1")) == 3
        assert not any(jpeg in content for content in files_of(store.path).values())
        assert TileStore.open(store.path).num_tiles == 3
        return
    assert store.num_tiles == 6
    again = store.read_images([row_of(store, number) for number in (0, *others)])
    assert (again == images).all()
    assert (store.read_conditions([row_of(store, 0)], "nuclei") == own).all()
    before = files_of(store.path)
    run(table, store.path)
    assert files_of(store.path) == before


def test_a_damaged_shard_is_not_copied_under_a_new_hash(table: Path, store: TileStore) -> None:
    shard = store.path / "shards" / f"{store.index['shard'][row_of(store, 3)].as_py()}.tar"
    content = bytearray(shard.read_bytes())
    content[store.index["offset"][row_of(store, 0)].as_py() + 200] ^= 1
    shard.write_bytes(content)
    table.write_text(table.read_text().replace("t3.png,DOE-0", "t3.png,DOE-1"))
    with pytest.raises(TileStoreError, match="--repair"):
        run(table, store.path)


def test_what_a_mask_carries_is_told_by_kind(table: Path, tmp_path: Path) -> None:
    report = run(table, tmp_path / "store")
    assert [outcome.identifiers for outcome in report.sources] == [
        ("text fields of PNG",) if number % 2 == 0 else () for number in range(6)
    ]
    assert "JANE" not in report.model_dump_json()
    page = write_ingest_page(report, tmp_path).read_text()
    assert 'nuclei<b>3</b><span class="muted">tiles with an image' in page
    assert 'fluorescence<b>2</b><span class="muted">tiles with an image' in page


def test_a_tile_that_pillow_cannot_make_sense_of_is_skipped_by_name(
    table: Path, tmp_path: Path
) -> None:
    tile = table.parent / "t1.png"
    Image.fromarray(np.full((PX, PX), 40_000, np.uint16)).save(tile)
    Image.fromarray(np.ones((PX, PX), np.uint8)).save(table.parent / "t3.tif")
    whole = (table.parent / "t3.tif").read_bytes()
    start = int.from_bytes(whole[4:8], "little")  # its width goes
    (table.parent / "t3.tif").write_bytes(whole[: start + 3] + b"\2" + whole[start + 4 :])
    table.write_text(table.read_text().replace("t3.png", "t3.tif"))
    report = run(table, tmp_path / "store")
    assert [(s.file, str(s.skipped)[:8]) for s in report.skipped] == [
        ("t1.png", "I;16 pix"),
        ("t3.tif", "not a re"),
    ]


def test_what_changed_in_the_middle_of_a_large_image_is_seen(tmp_path: Path) -> None:
    """Uncompressed, as most programs write labels: both ends stay what they were."""
    labels_HW = np.zeros((1024, 1024), dtype=np.int32)
    Image.fromarray(np.full((1024, 1024, 3), 120, np.uint8)).save(tmp_path / "t.png")
    row = "file,patient,caption,nuclei\nt.png,p,glands 0,n.tif\n"
    (tmp_path / "tiles.csv").write_text(row)
    seen = []
    for top in (400, 500):
        labels_HW[:] = 0
        labels_HW[top : top + 100, 300:400] = 1
        Image.fromarray(labels_HW).save(tmp_path / "n.tif")
        run(tmp_path / "tiles.csv", tmp_path / "store")
        seen.append(TileStore.open(tmp_path / "store").read_conditions([0], "nuclei")[0, 0])
    assert np.flatnonzero(seen[0].any(axis=1)).max() < np.flatnonzero(seen[1].any(axis=1)).max()


def test_two_large_tiles_that_begin_and_end_alike_are_two(tmp_path: Path) -> None:
    """Cores of a microarray on white, uncompressed, of two patients and in two tables."""
    for number in range(2):
        pixels = np.full((1024, 1024, 3), 255, dtype=np.uint8)
        pixels[400:600, 400:600] = (150 + number, 60, 120)
        Image.fromarray(pixels).save(tmp_path / f"t{number}.tif")
        table = tmp_path / f"{number}.csv"
        table.write_text(f"file,patient,caption\nt{number}.tif,p{number},glands {number}\n")
        run(table, tmp_path / "store")
    assert TileStore.open(tmp_path / "store").num_patients == 2
