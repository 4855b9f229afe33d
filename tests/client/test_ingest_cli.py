"""Ingest as its operator knows it: a folder and a table in, a store and a page out."""

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from crafts_client import preparation
from crafts_client.cli import app
from crafts_client.home import SiteHome
from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.ingest import ingest_slides, ingest_tiles
from crafts_client.ingest.report import IngestReport
from crafts_client.register import PatientRegister
from crafts_client.site import Site
from crafts_core.foundation import Foundation
from crafts_core.generator import Generator
from crafts_core.tiles import TileStore
from crafts_simulations.slides import write_slide
from support.sites import make_site_home
from support.slide_files import write_dicom_slide, write_tiled_tiff
from support.slides import tissue_image, write_table, write_tissue_slide

pytestmark = pytest.mark.slow

NAME = "ZEBRA"
"""Stands wherever a hospital may have written a patient's name."""


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes of its own: they take seconds to start, and have a test of their own."""
    for name, function in (("ingest_slides", ingest_slides), ("ingest_tiles", ingest_tiles)):
        monkeypatch.setattr(
            preparation, name, lambda *a, _f=function, **k: _f(*a, **(k | {"num_processes": 0}))
        )


@pytest.fixture
def home(tmp_path: Path, foundation: Foundation) -> SiteHome:
    """A home without a store."""
    home = make_site_home(tmp_path / "site", foundation, "key")
    home.tile_store_path.rename(tmp_path / "elsewhere")
    return home


def write_hospital(folder: Path) -> Path:
    """Slides of every kind that carry a name in every place, and their table."""
    folder.mkdir()
    image = tissue_image()
    write_tissue_slide(folder / f"{NAME}-1.svs", seed=1, label=NAME)
    write_tiled_tiff(
        folder / f"{NAME}-2.tif", image, mpp=1.0, tile_px=32, description=f"Patient = {NAME}",
        extratags=[(315, "s", 0, NAME, True)],
    )  # fmt: skip
    fields = {"PatientName": f"{NAME}^A", "PatientID": NAME, "AccessionNumber": NAME}
    write_dicom_slide(folder / f"{NAME}-3", image, fields=fields)
    exif = Image.Exif()
    exif[0x013B] = NAME
    Image.fromarray(image).save(folder / f"{NAME}-4.jpg", exif=exif, comment=NAME.encode())
    rows = [
        f"{NAME}-1.svs,{NAME} Anna,case {NAME},COAD,glands of Mrs. {NAME} seen 3.4.2021,",
        f"{NAME}-2.tif,{NAME} Bert,,COAD,,",
        f"{NAME}-3,{NAME} Carla,,normal colon,,",
        f"{NAME}-4.jpg,{NAME} Dora,,LUAD,,0.5",
    ]
    return write_table(folder / "slides.csv", "file,patient,case,label,caption,mpp", rows)


def everything_in(path: Path) -> dict[str, bytes]:
    """Every file's bytes and, where they are packed, what is in them."""
    found = {}
    for file in (f for f in path.rglob("*") if f.is_file()):
        content = file.read_bytes()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                content += b"".join(archive.read(name) for name in archive.namelist())
        found[str(file.relative_to(path))] = content
    return found


