"""Whole ingest runs: names stay out, damage is contained, interruptions cost nothing."""

import json
import resource
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crafts_client.ingest import cutting, shard_cut, survey
from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.ingest import ingest_slides, ingest_tiles
from crafts_client.ingest.report import IngestReport
from crafts_client.ingest.store_update import Source, content_key, remove_patient
from crafts_client.ingest.table import TableColumns, TableRow, read_table
from crafts_client.ingest.tiling import TilingOptions
from crafts_core.tiles import TileStore, TileStoreError
from crafts_simulations.slides import write_slide
from support.slide_files import write_dicom_slide
from support.slides import (
    REAL_DATA,
    damage_tile,
    tissue_image,
    write_table,
    write_tissue_slide,
)

pytestmark = pytest.mark.slow

OPTIONS = TilingOptions(tile_px=32, mpp=1.0)
SALT = Salt(bytes(range(32)))
needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared data beside repository")


def make_site(folder: Path, num_slides: int = 3) -> Path:
    """Slides of two patients, and their table."""
    rows = []
    for number in range(num_slides):
        name = f"DOE-{number}.svs"
        write_tissue_slide(folder / name, seed=number, label=f"DOE JANE {number}")
        rows.append(f"{name},DOE-{number % 2},COAD,large glands {number}")
    return write_table(folder / "slides.csv", "file,patient,cancer_type,caption", rows)


def run(
    table: Path, out: Path, options: TilingOptions = OPTIONS, processes: int = 0
) -> IngestReport:
    return ingest_slides(
        read_table(table), out, cohort="colon", salt=SALT, options=options, num_processes=processes
    )


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def store(site: Path) -> TileStore:
    run(site, site.parent / "store")
    return TileStore.open(site.parent / "store")


def test_tiles_show_tissue_of_the_right_patient(store: TileStore) -> None:
    assert store.num_patients == 2
    assert sorted(store.captions) == ["large glands 0", "large glands 1", "large glands 2"]
    both = [set(store.caption_ids(store.tile_rows_of(p)).tolist()) for p in range(2)]
    assert both[0].isdisjoint(both[1])
    assert store.read_images(range(store.num_tiles)).std(axis=(1, 2, 3)).min() > 5


def test_index_holds_exact_frames(store: TileStore) -> None:
    index = store.index
    assert set(index["level0_width"].to_pylist()) == {64.0}
    assert set(np.array(index["x"]) % 64) == {0}
    assert set(index["mpp"].to_pylist()) == {1.0}
    assert min(index["tissue_fraction"].to_pylist()) >= OPTIONS.min_tissue


def test_no_name_is_in_the_store(store: TileStore) -> None:
    for name, content in files_of(store.path).items():
        assert b"DOE" not in content, name
    for column in store.index.itercolumns():
        assert not any("DOE" in str(value) or ".svs" in str(value) for value in column.to_pylist())


