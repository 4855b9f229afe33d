"""One patient is one patient, however a table writes it; what is missing is missing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crafts_client.home import SiteHome
from crafts_client.ingest.choices import TissueMethod
from crafts_client.ingest.deidentify import SALT_BYTES, Salt
from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.patient_names import is_missing, likeness, participant
from crafts_client.ingest.table import TableRow, read_table
from crafts_client.preparation import IngestOptions, prepare_site
from crafts_client.removal import forget
from crafts_core.foundation import Foundation
from crafts_core.tiles import TileStore
from support.sites import make_site_home
from support.slides import write_table

SALT = Salt(bytes(SALT_BYTES))
OPTIONS = IngestOptions(
    ready_tiles=True, max_tiles_per_slide=None, tissue=TissueMethod.OTSU, keep=(), num_processes=0
)


def write_patients(folder: Path, *patients: str, name: str = "t.csv", start: int = 0) -> Path:
    """A table with a ready tile for each."""
    rows = []
    for number, patient in enumerate(patients, start):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"t{number}.png")
        rows.append(f't{number}.png,"{patient}",COAD')
    return write_table(folder / name, "file,patient,label", rows)


def problems_of(table: Path) -> tuple[str, ...]:
    with pytest.raises(IngestError) as error:
        read_table(table)
    return error.value.problems


def patients_of(rows: tuple[TableRow, ...]) -> list[str]:
    return [row.patient for row in rows]


LOOK_ALIKE = [
    ("S19-1234", "S19–1234"), ("S19-1234", "S19-1234\u200b"), ("S19-1234", "S19_1234"),
    ("S19-1234", "S19 1234"), ("S19-1234", "s19.1234"), ("P\u00ad7", "P7"), ("10234", "10234.0"),
    ("10234", "10,234"), ("10234", "10 234"), ("007", "7"), ("P-007", "P7"), ("O’Neill", "O'Neill"),
    ("Müller, A.", "Muller A"), ("٠٠٧", "7"), ("A\u202dB1", "AB1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other"), [("राम", "रामा"), ("कि", "कु"), ("สมชาย", "สุมชาย"), ("1-11", "11-1")]
)
def test_vowels_that_a_letter_carries_tell_two_people_apart(one: str, other: str) -> None:
    assert likeness(one) != likeness(other)


@pytest.mark.parametrize(("one", "other"), LOOK_ALIKE)
def test_names_that_look_like_one_patient_are_told(tmp_path: Path, one: str, other: str) -> None:
    for names in ((one, other, other), (other, one)):
        [told] = problems_of(write_patients(tmp_path, *names))
        assert told.startswith(f"line 3: patient {names[1]} looks like {names[0]} on line 2; write")


@pytest.mark.parametrize(
    ("one", "other"), [("P 1", "p  1"), ("７", "7"), ("Zoe\u0308", "Zo\u00eb"), ("A", "a")]
)
def test_one_name_written_in_two_ways_is_told(tmp_path: Path, one: str, other: str) -> None:
    assert SALT.patient_id(one) == SALT.patient_id(other)
    [told] = problems_of(write_patients(tmp_path, one, other))
    assert told.startswith(f"line 3: patient {other} is written {one} on line 2;")


@pytest.mark.parametrize(
    "names",
    [("1-11", "11-1", "111"), ("P1", "P10", "P100"), ("1.1", "1.10"), ("A1B2", "A12B"),
     ("S23-1001-1", "S23-1001-2"), ("0", "1"), ("李伟", "李薇"), ("かみや", "がみや")],
)  # fmt: skip
def test_different_patients_are_left_alone(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert patients_of(read_table(write_patients(tmp_path, *names))) == list(names)
    assert len(set(map(likeness, names))) == len(names)


# ---- barcodes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("barcode", "whose"),
    [
        ("TCGA-AA-3872", "TCGA-AA-3872"),
        ("TCGA-AA-3872-01Z-00-DX1", "TCGA-AA-3872"),
        ("tcga_aa_3872_01a_01_bs1", "TCGA-AA-3872"),
        ("TCGA.AA.3872.01A", "TCGA-AA-3872"),
        ("TCGA–AA–3872–01A", "TCGA-AA-3872"),
        ("TCGA-AA-3872\u200b-01A", "TCGA-AA-3872"),
        ("TCGA-AA-3872-01Z-00-DX1.9b3-f0.svs", "TCGA-AA-3872"),
        ("TARGET-10-PAAAAA-09A-01R", "TARGET-10-PAAAAA"),
        ("GTEX-1117F-0226-SM-5GZZ7", "GTEX-1117F"),
        ("C3L-00001-21", "C3L-00001"),
        ("TCGA-AA-38725", "TCGA-AA-38725"),
        ("XTCGA-AA-3872-01Z", "XTCGA-AA-3872-01Z"),
        ("S23-1001-A1", "S23-1001-A1"),
    ],
)
def test_a_barcode_counts_for_its_participant(barcode: str, whose: str) -> None:
    assert participant(barcode) == whose
    assert SALT.patient_id(barcode) == SALT.patient_id(whose)


def test_slides_of_one_participant_are_one_patient_s(tmp_path: Path) -> None:
    names = ("TCGA-AA-0001-01A-01-BS1", "TCGA-AA-0001-01Z-00-DX1", "tcga-aa-0001")
    rows = read_table(write_patients(tmp_path, *names))
    assert patients_of(rows) == ["TCGA-AA-0001"] * 3


def test_a_participant_can_be_forgotten_by_a_barcode(
    tmp_path: Path, foundation: Foundation
) -> None:
    home = empty_home(tmp_path, foundation)
    ingest(home, foundation, write_patients(tmp_path, "TCGA-AA-0001-01A", "TCGA-AA-0001-01Z", "P"))
    assert len(TileStore.open(home.tile_store_path).patients) == 2
    assert forget(home, "TCGA-AA-0001-01A", lambda: foundation, lambda *_: None) == 2


# ---- spreadsheets ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1.23457E+11", "1,23457E+11", "1.2E+05", "1e+16"])
def test_a_number_that_was_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    [told] = problems_of(write_patients(tmp_path, name))
    assert told.startswith(f"line 2: patient {name} is a long number that a spreadsheet cut short")
    assert told.endswith("format the column as text, enter it again, and export")


def test_a_number_that_became_a_day_is_refused(tmp_path: Path) -> None:
    [told] = problems_of(write_patients(tmp_path, "1-Feb"))
    assert "is a number that a spreadsheet took for a day" in told


def test_numbers_that_all_end_in_zeros_are_refused(tmp_path: Path) -> None:
    [told] = problems_of(write_patients(tmp_path, "1234567890123450000", "1234567890123460000"))
    assert "numbers of more than 15 digits end in zeros, as a spreadsheet rounds them" in told
    whole = ("1234567890123450000", "1234567890123456789", "5E1", "1E5", "12-MAR")
    assert patients_of(read_table(write_patients(tmp_path, *whole))) == list(whole)


# ---- from table to table --------------------------------------------------------------------


def empty_home(folder: Path, foundation: Foundation) -> SiteHome:
    home = make_site_home(folder / "site", foundation, "key")
    home.tile_store_path.rename(folder / "elsewhere")
    return home


def ingest(home: SiteHome, foundation: Foundation, table: Path) -> None:
    prepare_site(home, foundation, table=table, root=None, options=OPTIONS,
                 progress=lambda *_: None)  # fmt: skip


def test_a_name_that_another_table_writes_otherwise_is_told(
    tmp_path: Path, foundation: Foundation
) -> None:
    home = empty_home(tmp_path, foundation)
    ingest(home, foundation, write_patients(tmp_path, "007", "8"))
    with pytest.raises(IngestError, match="line 2: patient 7 looks like 007, who is in the store;"):
        ingest(home, foundation, write_patients(tmp_path, "7", "8", name="u.csv", start=2))
    corrected = write_patients(tmp_path, "7", "8")  # the slides themselves are now those of 7
    ingest(home, foundation, corrected)
    assert len(TileStore.open(home.tile_store_path).patients) == 2


def test_a_file_of_the_same_name_in_another_folder_hides_nobody(
    tmp_path: Path, foundation: Foundation
) -> None:
    home = empty_home(tmp_path, foundation)
    ingest(home, foundation, write_patients(tmp_path, "007"))
    (other := tmp_path / "other").mkdir()
    table = write_patients(other, "7", start=1)
    (other / "t1.png").rename(other / "t0.png")
    table.write_text(table.read_text().replace("t1", "t0"))
    with pytest.raises(IngestError, match="line 2: patient 7 looks like 007, who is in the store;"):
        ingest(home, foundation, table)


def test_a_patient_whose_file_broke_is_still_in_the_store(
    tmp_path: Path, foundation: Foundation
) -> None:
    home = empty_home(tmp_path, foundation)
    table = write_patients(tmp_path, "007", "8")
    ingest(home, foundation, table)
    (tmp_path / "t0.png").write_bytes(b"broken")
    ingest(home, foundation, table)
    with pytest.raises(IngestError, match="line 2: patient 7 looks like 007, who is in the store;"):
        ingest(home, foundation, write_patients(tmp_path, "7", name="u.csv", start=2))


def test_who_withdrew_does_not_come_back_under_another_spelling(
    tmp_path: Path, foundation: Foundation
) -> None:
    home = empty_home(tmp_path, foundation)
    ingest(home, foundation, write_patients(tmp_path, "007", "8"))
    forget(home, "007", lambda: foundation, lambda *_: None)
    with pytest.raises(IngestError, match="line 2: patient 7 looks like one who withdrew"):
        ingest(home, foundation, write_patients(tmp_path, "7", "8"))
    ingest(home, foundation, write_patients(tmp_path, "007", "8"))  # known, and left out
    assert TileStore.open(home.tile_store_path).num_patients == 1


# ---- missing values -------------------------------------------------------------------------

MISSING = [
    "", "nan", "NaN", "NA", "N/A", "n/a", "None", "null", "NULL", "#N/A", "<NA>", "-", "–", "--",
    "?", ".", "unknown", "\u200b", "#REF!",
]  # fmt: skip


@pytest.mark.parametrize("cell", MISSING)
def test_a_missing_caption_is_made_from_the_label(tmp_path: Path, cell: str) -> None:
    write_patients(tmp_path, "p")
    header = "file,patient,case,label,caption,report,cohort,names,nuclei,fluorescence"
    row = ["t0.png", "p", cell, "COAD", *[cell] * 6]
    [found] = read_table(write_table(tmp_path / "t.csv", header, [",".join(row)]))
    assert found.caption == "H&E, colon adenocarcinoma, colon"
    assert (found.case, found.conditions) == ("", {})


@pytest.mark.parametrize("cell", MISSING)
def test_a_missing_patient_is_refused(tmp_path: Path, cell: str) -> None:
    assert problems_of(write_patients(tmp_path, cell)) == ("line 2: no patient",)


@pytest.mark.parametrize("cell", ["Nan", "0", "Nana", "N", "noname 1", "Na+ 5"])
def test_what_is_short_is_not_missing(cell: str) -> None:
    assert is_missing(cell) == (cell == "Nan")