def test_no_planted_name_is_in_the_store_or_comes_to_a_log(
    home: SiteHome, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write_hospital(tmp_path / "hospital")
    caplog.set_level("DEBUG")
    done = run("ingest", table, "--home", home.path)
    assert done.exit_code == 0, done.output
    store = TileStore.open(home.tile_store_path)
    assert store.num_patients == 4
    columns = json.dumps(store.rows().to_pylist())
    words = NAME.encode(), NAME.lower().encode(), NAME.encode("utf-16-le")
    for name, content in everything_in(home.tile_store_path).items():
        assert not any(word in content for word in words), name
    assert NAME not in columns
    assert "4.2021" not in columns  # the year alone may stand in a pseudonym
    assert not any("2021" in caption for caption in store.captions)
    assert NAME not in caplog.text
    for name in ("site.toml", "patients.jsonl"):
        assert NAME.encode() not in (home.path / name).read_bytes()
    pictures = list(home.pictures_path.iterdir())
    assert len(pictures) == 8
    assert not any(NAME in path.name for path in pictures)
    assert not any(NAME.encode() in path.read_bytes() for path in pictures)


def test_the_page_says_what_was_found_and_left(home: SiteHome, tmp_path: Path) -> None:
    table = write_hospital(tmp_path / "hospital")
    (tmp_path / "hospital" / "torn.svs").write_bytes(b"II*\0")
    table.write_text(table.read_text() + "torn.svs,p9,,COAD,,\n")
    done = run("ingest", table, "--home", home.path)
    assert "skipped line 6: torn.svs:" in done.stdout
    page = (home.path / "ingest.html").read_text()
    report = json.loads(home.ingest_report_path.read_text())
    readers = {source["reader"] for source in report["sources"]}
    assert readers >= {"openslide", "wsidicom", "image"}
    copied = {source["file"]: source["copied"] for source in report["sources"]}
    assert copied[f"{NAME}-2.tif"] > 0
    assert copied[f"{NAME}-1.svs"] == 0
    assert any("label" in text for source in report["sources"] for text in source["identifiers"])
    assert "[date]" in page
    assert (home.path / "ingest.html").stat().st_mode & 0o77 == 0


def test_what_is_there_is_not_read_again_and_new_slides_join(
    home: SiteHome, tmp_path: Path, foundation: Foundation
) -> None:
    folder = tmp_path / "hospital"
    for number in range(3):
        write_tissue_slide(folder / f"{number}.svs", seed=number)
    rows = [f"{number}.svs,p{number},COAD" for number in range(3)]
    first = write_table(folder / "a.csv", "file,patient,label", rows[:2])
    assert json.loads(run("ingest", first, "--home", home.path, "--json").stdout)["patients"] == 2
    Site.open(home.path)
    table = write_table(folder / "a.csv", "file,patient,label", rows)
    told = json.loads(run("ingest", table, "--home", home.path, "--json").stdout)
    assert (told["already_in_the_store"], told["patients"]) == (2, 3)
    assert run("tiles", "check", "--home", home.path).exit_code == 0
    report = json.loads(home.ingest_report_path.read_text())
    assert all(source["scanner"] for source in report["sources"]), "also of those read before"
    Site.open(home.path)


def test_patient_of_another_cohort_is_refused_before_work(home: SiteHome, tmp_path: Path) -> None:
    table = write_hospital(tmp_path / "hospital")
    salt = Salt.load(home.salt_path)
    PatientRegister(home.register_path).enrol([salt.patient_id(f"{NAME} Bert")], "lung")
    done = run("ingest", table, "--home", home.path)
    assert done.exit_code == 1
    assert "belongs to cohort lung" in done.output
    assert not home.tile_store_path.exists()


def test_a_caption_that_the_tokenizer_cannot_read_ends_no_ingest(
    home: SiteHome, tmp_path: Path, monkeypatch
) -> None:
    """Whether a store came to be would say whether one patient has such a caption."""
    unread = Generator.unread

    def stumbles(generator: Generator, captions: Sequence[str]) -> list[str]:
        if any("glands" in caption for caption in captions):
            raise ValueError("Unk token <unk> not found")
        return unread(generator, captions)

    monkeypatch.setattr(Generator, "unread", stumbles)
    done = run("ingest", write_hospital(tmp_path / "slides"), "--home", home.path)
    assert done.exit_code == 0, done.output
    assert TileStore.open(home.tile_store_path).num_tiles > 0


def test_everything_wrong_is_told_at_once(home: SiteHome, tmp_path: Path) -> None:
    """Table, register, scale, copies and damage: one list, so that one mending is enough."""
    folder = tmp_path / "hospital"
    for number in range(3):
        write_tissue_slide(folder / f"{number}.svs", seed=number)
    write_tissue_slide(folder / "scale.svs", seed=5, mpp=352.8)
    (folder / "copy.svs").write_bytes((folder / "0.svs").read_bytes())
    for name in ("torn.svs", "torn-with-scale.svs"):
        (folder / name).write_bytes(b"II*\0" + name.encode())
    rows = [
        "0.svs,anna,COAD,", "1.svs,,COAD,", "2.svs,bert,XXAD,", "scale.svs,carla,COAD,",
        "copy.svs,dora,COAD,", "torn.svs,emil,COAD,", "torn-with-scale.svs,emil,COAD,0.5",
        "gone.svs,emil,COAD,",
    ]  # fmt: skip
    table = write_table(folder / "t.csv", "file,patient,label,mpp", rows)
    salt = Salt.load(home.salt_path)
    PatientRegister(home.register_path).enrol([salt.patient_id("bert")], "lung")

    done = run("ingest", table, "--home", home.path)

    assert done.exit_code == 1
    told = done.output.split("crafts-client: ")[1].splitlines()
    assert [line.partition(":")[0] for line in told] == [
        "line 3", "line 4", "line 4", "line 5", "line 6", "line 7", "line 8", "line 9",
    ]  # fmt: skip
    for fault in (
        "line 3: no patient", "line 4: unknown cancer type 'XXAD'",
        "line 4: patient bert belongs to cohort lung", "line 5: scale.svs: the file's 352.8",
        "line 6: copy.svs is the same slide as 0.svs on line 2", "line 7: torn.svs would be skip",
        "line 8: torn-with-scale.svs would be skipped", "line 9: file gone.svs does not exist",
    ):  # fmt: skip
        assert fault in done.output, fault
    assert not home.tile_store_path.exists()


def write_slides(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        write_tissue_slide(folder / name, seed=number)


def page_of(home: SiteHome) -> str:
    return (home.path / "ingest.html").read_text()


def test_the_page_shows_the_store_and_not_only_the_newest_table(
    home: SiteHome, tmp_path: Path
) -> None:
    folder = tmp_path / "hospital"
    write_slides(folder, "a.svs", "b.svs", "c.svs", "d.svs")
    (folder / "torn.svs").write_bytes(b"II*\0")
    old = write_table(folder / "old.csv", "file,patient,label", ["a.svs,p1,COAD", "b.svs,p2,COAD"])
    new = write_table(
        folder / "new.csv", "file,patient,label", ["c.svs,p3,COAD", "torn.svs,p4,COAD"]
    )
    for table in (old, new):
        assert run("ingest", table, "--home", home.path).exit_code == 0
    page = page_of(home)
    assert all(f"<h3>{name}</h3>" in page for name in ("a.svs", "b.svs", "c.svs"))
    assert page.index(str(new)) < page.index(str(old))
    assert "torn.svs" in page
    store = TileStore.open(home.tile_store_path)
    report = IngestReport.model_validate_json(home.ingest_report_path.read_bytes())
    assert (report.num_tiles, len(report.sources)) == (store.num_tiles, 4)

    write_table(new, "file,patient,label", ["c.svs,p5,COAD", "d.svs,p6,COAD"])
    assert run("ingest", new, "--home", home.path).exit_code == 0
    report = IngestReport.model_validate_json(home.ingest_report_path.read_bytes())
    assert [(s.file, s.patient) for s in report.sources] == [
        ("c.svs", "p5"), ("d.svs", "p6"), ("a.svs", "p1"), ("b.svs", "p2"),
    ]  # fmt: skip
    assert report.num_tiles == TileStore.open(home.tile_store_path).num_tiles


def test_a_refused_table_is_told_on_the_page_to_the_last_problem(
    home: SiteHome, tmp_path: Path
) -> None:
    folder = tmp_path / "hospital"
    write_slides(folder, "a.svs")
    good = write_table(folder / "good.csv", "file,patient,label", ["a.svs,p1,COAD"])
    run("ingest", good, "--home", home.path)
    rows = [f"gone{number}.svs,p,COAD" for number in range(60)]
    done = run(
        "ingest", write_table(folder / "bad.csv", "file,patient,label", rows), "--home", home.path
    )
    assert done.stderr.splitlines()[-2:] == [
        "crafts-client: lines 2, 3, 4, 5 and 56 more: file gone0.svs does not exist below "
        f"{folder}; the others likewise",
        f"60 problems in all; {home.path / 'ingest.html'} has them all",
    ]
    page = page_of(home)
    assert page.index("the others likewise") < page.index("All 60, line by line")
    assert "refused: 60 problems" in page
    assert all(f"file gone{number}.svs does not exist" in page for number in range(60))
    assert "<h3>a.svs</h3>" in page
    run("tiles", "forget", "p1", "--home", home.path, "--yes")
    assert "gone7.svs" not in page_of(home), "what a problem names may be anybody's"


def test_there_is_a_page_when_nothing_can_be_used(home: SiteHome, tmp_path: Path) -> None:
    folder = tmp_path / "hospital"
    folder.mkdir()
    (folder / "torn.svs").write_bytes(b"II*\0")
    glass = np.full((512, 512, 3), 245, dtype=np.uint8)
    write_slide(folder / "glass.svs", glass, mpp=0.5, label="x")
    rows = ["torn.svs,p1,COAD", "glass.svs,p2,COAD"]
    done = run(
        "ingest", write_table(folder / "t.csv", "file,patient,label", rows), "--home", home.path
    )
    assert done.exit_code == 1
    assert "no tile is left to train on" in done.output
    page = page_of(home)
    assert "its TIFF header is damaged" in page
    assert "no place on it has enough clean tissue" in page
    assert page.count("<img") == 2, "what the glass looks like"
    assert not home.tile_store_path.exists()


def test_forgotten_patient_leaves_only_a_pseudonym(home: SiteHome, tmp_path: Path) -> None:
    """Tiles, latents, captions, pictures and the report's lines go; the ledger is not touched."""
    folder = tmp_path / "hospital"
    for number in range(3):
        write_tissue_slide(folder / f"{number}.svs", seed=number)
    rows = [f"{number}.svs,Jones {number},COAD,large glands {number}" for number in range(3)]
    table = write_table(folder / "a.csv", "file,patient,label,caption", rows)
    run("ingest", table, "--home", home.path)
    pseudonym = Salt.load(home.salt_path).patient_id("Jones 1")
    before = everything_in(home.path)
    assert any(b"Jones 1" in content for content in before.values())
    store = TileStore.open(home.tile_store_path)
    row = store.tile_rows_of(store.patients.index(pseudonym))[0]
    [latents] = [c for name, c in before.items() if name.endswith("latents.f16")]
    size = len(latents) // store.num_tiles
    theirs = latents[row * size : (row + 1) * size]

    assert run("tiles", "forget", "Jones 1", "--home", home.path).exit_code == 1, "it asks first"
    done = run("tiles", "forget", "Jones 1", "--home", home.path, "--yes")

    assert done.exit_code == 0, done.output
    left = everything_in(home.path)
    mentions = [name for name, content in left.items() if pseudonym.encode() in content]
    assert mentions == ["patients.jsonl"]
    for trace in (b"Jones 1", b"large glands 1", theirs):
        assert not [name for name, content in left.items() if trace in content]
    assert len(list(home.pictures_path.iterdir())) == 4
    Site.open(home.path)
    assert run("tiles", "check", "--home", home.path).exit_code == 0
    again = run("ingest", table, "--home", home.path)
    assert "the patient withdrew; nothing is read" in again.stdout
    assert pseudonym not in TileStore.open(home.tile_store_path).patients


def test_patient_without_tiles_is_forgotten_too(home: SiteHome, tmp_path: Path) -> None:
    """Also pictures that only an older report told of."""
    folder = tmp_path / "hospital"
    write_tissue_slide(folder / "a.svs", seed=1)
    write_tissue_slide(folder / "b.svs", seed=2)
    glass = np.full((512, 512, 3), 245, dtype=np.uint8)
    write_slide(folder / "c.svs", glass, mpp=0.5, label="x")
    rows = ["a.svs,Jones A,COAD", "b.svs,Jones B,COAD", "c.svs,Jones C,COAD"]
    run("ingest", write_table(folder / "t.csv", "file,patient,label", rows), "--home", home.path)
    run(
        "ingest", write_table(folder / "t.csv", "file,patient,label", rows[:1]), "--home", home.path
    )
    (home.pictures_path / ".b.jpg.writing").write_bytes(b"Jones B")  # killed there
    for name in ("Jones C", "jones  b"):
        done = run("tiles", "forget", name, "--home", home.path, "--yes")
        assert done.exit_code == 0, done.output
    assert len(list(home.pictures_path.iterdir())) == 2
    left = everything_in(home.path)
    assert not [n for n, c in left.items() if b"Jones B" in c or b"Jones C" in c]
    assert b"Jones A" in left["ingest.html"]
    home.ingest_report_path.write_text("torn")
    assert run("tiles", "forget", "Jones A", "--home", home.path, "--yes").exit_code == 0
    assert not [n for n, c in everything_in(home.path).items() if b"Jones A" in c]


def test_nobody_unknown_is_forgotten(home: SiteHome, tmp_path: Path) -> None:
    run("ingest", write_hospital(tmp_path / "hospital"), "--home", home.path)
    done = run("tiles", "forget", "Smith", "--home", home.path, "--yes")
    assert done.exit_code == 1
    assert "no such patient" in done.output


def write_image_table(folder: Path) -> Path:
    folder.mkdir()
    rows = []
    for number in range(5):
        Image.fromarray(tissue_image(96, seed=number, margin=0)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,p{number // 2},COAD")
    (folder / "bad.png").write_bytes(b"no image")
    return write_table(folder / "t.csv", "file,patient,label", [*rows, "bad.png,p0,COAD"])


@pytest.mark.parametrize(
    ("kind", "damage"),
    [("slides", "bit"), ("slides", "gone"), ("slides", "index"), ("tiles", "torn"),
     ("tiles", "latents")],
)  # fmt: skip
def test_a_repaired_store_is_one_that_was_never_damaged(
    home: SiteHome, tmp_path: Path, kind: str, damage: str
) -> None:
    folder, store = tmp_path / "hospital", home.tile_store_path
    if kind == "slides":
        write_slides(folder, "a.svs", "b.svs")
        rows = ["a.svs,p1,COAD", "b.svs,p2,LUAD"]
        words = ["ingest", write_table(folder / "t.csv", "file,patient,label", rows)]
    else:
        words = ["ingest", write_image_table(folder), "--ready-tiles"]
    run(*words, "--home", home.path)
    whole = everything_in(store)
    pattern = {"index": "index-*.parquet", "latents": "latents/*/latents.f16"}
    victim = sorted(store.glob(pattern.get(damage, "shards/*.tar")))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content[: 700 if damage == "torn" else None])
    if damage == "gone":
        victim.unlink()
    assert run("tiles", "check", "--home", home.path).exit_code == 1

    done = run("tiles", "check", "--repair", "--home", home.path)

    assert done.exit_code == 0, done.output
    assert "now run ingest again" in done.output
    if damage in ("bit", "torn", "gone"):
        assert f"damaged: shards/{victim.name}" in done.output
        assert TileStore.open(store).num_patients == {"slides": 1, "tiles": 2}[kind]
    again = run(*words, "--home", home.path)
    assert again.exit_code == 0, again.output
    assert everything_in(store) == whole
    assert "nothing is damaged" in run("tiles", "check", "--repair", "--home", home.path).output


def test_a_slide_is_dropped_by_its_content_and_the_patient_stays(
    home: SiteHome, tmp_path: Path
) -> None:
    folder = tmp_path / "hospital"
    write_slides(folder, "a.svs", "b.svs", "c.svs")
    rows = ["a.svs,p1,COAD", "b.svs,p1,COAD", "c.svs,p2,COAD"]
    table = write_table(folder / "t.csv", "file,patient,label", [rows[0], rows[2]])
    run("ingest", table, "--home", home.path)
    without = everything_in(home.tile_store_path)
    run("ingest", write_table(table, "file,patient,label", rows), "--home", home.path)
    moved = (folder / "b.svs").rename(tmp_path / "elsewhere.svs")

    asked = run("tiles", "drop", moved, "--home", home.path)
    assert (asked.exit_code, "Remove 32 tiles of " in asked.output) == (1, True)
    done = run("tiles", "drop", moved, "--home", home.path, "--yes")

    assert done.exit_code == 0, done.output
    assert "remove its line from your table" in done.output
    assert everything_in(home.tile_store_path) == without
    assert "b.svs" not in page_of(home)
    assert len(list(home.pictures_path.iterdir())) == 4
    Site.open(home.path)
    looked = run("tiles", "drop", moved, "--home", home.path).output
    assert ("no slide in the store" in looked, "Remove" in looked) == (True, False)
    assert run("tiles", "drop", "a.svs", "--home", home.path, "--yes").exit_code == 0
    assert TileStore.open(home.tile_store_path).num_patients == 1
    moved.rename(folder / "b.svs")
    assert run("ingest", table, "--home", home.path).exit_code == 0, "nobody withdrew"


def test_images_beside_a_dropped_one_come_back(home: SiteHome, tmp_path: Path) -> None:
    table = write_image_table(tmp_path / "hospital")
    run("ingest", table, "--ready-tiles", "--home", home.path)
    done = run("tiles", "drop", tmp_path / "hospital" / "2.png", "--home", home.path, "--yes")
    assert "1 more images of the patient" in done.output
    assert TileStore.open(home.tile_store_path).num_tiles == 3
    table.write_text(table.read_text().replace("2.png,p1,COAD\n", ""))
    run("ingest", table, "--ready-tiles", "--home", home.path)
    assert TileStore.open(home.tile_store_path).num_tiles == 4


def test_ready_tiles_lose_what_they_carry_and_the_page_says_what(
    home: SiteHome, tmp_path: Path
) -> None:
    folder = tmp_path / "hospital"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x013B] = NAME
    Image.fromarray(tissue_image(96, margin=0)).save(folder / "a.jpg", exif=exif)
    table = write_table(folder / "t.csv", "file,patient,label", ["a.jpg,p1,COAD"])
    assert run("ingest", table, "--ready-tiles", "--home", home.path).exit_code == 0
    assert "EXIF fields: 1 image" in page_of(home)
    assert not [n for n, c in everything_in(home.path).items() if NAME.encode() in c]


def test_scale_of_ready_tiles_is_used_for_all_or_none(
    home: SiteHome, tmp_path: Path, foundation: Foundation
) -> None:
    table = write_image_table(tmp_path / "hospital")
    about = foundation.manifest
    mpp = about.mpp * about.tile_px / 48
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0] + ",mpp", *(f"{line},{mpp}" for line in lines[1:])]))
    done = run("ingest", table, "--ready-tiles", "--home", home.path)
    assert done.exit_code == 0, done.output
    store = TileStore.open(home.tile_store_path)
    assert store.mpp == about.mpp
    assert set(store.index["level0_width"].to_pylist()) == {48}
    table.write_text(table.read_text().replace(f"1.png,p0,COAD,{mpp}", "1.png,p0,COAD,"))
    done = run("ingest", table, "--ready-tiles", "--home", home.path)
    assert "line 3: no mpp, but other lines have one" in done.output