def test_store_made_twice_is_the_same_to_the_byte(
    site: Path, store: TileStore, tmp_path: Path
) -> None:
    run(site, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(store.path)


def test_store_does_not_depend_on_the_number_of_processes(
    site: Path, store: TileStore, tmp_path: Path
) -> None:
    run(site, tmp_path / "two", processes=2)
    assert files_of(tmp_path / "two") == files_of(store.path)


def test_store_does_not_depend_on_the_order_of_the_table(
    site: Path, store: TileStore, tmp_path: Path
) -> None:
    rows = read_table(site)[::-1]
    ingest_slides(rows, tmp_path / "s", cohort="colon", salt=SALT, options=OPTIONS, num_processes=0)
    assert files_of(tmp_path / "s") == files_of(store.path)


def test_another_salt_gives_other_ids(site: Path, store: TileStore, tmp_path: Path) -> None:
    ingest_slides(
        read_table(site), tmp_path / "s", cohort="colon", salt=Salt(bytes(32)), options=OPTIONS,
        num_processes=0,
    )  # fmt: skip
    other = TileStore.open(tmp_path / "s")
    for column in ("patient", "case", "slide", "tile_id"):
        ids = set(store.index[column].to_pylist())
        assert ids.isdisjoint(other.index[column].to_pylist())


def test_interrupted_run_goes_on_with_the_tiles_that_are_left(
    site: Path, store: TileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cut, "_COMMIT_EVERY_S", 0.0)
    cut_place, num_cut = cutting._cut_place, Counter[str]()

    def counted(*arguments: Any) -> None:
        num_cut["places"] += 1
        cut_place(*arguments)
        if num_cut["places"] in (5, 19):
            raise KeyboardInterrupt

    monkeypatch.setattr(cutting, "_cut_place", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(site, tmp_path / "s")
        with pytest.raises(TileStoreError, match="unfinished"):
            TileStore.open(tmp_path / "s")
    report = run(site, tmp_path / "s")
    assert num_cut["places"] == report.num_tiles + report.rejected.get("blurred", 0)
    assert files_of(tmp_path / "s") == files_of(store.path)


def test_what_was_begun_with_other_options_is_not_taken(site: Path, tmp_path: Path) -> None:
    rows = read_table(site)

    def stop(step: str, done: int, total: int) -> None:
        if step == "cutting tiles":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_slides(
            rows, tmp_path / "s", cohort="c", salt=SALT, options=TilingOptions(tile_px=64, mpp=1.0),
            num_processes=0, progress=stop,
        )  # fmt: skip
    run(site, tmp_path / "s")
    images = TileStore.open(tmp_path / "s").read_images([0])
    assert images.shape[1:3] == (32, 32)
    assert len(list((tmp_path / "s" / "shards").iterdir())) == 3


def test_same_table_again_reads_nothing(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(site, tmp_path / "s")
    before = files_of(tmp_path / "s")
    monkeypatch.setattr(survey, "Slide", None)
    again = run(site, tmp_path / "s")
    assert files_of(tmp_path / "s") == before
    assert (again.num_tiles, again.already) == (report.num_tiles, 3)


def test_new_slides_are_added_and_only_they_are_cut(
    site: Path, store: TileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First one slide, then all; or one after the other: the same store."""
    rows = read_table(site)
    arguments = {"cohort": "colon", "salt": SALT, "options": OPTIONS, "num_processes": 0}
    ingest_slides(rows[:1], tmp_path / "grown", **arguments)
    opened, real = [], survey.Slide.open.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        survey.Slide,
        "open",
        classmethod(lambda cls, path, mpp=None: (opened.append(path), real(cls, path, mpp=mpp))[1]),
    )
    assert ingest_slides(rows, tmp_path / "grown", **arguments).already == 1
    assert {path.name for path in opened} == {"DOE-1.svs", "DOE-2.svs"}
    for row in rows:
        ingest_slides([row], tmp_path / "one by one", **arguments)
    for name in ("grown", "one by one"):
        assert files_of(tmp_path / name) == files_of(store.path)


def test_corrected_caption_reaches_the_store_without_cutting(
    site: Path, store: TileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(site, tmp_path / "s")
    monkeypatch.setattr(survey, "Slide", None)
    rows = [replace(row, caption="corrected") for row in read_table(site)]
    ingest_slides(rows, tmp_path / "s", cohort="colon", salt=SALT, options=OPTIONS, num_processes=0)
    assert TileStore.open(tmp_path / "s").captions == ("corrected",)


def test_changed_slide_is_cut_again_and_its_old_tiles_go(site: Path, tmp_path: Path) -> None:
    table = make_site(tmp_path / "site")
    run(table, tmp_path / "s")
    old = set(TileStore.open(tmp_path / "s").shards)
    write_tissue_slide(tmp_path / "site" / "DOE-1.svs", seed=9)
    report = run(table, tmp_path / "s")
    assert report.already == 2
    store = TileStore.open(tmp_path / "s")
    store.verify()
    assert len(old & set(store.shards)) == 2
    assert len(list((tmp_path / "s" / "shards").iterdir())) == 3


def test_slide_that_broke_since_keeps_the_tiles_cut_before(tmp_path: Path) -> None:
    table = make_site(tmp_path / "site")
    before = run(table, tmp_path / "s").num_tiles
    (tmp_path / "site" / "DOE-1.svs").write_bytes(b"not a slide")
    assert [s.file for s in run(table, tmp_path / "s").skipped] == ["DOE-1.svs"]
    assert TileStore.open(tmp_path / "s").num_tiles == before


def test_change_beside_a_mirax_file_is_a_change_of_the_slide(tmp_path: Path) -> None:
    """The .mrxs file is the same for many slides; the pixels lie in the folder of its name."""
    (tmp_path / "a.svs").write_bytes(b"x")
    for name in ("a", "b"):
        (tmp_path / f"{name}.mrxs").write_bytes(b"the same")
        (tmp_path / name).mkdir()
        (tmp_path / name / "Data0000.dat").write_bytes(name.encode())
    contents = [content_key(tmp_path / name, SALT) for name in ("a.mrxs", "b.mrxs", "a.svs")]
    assert len(set(contents)) == 3
    row = TableRow(
        line=2, name="a.mrxs", path=tmp_path / "a.mrxs", patient="p", case="", label="",
        caption="x", mpp=None,
    )  # fmt: skip
    before = Source.of(row, SALT, "how")
    (tmp_path / "a" / "Data0000.dat").write_bytes(b"other pixels")
    after = Source.of(row, SALT, "how")
    assert before.key != after.key
    assert before.content != after.content


def test_slide_of_another_patient_moves_with_the_table(tmp_path: Path) -> None:
    """A corrected table must not leave the tiles with the wrong patient as well."""
    table = make_site(tmp_path / "site")
    before = run(table, tmp_path / "s").num_tiles
    table.write_text(table.read_text().replace("DOE-1.svs,DOE-1", "DOE-1.svs,DOE-0"))
    report = run(table, tmp_path / "s")
    assert (report.already, report.num_tiles) == (2, before)
    store = TileStore.open(tmp_path / "s")
    store.verify()
    assert store.patients == (SALT.patient_id("DOE-0"),)
    assert store.num_tiles == before


def test_renamed_slide_is_there_once(tmp_path: Path) -> None:
    table = make_site(tmp_path / "site")
    before = run(table, tmp_path / "s").num_tiles
    (tmp_path / "site" / "DOE-1.svs").rename(tmp_path / "site" / "new.svs")
    table.write_text(table.read_text().replace("DOE-1.svs", "new.svs"))
    run(table, tmp_path / "s")
    assert TileStore.open(tmp_path / "s").num_tiles == before


def test_copy_of_a_slide_under_another_name_is_refused(tmp_path: Path) -> None:
    table = make_site(tmp_path / "site")
    shutil.copy(tmp_path / "site" / "DOE-0.svs", tmp_path / "site" / "copy.svs")
    table.write_text(table.read_text() + "copy.svs,DOE-9,COAD,x\n")
    with pytest.raises(IngestError, match=r"line 5: copy.svs is the same slide as DOE-0.svs on"):
        run(table, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_slide_that_shows_nothing_any_more_takes_its_tiles_along(tmp_path: Path) -> None:
    table = make_site(tmp_path / "site")
    run(table, tmp_path / "s")
    glass = np.full((512, 512, 3), 245, dtype=np.uint8)
    write_slide(tmp_path / "site" / "DOE-1.svs", glass, mpp=0.5, label="x")
    run(table, tmp_path / "s")
    assert SALT.patient_id("DOE-1") not in TileStore.open(tmp_path / "s").patients


def test_store_whose_removal_was_interrupted_is_removed(tmp_path: Path) -> None:
    run(make_site(tmp_path / "site", 1), tmp_path / "s")
    (tmp_path / "s" / "store.json").unlink()
    assert remove_patient(tmp_path / "s", SALT.patient_id("DOE-0")) == 0
    assert not (tmp_path / "s").exists()


def test_torn_survey_is_made_again(
    site: Path, store: TileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: str, done: int, total: int) -> None:
        if step == "cutting tiles":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_slides(
            read_table(site), tmp_path / "s", cohort="colon", salt=SALT, options=OPTIONS,
            num_processes=0, progress=stop,
        )  # fmt: skip
    for survey_file in (tmp_path / "s" / "work").glob("*.npz"):
        survey_file.write_bytes(b"")
    run(site, tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(store.path)


def test_forgotten_patient_leaves_no_byte(site: Path, store: TileStore, tmp_path: Path) -> None:
    """The store is the one that was never given the patient's slides."""
    run(site, tmp_path / "s")
    gone = SALT.patient_id("DOE-1")
    assert remove_patient(tmp_path / "s", gone) > 0
    ingest_slides(
        [row for row in read_table(site) if row.patient != "DOE-1"], tmp_path / "without",
        cohort="colon", salt=SALT, options=OPTIONS, num_processes=0,
    )  # fmt: skip
    assert files_of(tmp_path / "s") == files_of(tmp_path / "without")
    TileStore.open(tmp_path / "s").verify()


def test_last_patient_takes_the_store_along(tmp_path: Path) -> None:
    run(make_site(tmp_path / "site", 1), tmp_path / "s")
    remove_patient(tmp_path / "s", SALT.patient_id("DOE-0"))
    assert not (tmp_path / "s").exists()


def test_withdrawn_patients_slides_are_not_opened(site: Path, tmp_path: Path) -> None:
    report = ingest_slides(
        read_table(site), tmp_path / "s", cohort="colon", salt=SALT, options=OPTIONS,
        num_processes=0, withdrawn={SALT.patient_id("DOE-0")},
    )  # fmt: skip
    assert [(s.patient, s.skipped) for s in report.skipped] == [
        ("DOE-0", "the patient withdrew; nothing is read")
    ] * 2
    assert TileStore.open(tmp_path / "s").patients == (SALT.patient_id("DOE-1"),)


def test_two_ingests_into_one_store_are_refused(site: Path, tmp_path: Path) -> None:
    def another(step: str, done: int, total: int) -> None:
        with pytest.raises(IngestError, match="another ingest is at work"):
            run(site, tmp_path / "s")

    ingest_slides(
        read_table(site), tmp_path / "s", cohort="colon", salt=SALT, options=OPTIONS,
        num_processes=0, progress=another,
    )  # fmt: skip


def test_unreadable_slide_is_named_skipped_and_counted(tmp_path: Path) -> None:
    table = make_site(tmp_path / "site")
    (tmp_path / "site" / "DOE-1.svs").write_bytes(b"not a slide")
    report = run(table, tmp_path / "s")
    assert [(s.file, s.line) for s in report.skipped] == [("DOE-1.svs", 3)]
    assert "OpenSlide" in str(report.skipped[0].skipped)
    assert TileStore.open(tmp_path / "s").num_patients == 1
    assert report.tiles_per_patient == {"DOE-0": report.num_tiles, "DOE-1": 0}


def test_one_damaged_place_costs_only_its_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_site(tmp_path / "site", 1)
    whole = run(table, tmp_path / "whole").num_tiles
    damage_tile(tmp_path / "site" / "DOE-0.svs", 0)
    monkeypatch.setattr(cutting, "MAX_UNREADABLE", 0.5)
    report = run(table, tmp_path / "s")
    assert 0 < report.rejected["unreadable"] < whole
    assert report.num_tiles == whole - report.rejected["unreadable"]


def test_damaged_coarse_level_costs_nothing_and_is_said(tmp_path: Path) -> None:
    table = make_site(tmp_path / "site", 1)
    whole = run(table, tmp_path / "whole")
    damage_tile(tmp_path / "site" / "DOE-0.svs", 0, page=2)
    report = run(table, tmp_path / "s")
    assert (whole.sources[0].damaged_levels, report.sources[0].damaged_levels) == (0, 1)
    assert report.num_tiles == pytest.approx(whole.num_tiles, rel=0.1)


def test_slide_with_too_much_damage_is_skipped(tmp_path: Path) -> None:
    table = make_site(tmp_path / "site", 2)
    for number in range(3):
        damage_tile(tmp_path / "site" / "DOE-0.svs", number)
    report = run(table, tmp_path / "s")
    assert [s.file for s in report.skipped] == ["DOE-0.svs"]
    assert "damaged" in str(report.skipped[0].skipped)


def test_slides_without_scale_are_all_named_before_work_starts(tmp_path: Path) -> None:
    table = make_site(tmp_path / "site")
    for number in (0, 2):
        write_tissue_slide(tmp_path / "site" / f"DOE-{number}.svs", seed=number, mpp=352.8)
    with pytest.raises(IngestError) as caught:
        run(table, tmp_path / "s")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 2", "line 4"]
    assert not list(tmp_path.glob(".s*"))


def test_run_that_leaves_nothing_says_why(tmp_path: Path) -> None:
    table = make_site(tmp_path / "site", 2)
    for number in range(2):
        (tmp_path / "site" / f"DOE-{number}.svs").write_bytes(bytes(number))
    with pytest.raises(IngestError, match="no tile is left") as caught:
        run(table, tmp_path / "s")
    assert len(caught.value.problems) == 3
    assert not (tmp_path / "s").exists()


def test_store_of_other_tiles_is_never_mixed(site: Path, tmp_path: Path) -> None:
    run(site, tmp_path / "s")
    with pytest.raises(IngestError, match=r"32 px at 1\.0 microns.*these are of colon, 16"):
        run(site, tmp_path / "s", TilingOptions(tile_px=16, mpp=1.0))


def test_limit_per_slide_is_kept_and_stable(site: Path, store: TileStore, tmp_path: Path) -> None:
    limited = TilingOptions(tile_px=32, mpp=1.0, max_tiles_per_slide=4)
    report = run(site, tmp_path / "few", limited)
    few = TileStore.open(tmp_path / "few")
    assert [source.num_tiles for source in report.sources] == [4, 4, 4]
    assert report.rejected["not_drawn"] > 0
    assert set(few.index["tile_id"].to_pylist()) < set(store.index["tile_id"].to_pylist())


def test_tiles_under_pen_and_blurred_tiles_are_rejected(tmp_path: Path) -> None:
    image = tissue_image()
    image[96:160, 96:416] = (60, 170, 140)
    image[320:384, 96:416] = (200, 150, 190)
    write_slide(tmp_path / "a.svs", image, mpp=0.5, label="x")
    table = write_table(tmp_path / "t.csv", "file,patient,label", ["a.svs,p,COAD"])
    report = run(table, tmp_path / "s")
    assert report.rejected["pen"] >= 5
    assert report.rejected["blurred"] >= 3
    rows = np.array(TileStore.open(tmp_path / "s").index["y"])
    assert rows.min() >= 128


def test_full_disk_is_one_clear_line_and_loses_nothing(
    site: Path, store: TileStore, tmp_path: Path
) -> None:
    with files_no_larger_than(30_000), pytest.raises(IngestError, match="run the same command"):
        run(site, tmp_path / "s")
    assert not (tmp_path / "s" / "store.json").exists()
    run(site, tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(store.path)


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """Let the kernel refuse larger files, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_report_is_for_the_site_only(site: Path, tmp_path: Path) -> None:
    report = run(site, tmp_path / "s")
    report.write(tmp_path / "report.json")
    report.write(tmp_path / "report.json")
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o600
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["num_tiles"] == report.num_tiles
    assert values["sources"][0]["file"] == "DOE-0.svs"


def make_tiles(folder: Path) -> Path:
    folder.mkdir()
    rows = []
    for number in range(5):
        Image.fromarray(tissue_image(96, seed=number, margin=0)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,lung_aca,g{number // 2}")
    (folder / "5.png").write_bytes((folder / "0.png").read_bytes()[:200])
    rows.append("5.png,lung_aca,g9")
    return write_table(folder / "labels.csv", "file,class,source_tile_group", rows)


def test_ready_tiles_are_resampled_whole(tmp_path: Path) -> None:
    table = make_tiles(tmp_path / "tiles")
    ingest_tiles(
        read_table(table), tmp_path / "s", cohort="x", salt=SALT, tile_px=32, num_processes=0
    )
    store = TileStore.open(tmp_path / "s")
    assert (store.num_patients, store.num_tiles, store.mpp) == (3, 5, None)
    assert store.captions == ("H&E, lung adenocarcinoma, lung",)
    means = store.read_images(range(5)).mean(axis=(1, 2, 3))
    truth = [tissue_image(96, seed=number, margin=0).mean() for number in range(5)]
    np.testing.assert_allclose(sorted(means), sorted(truth), atol=1.5)


def test_unreadable_ready_tile_is_named_skipped_and_counted(tmp_path: Path) -> None:
    table = make_tiles(tmp_path / "tiles")
    report = ingest_tiles(
        read_table(table), tmp_path / "s", cohort="x", salt=SALT, tile_px=32, num_processes=0
    )
    assert [(s.file, s.patient) for s in report.skipped] == [("5.png", "g9")]
    assert report.num_tiles == 5


def test_image_of_two_patients_is_refused_and_of_one_it_stays_twice(tmp_path: Path) -> None:
    table = make_tiles(tmp_path / "tiles")
    folder = tmp_path / "tiles"
    run_tiles = partial(
        ingest_tiles, out=tmp_path / "s", cohort="x", salt=SALT, tile_px=32, num_processes=0
    )
    run_tiles(read_table(table))
    shutil.copy(folder / "0.png", folder / "again.png")
    table.write_text(table.read_text() + "again.png,lung_aca,g0\n")
    for already in (5, 6):
        report = run_tiles(read_table(table))
        assert (report.already, report.num_tiles) == (already, 6)
        assert TileStore.open(tmp_path / "s").num_tiles == 6
    shutil.copy(folder / "0.png", folder / "other.png")
    table.write_text(table.read_text() + "other.png,lung_aca,g7\n")
    with pytest.raises(IngestError, match=r"line 9: other.png is the same image as 0.png on line"):
        run_tiles(read_table(table))
    assert not (tmp_path / "s" / "work").exists()


def test_image_that_was_there_twice_leaves_its_former_patient_whole(tmp_path: Path) -> None:
    """The table was wrong about the patient: not one copy stays under the name that it had."""
    table, folder = make_tiles(tmp_path / "tiles"), tmp_path / "tiles"
    run_tiles = partial(
        ingest_tiles, out=tmp_path / "s", cohort="x", salt=SALT, tile_px=32, num_processes=0
    )
    shutil.copy(folder / "0.png", folder / "again.png")
    rows = "0.png,lung_aca,{0}\nagain.png,lung_aca,{0}\n"
    others = "2.png,lung_aca,g1\n"
    table.write_text("file,class,source_tile_group\n" + rows.format("g0") + others)
    run_tiles(read_table(table))
    assert TileStore.open(tmp_path / "s").num_patients == 2
    table.write_text("file,class,source_tile_group\n" + rows.format("g8") + others)
    run_tiles(read_table(table))
    store = TileStore.open(tmp_path / "s")
    held = {name: store.tile_rows_of(place).size for place, name in enumerate(store.patients)}
    assert held == {SALT.patient_id("g8"): 2, SALT.patient_id("g1"): 1}


def test_files_of_one_dicom_slide_are_no_two_patients(tmp_path: Path) -> None:
    """Each file of a series stands for all of it."""
    folder = write_dicom_slide(tmp_path / "pacs", tissue_image())
    names = sorted(path.name for path in folder.iterdir())
    write_dicom_slide(tmp_path / "pacs", tissue_image(seed=2), series=2)
    rows = [f"{name},p{number},COAD" for number, name in enumerate(names)]
    table = write_table(folder / "t.csv", "file,patient,label", rows)
    with pytest.raises(IngestError, match=f"{names[1]} is the same slide as {names[0]} on line 2"):
        run(table, tmp_path / "s")
    other = next(path.name for path in folder.iterdir() if path.name.startswith("series2"))
    table = write_table(folder / "t.csv", "file,patient,label", [rows[0], f"{other},p1,COAD"])
    run(table, tmp_path / "s")
    assert TileStore.open(tmp_path / "s").num_patients == 2


def test_ready_tile_that_is_not_square_is_cropped_not_squeezed(tmp_path: Path) -> None:
    wide = np.concatenate(
        [np.zeros((64, 32, 3)), np.full((64, 64, 3), 200), np.zeros((64, 32, 3))], 1
    )
    Image.fromarray(wide.astype(np.uint8)).save(tmp_path / "wide.png")
    table = write_table(tmp_path / "t.csv", "file,patient,label", ["wide.png,p,COAD"])
    ingest_tiles(
        read_table(table), tmp_path / "s", cohort="x", salt=SALT, tile_px=32, num_processes=0
    )
    assert TileStore.open(tmp_path / "s").read_images([0]).min() > 150


def test_ready_tile_of_known_resolution_gives_its_centre_at_the_stores(tmp_path: Path) -> None:
    """224 px at 0.5 mpp hold 112 um; a tile of 32 px at 1 mpp is the middle 64 px."""
    picture = np.zeros((224, 224, 3), np.uint8)
    picture[80:144, 80:144] = 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture[:40, :40]).save(tmp_path / "small.png")
    rows = ["a.png,p,COAD", "small.png,p,COAD"]
    table = write_table(tmp_path / "t.csv", "file,patient,label", rows)
    report = ingest_tiles(
        read_table(table),
        tmp_path / "s",
        cohort="x",
        salt=SALT,
        tile_px=32,
        mpp=1,
        source_mpp=0.5,
        num_processes=0,
    )
    store = TileStore.open(tmp_path / "s")
    assert store.read_images([0]).min() > 170
    assert (store.index["x"][0].as_py(), store.index["level0_width"][0].as_py()) == (80, 64)
    [refused] = report.skipped
    assert refused.file == "small.png"
    assert "needs 64" in str(refused.skipped)


def test_image_far_too_large_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_tiles(tmp_path / "tiles")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(IngestError, match="far too large"):
        ingest_tiles(
            read_table(table), tmp_path / "s", cohort="x", salt=SALT, tile_px=32, num_processes=0
        )
    assert not (tmp_path / "s").exists()


@needs_data
def test_real_slides_become_a_store(tmp_path: Path) -> None:
    rows = [
        "wsi/cmu-1-small-region.svs,p1,normal soft tissue,",
        "wsi/tcga-cr-7395-01a-01-ts1.svs,p2,HNSC,0.5",
        "wsi/broken.svs,p3,HNSC,",
    ]
    table = write_table(tmp_path / "t.csv", "file,patient,label,mpp", rows)
    report = ingest_slides(
        read_table(table, root=REAL_DATA), tmp_path / "s", cohort="x", salt=SALT,
        options=TilingOptions(tile_px=64, mpp=1.0, max_tiles_per_slide=30), num_processes=0,
    )  # fmt: skip
    assert [source.num_tiles for source in report.sources] == [30, 30, 0]
    assert [s.file for s in report.skipped] == ["wsi/broken.svs"]
    frames = TileStore.open(tmp_path / "s").index["level0_width"].to_pylist()
    assert {round(width, 3) for width in frames} == {128.257, 128.0}


@needs_data
def test_real_ready_tiles_become_a_store(tmp_path: Path) -> None:
    rows = read_table(REAL_DATA / "lc25000" / "labels.tsv")
    assert (len(rows), len({row.patient for row in rows})) == (1814, 747)
    ingest_tiles(rows[::40], tmp_path / "s", cohort="x", salt=SALT, tile_px=64)
    store = TileStore.open(tmp_path / "s")
    assert store.num_tiles == len(rows[::40])
    assert store.num_patients == len({row.patient for row in rows[::40]})


@needs_data
def test_table_with_other_column_names_and_root(tmp_path: Path) -> None:
    columns = TableColumns(file=("image",), patient=("case",))
    rows = read_table(
        REAL_DATA / "atlas_tiles" / "atlas_tiles.tsv", root=REAL_DATA, columns=columns
    )
    assert len({row.patient for row in rows}) == 15
    ingest_tiles(rows[::60], tmp_path / "s", cohort="x", salt=SALT, tile_px=32, num_processes=0)
    assert TileStore.open(tmp_path / "s").num_tiles == len(rows[::60])
