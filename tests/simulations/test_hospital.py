"""Synthetic hospitals: reproducible, resumable, and ordinary slides to a client."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest

from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.ingest import ingest_slides
from crafts_client.ingest.table import read_table
from crafts_client.ingest.tiling import TilingOptions
from crafts_core.procedural import random_stain
from crafts_core.tiles import TileStore
from crafts_core.vocabulary import VocabularyError
from crafts_simulations import hospital
from crafts_simulations.hospital import (
    HospitalConfig,
    HospitalError,
    make_hospital,
    plan_slides,
    tissue_outline,
)

CONFIG = HospitalConfig(
    name="north",
    num_patients=2,
    slides_per_patient=2,
    slide_px=256,
    mpp=0.5,
    cancer_mix={"COAD": 1.0, "normal colon": 1.0},
    stain=random_stain(np.random.default_rng(1)),
    seed=7,
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hospital(tmp_path_factory.mktemp("north"), CONFIG, num_processes=0)


def bytes_of(table: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in table.parent.rglob("*") if p.is_file()}


def test_table_names_every_slide_with_its_exact_caption(table: Path) -> None:
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [
        f"slides/north-{patient:05d}-{number:02d}.svs"
        for patient in range(2)
        for number in range(2)
    ]
    planned = plan_slides(table.parent, CONFIG)
    assert [row["caption"] for row in rows] == [slide.caption for slide in planned]
    assert all(row["caption"].startswith("H&E, ") for row in rows)
    assert {row["cancer_type"] for row in rows} <= set(CONFIG.cancer_mix)


def test_slides_are_aperio_with_glass_around_tissue(table: Path) -> None:
    for path in (table.parent / "slides").iterdir():
        with openslide.OpenSlide(path) as slide:
            pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
            assert float(slide.properties["openslide.mpp-x"]) == CONFIG.mpp
        white = np.array(CONFIG.stain.white) * 255
        is_glass = np.abs(pixels - white).max(axis=2) < 12
        assert 0.1 < is_glass.mean() < 0.95


def test_hospital_made_twice_is_the_same_to_the_byte(table: Path, tmp_path: Path) -> None:
    again = make_hospital(tmp_path, CONFIG, num_processes=0)
    assert bytes_of(again) == bytes_of(table)


def test_interrupted_hospital_is_completed(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_hospital(tmp_path, CONFIG, num_processes=0, progress=stop)
    drawn = []
    draw = hospital.draw_slide
    monkeypatch.setattr(hospital, "draw_slide", lambda slide: drawn.append(draw(slide)))
    again = make_hospital(tmp_path, CONFIG, num_processes=0)
    assert len(drawn) == 1
    assert bytes_of(again) == bytes_of(table)


def test_folder_of_another_hospital_is_refused(table: Path) -> None:
    with pytest.raises(HospitalError, match="another configuration"):
        make_hospital(table.parent, replace(CONFIG, seed=8), num_processes=0)


def test_patients_follow_the_case_mix(tmp_path: Path) -> None:
    mixed = replace(CONFIG, num_patients=400, cancer_mix={"COAD": 3.0, "LUAD": 1.0, "UVM": 0.0})
    labels = [slide.label for slide in plan_slides(tmp_path, mixed)]
    assert labels.count("UVM") == 0
    assert labels.count("COAD") / len(labels) == pytest.approx(0.75, abs=0.08)


def test_slides_of_one_patient_show_one_cancer(tmp_path: Path) -> None:
    many = replace(CONFIG, num_patients=20)
    labels: dict[str, set[str]] = {}
    for slide in plan_slides(tmp_path, many):
        labels.setdefault(slide.patient, set()).add(slide.label)
    assert all(len(of_patient) == 1 for of_patient in labels.values())


@pytest.mark.parametrize(
    "changes",
    [{"num_patients": 0}, {"slide_px": 8}, {"cancer_mix": {}}, {"cancer_mix": {"COAD": 0.0}}],
)
def test_impossible_hospital_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"hospital needs|expected weights"):
        replace(CONFIG, **changes)  # type: ignore[arg-type]


def test_unknown_cancer_type_is_refused() -> None:
    with pytest.raises(VocabularyError, match="XYZ"):
        replace(CONFIG, cancer_mix={"XYZ": 1.0})


def test_outline_is_one_part_of_the_slide() -> None:
    outline = tissue_outline(np.random.default_rng(0), 128)
    assert outline.shape == (128, 128)
    assert outline.mean() == pytest.approx(0.72, abs=0.02)


def test_client_ingests_a_hospital_like_any_other(table: Path, tmp_path: Path) -> None:
    report = ingest_slides(
        read_table(table),
        tmp_path / "store",
        cohort="north",
        salt=Salt(bytes(32)),
        options=TilingOptions(tile_px=32, mpp=1.0),
        num_processes=0,
    )
    store = TileStore.open(tmp_path / "store")
    assert not report.skipped
    assert report.rejected["background"] > 0
    assert store.num_patients == CONFIG.num_patients
    assert set(store.captions) == {slide.caption for slide in plan_slides(tmp_path, CONFIG)}