def test_planned_table_leaves_nothing_out_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "slides"
    write_slides(folder, "good.svs", "closed/hidden.svs")
    image = tissue_image()
    Image.fromarray(image).save(folder / "plain.png")
    write_dicom_slide(folder / "dicom", image)
    whole = (folder / "good.svs").read_bytes()
    for name, content in (("torn.svs", whole[:2000]), ("odd.ndpi", b"x"), ("notes.txt", b"x")):
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to(folder / "dicom")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    words = ("--plan-table", folder, "--processes", 1)
    done = run("ingest", tmp_path / "t.csv", *words)
    assert done.exit_code == 0, done.output
    left_out = [line.partition(": ")[0] for line in done.stderr.splitlines()]
    names = ("closed", "link", "odd.ndpi", "torn.svs")
    assert left_out[:4] == [f"left out {folder / name}" for name in names]
    assert "left out 1 plain images; --images lists them, too" in done.stderr
    assert "notes.txt" not in done.output
    listed = [line.partition(",")[0] for line in (tmp_path / "t.csv").read_text().splitlines()]
    assert listed == ["file", "slides/dicom", "slides/good.svs"]

    run("ingest", tmp_path / "u.csv", *words, "--images")
    assert "slides/plain.png," in (tmp_path / "u.csv").read_text()
    assert run("ingest", tmp_path / "t.csv", "--images").exit_code == 2


def test_filters_can_be_switched_off_and_that_makes_another_cut(
    home: SiteHome, tmp_path: Path
) -> None:
    """A slide half of which is green: first taken for ink, then kept as a stain."""
    folder = tmp_path / "hospital"
    folder.mkdir()
    image = tissue_image()
    image[:, :256] = image[:, :256, (1, 0, 2)]
    write_slide(folder / "trichrome.svs", image, mpp=0.5, label="x")
    table = write_table(folder / "t.csv", "file,patient,label", ["trichrome.svs,p1,COAD"])
    done = run("ingest", table, "--home", home.path)
    assert "look at line 2: trichrome.svs: 5" in done.stdout
    assert "--keep pen" in done.stdout
    assert "taken for marker ink" in page_of(home)
    few = TileStore.open(home.tile_store_path).num_tiles
    done = run("ingest", table, "--home", home.path, "--keep", "pen", "--json")
    told = json.loads(done.stdout)
    assert told["already_in_the_store"] == 0, "the options are part of what a slide was cut by"
    assert told["tiles"] == TileStore.open(home.tile_store_path).num_tiles > few
    done = run("ingest", table, "--home", home.path, "--ready-tiles", "--keep", "pen")
    assert done.exit_code == 2


def test_listed_names_are_in_no_caption_then_or_later(home: SiteHome, tmp_path: Path) -> None:
    folder = tmp_path / "hospital"
    write_slides(folder, "a.svs", "b.svs")
    header = "file,patient,label,caption,names"
    rows = ["a.svs,17,COAD,glands that Kowalczyk showed to Berger,Anna Berger"]
    table = write_table(folder / "t.csv", header, rows)
    run("ingest", table, "--home", home.path)
    assert TileStore.open(home.tile_store_path).captions == ("glands that Kowalczyk showed to",)
    (tmp_path / "staff.txt").write_text("Kowalczyk\n")
    run("ingest", table, "--home", home.path, "--names", tmp_path / "staff.txt")
    write_table(table, header, [*rows, "b.svs,18,COAD,Kowalczyk saw glands,"])
    run("ingest", table, "--home", home.path)
    captions = TileStore.open(home.tile_store_path).captions
    assert sorted(captions) == ["glands that showed to", "saw glands"]
    assert home.names_path.stat().st_mode & 0o77 == 0


def test_the_end_of_a_caption_that_no_tower_reads_is_told(tmp_path: Path, home: SiteHome) -> None:
    Image.fromarray(tissue_image(64, margin=8)).save(tmp_path / "t.png")
    caption = (
        "colon with tumor, " + "glands with moderate atypia and much stroma, " * 6 + "necrosis"
    )
    rows = [f'{name},p,"{text}"' for name, text in (("t.png", caption), ("t.png", "colon"))]
    table = write_table(tmp_path / "t.csv", "file,patient,caption", rows[:1])
    told = run("ingest", table, "--home", home.path, "--ready-tiles", "--processes", 1)
    assert "captions cut: 1" in told.output
    [line] = [line for line in told.output.splitlines() if line.startswith("cut caption of line 2")]
    assert line.endswith("much stroma, necrosis")
    assert "leaves out" in (home.path / "ingest.html").read_text(encoding="utf-8")
    short = write_table(tmp_path / "t.csv", "file,patient,caption", rows[1:])
    told = run("ingest", short, "--home", home.path, "--ready-tiles", "--processes", 1)
    assert "captions cut: 0" in told.output
