"""The site's table: read as operators write it, and all its faults told at once."""

from pathlib import Path

import pytest

from crafts_client.ingest.caption_notes import caption_report
from crafts_client.ingest.errors import MAX_LINES, IngestError, grouped
from crafts_client.ingest.folder_search import find_slides
from crafts_client.ingest.identifiers import Kind
from crafts_client.ingest.scrub import scrub
from crafts_client.ingest.table import TableColumns, read_table, write_template
from support.slides import write_table, write_tissue_slide


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.svs", "b.svs"):
        (tmp_path / name).touch()
    return tmp_path


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(IngestError) as caught:
        read_table(path)
    return caught.value.problems


def test_label_becomes_a_caption(folder: Path) -> None:
    table = write_table(folder / "t.csv", "file,patient,cancer_type", ["a.svs,p1,COAD"])
    (row,) = read_table(table)
    assert row.caption == "H&E, colon adenocarcinoma, colon"
    assert (row.label, row.patient, row.mpp, row.line) == ("COAD", "p1", None, 2)
    assert row.path == folder / "a.svs"


def test_own_caption_wins_over_the_label(folder: Path) -> None:
    table = write_table(
        folder / "t.csv", "file,patient,label,caption", ['a.svs,p1,anything,"clear  cells, large"']
    )
    assert read_table(table)[0].caption == "clear cells, large"


@pytest.mark.parametrize(("name", "separator"), [("t.tsv", "\t"), ("t.csv", ";"), ("t.csv", "\t")])
def test_separators_that_spreadsheets_write_are_understood(
    folder: Path, name: str, separator: str
) -> None:
    lines = ["file,class,source_tile_group,mpp", "a.svs,lung_n,g1,0.25", "b.svs,colon_aca,g2,"]
    text = "\ufeff" + "\r\n".join(lines).replace(",", separator)
    (folder / name).write_text(text, encoding="utf-8")
    first, second = read_table(folder / name)
    assert (first.patient, first.mpp, first.caption) == ("g1", 0.25, "H&E, normal lung")
    assert (second.patient, second.mpp) == ("g2", None)


def test_columns_and_root_can_be_named(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("tables")
    table = write_table(elsewhere / "t.csv", "image,who,organ", ["a.svs,p1,normal lung"])
    columns = TableColumns(file=("image",), patient=("who",), label=("organ",))
    assert read_table(table, root=folder, columns=columns)[0].path == folder / "a.svs"


def test_every_fault_is_told_at_once(folder: Path) -> None:
    rows = [
        "a.svs,p1,COAD,0.5",
        "gone.svs,p1,COAD,",
        "b.svs,,COAD,",
        "./a.svs,p2,COAD,",
        ",p3,COAD,",
        "b.svs,p4,,half",
        "b.svs,p4",
    ]
    problems = problems_of(write_table(folder / "t.csv", "file,patient,label,mpp", rows))
    told = " | ".join(problems)
    for fault in (
        "line 3: file gone.svs does not exist",
        "line 4: no patient",
        "line 5: file ./a.svs is listed before, on line 2",
        "line 6: no file",
        "line 7: neither a caption nor a label",
        "line 7: mpp 'half' is not a number",
        "line 8: expected 4 cells, got 2",
    ):
        assert fault in told


@pytest.mark.parametrize("mpp", ["0.059", "20.1", "96", "2500"])
def test_scale_of_no_microscope_is_a_fault(folder: Path, mpp: str) -> None:
    table = write_table(folder / "t.csv", "file,patient,label,mpp", [f"a.svs,p1,COAD,{mpp}"])
    assert f"mpp {mpp} cannot be right: microns per pixel, from 0.06 to 20" in problems_of(table)[0]


@pytest.mark.parametrize("mpp", ["0", "-1", "nan", "inf"])
def test_scale_that_is_no_scale_is_a_fault(folder: Path, mpp: str) -> None:
    table = write_table(folder / "t.csv", "file,patient,label,mpp", [f"a.svs,p1,COAD,{mpp}"])
    assert "mpp must be above zero" in problems_of(table)[0]


def test_unknown_label_says_what_is_known(folder: Path) -> None:
    table = write_table(folder / "t.csv", "file,patient,label", ["a.svs,p1,martian"])
    (problem,) = problems_of(table)
    assert "martian" in problem
    assert "COAD" in problem


def test_overlong_caption_is_a_fault(folder: Path) -> None:
    table = write_table(folder / "t.csv", "file,patient,caption", [f"a.svs,p1,{'x' * 1001}"])
    assert "longer than 1000" in problems_of(table)[0]


def test_missing_columns_are_named_with_what_is_there(folder: Path) -> None:
    problems = problems_of(write_table(folder / "t.csv", "slide,name", ["a.svs,p1"]))
    assert [problem.split(" (")[0] for problem in problems] == [
        "line 1: no column file",
        "line 1: no column patient or source_tile_group",
        "line 1: no column caption or label or cancer_type or class",
    ]


def test_message_has_one_line_per_fault_and_an_end(folder: Path) -> None:
    rows = [f"a.svs,p,COAD,{number}um" for number in range(MAX_LINES + 7)]
    with pytest.raises(IngestError) as caught:
        read_table(write_table(folder / "t.csv", "file,patient,label,mpp", rows))
    lines = [line for line in caught.value.lines() if "is listed before" not in line]
    assert len(lines) == MAX_LINES
    assert lines[0] == "line 2: mpp '0um' is not a number"
    assert lines[-1] == "... and 8 more"


def test_equal_problems_are_one_line_with_their_number(folder: Path) -> None:
    """A share that is not mounted hides nothing else of a table."""
    rows = [f"share/Case {number} no 1.svs,p{number},COAD" for number in range(300)]
    rows += ["a.svs,,COAD", "b.svs,,COAD", "near.svs,p,COAD", "far.svs,p,COAD"]
    with pytest.raises(IngestError) as caught:
        read_table(write_table(folder / "t.csv", "file,patient,label", rows))
    assert len(caught.value.problems) == 304, "the whole list is kept"
    assert caught.value.lines() == [
        f"lines 2, 3, 4, 5 and 298 more: file share/Case 0 no 1.svs does not exist below {folder}; "
        "the others likewise",
        "lines 302, 303: no patient",
        "304 problems in all",
    ]


@pytest.mark.parametrize("number", [2, 5])
def test_a_few_files_are_named_each(number: int) -> None:
    problems = [f"line {row}: file {row}.svs does not exist below here" for row in range(number)]
    assert grouped(problems) == problems


def test_only_problems_of_one_kind_come_together() -> None:
    missing = [f"line {row}: file {row}.svs does not exist below here" for row in range(6)]
    masks = [f"line {row}: nuclei file {row}.png does not exist below here" for row in range(6)]
    torn = [f"line {row}: {row}.svs would be skipped: it is torn" for row in range(6)]
    used = [f"line {row}: {row}.svs was skipped: it is torn" for row in range(6)]
    alone = ["the store is of other tiles", "line 9: the store is of other tiles"]
    assert [line.partition(": ")[2] for line in grouped(missing + masks + torn + used)] == [
        "file 0.svs does not exist below here; the others likewise",
        "nuclei file 0.png does not exist below here; the others likewise",
        "0.svs would be skipped: it is torn; the others likewise",
        "0.svs was skipped: it is torn; the others likewise",
    ]
    assert grouped(alone) == alone


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"file,patient,label\n", "no row follows"),
        ("file,patient,label\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 t.csv > utf8-t.csv"),
        (b'file,patient,label\n"a', "cannot read table"),
    ],
)
def test_file_that_is_no_table_is_refused(folder: Path, content: bytes, fault: str) -> None:
    (folder / "t.csv").write_bytes(content)
    assert fault in problems_of(folder / "t.csv")[0]


def test_table_of_an_old_spreadsheet_is_refused_with_the_way_out(folder: Path) -> None:
    """Latin-1 read as anything else would make one patient of two, or two of one."""
    text = "file,patient,label\na.svs,p1,COAD\nb.svs,Müller,COAD\n"
    (folder / "t.csv").write_bytes(text.encode("latin-1"))
    (told,) = problems_of(folder / "t.csv")
    assert "not UTF-8 (byte 0xfc on line 3)" in told
    assert 'save it from the spreadsheet as "CSV UTF-8", or run: iconv' in told


def test_column_that_would_be_passed_over_is_refused(folder: Path) -> None:
    header = "file,patient,label,label,MPP,notes,notes"
    told = problems_of(write_table(folder / "t.csv", header, ["a.svs,p1,COAD,LUAD,1,,"]))
    assert told == (
        "line 1: column label is there 2 times; keep one, or give the others other names",
        "line 1: column MPP is not read; write it mpp",
    )


def test_missing_columns_hide_nothing_of_the_rows(folder: Path) -> None:
    told = problems_of(write_table(folder / "t.csv", "file,mpp", ["a.svs,wide", "gone.svs,"]))
    assert [problem.partition(" (")[0] for problem in told[:2]] == [
        "line 1: no column patient or source_tile_group",
        "line 1: no column caption or label or cancer_type or class",
    ]
    assert told[2:] == (
        "line 2: mpp 'wide' is not a number",
        f"line 3: file gone.svs does not exist below {folder}",
    )


def test_missing_table_is_refused(tmp_path: Path) -> None:
    assert "cannot read table" in problems_of(tmp_path / "none.csv")[0]


def test_a_template_lists_the_slides_and_nothing_else(tmp_path: Path) -> None:
    """A person fills in whose each is; unfilled it is refused, filled in it is read."""
    (tmp_path / "deep").mkdir()
    write_tissue_slide(tmp_path / "deep" / "b.tiff")
    write_tissue_slide(tmp_path / "a.tiff")
    (tmp_path / "notes.txt").write_text("no slide")
    table = tmp_path / "slides.csv"
    write_template(table, find_slides(tmp_path).paths)
    header, *lines = table.read_text().splitlines()
    empty = "," * header.count(",")
    assert lines == [f"a.tiff{empty}", f"deep/b.tiff{empty}"]
    assert set(problems_of(table)) == {
        f"line {number}: {problem}"
        for number in (2, 3)
        for problem in ("no patient", "neither a caption nor a label")
    }
    filled = [
        line.replace(",,,", f",{who},,COAD", 1)
        for line, who in zip(lines, ("p1", "p2"), strict=True)
    ]
    table.write_text("\n".join([header, *filled]) + "\n")
    assert [row.patient for row in read_table(table)] == ["p1", "p2"]


def test_a_template_writes_over_nothing_and_wants_slides(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    with pytest.raises(IngestError, match="no slide was found"):
        write_template(table, find_slides(tmp_path).paths)
    write_tissue_slide(tmp_path / "a.tiff")
    write_template(table, find_slides(tmp_path).paths)
    with pytest.raises(IngestError, match="exists"):
        write_template(table, find_slides(tmp_path).paths)
    with pytest.raises(IngestError, match="cannot write"):
        write_template(tmp_path / "no" / "t.csv", find_slides(tmp_path).paths)


ATTRIBUTES = "growth_pattern,nuclear_grade,stroma,features"


@pytest.mark.parametrize(
    ("cells", "caption"),
    [
        (
            "glands,high,abundant,necrosis; goblet cells",
            "glands with lumina, high grade nuclei, abundant stroma, goblet cells, necrosis",
        ),
        ("Glands,,,necrosis|Necrosis | goblet_cells", "glands with lumina, goblet cells, necrosis"),
        (",LOW,,", "low grade nuclei"),
        (",,scant,", "scant stroma"),
    ],
)  # fmt: skip
def test_label_and_attributes_compose_the_caption(folder: Path, cells: str, caption: str) -> None:
    header = f"file,patient,label,{ATTRIBUTES}"
    rows = [f"a.svs,p1,COAD,{cells}", f"b.svs,p2,normal colon,{cells}"]
    cancer, normal = read_table(write_table(folder / "t.csv", header, rows))
    assert cancer.caption == f"H&E, colon adenocarcinoma, colon, {caption}"
    assert normal.caption == f"H&E, normal colon, {caption}"
    assert (cancer.scrubbed, cancer.notes) == (None, ())


def test_unknown_attributes_are_told_with_what_is_allowed(folder: Path) -> None:
    header = f"file,patient,label,{ATTRIBUTES}"
    rows = ["a.svs,p1,COAD,blobs,worst,none,necrosis;frogs;", "b.svs,p2,COAD,,,,"]
    told = problems_of(write_table(folder / "t.csv", header, rows))
    assert [problem.split(":")[0] for problem in told] == [
        "line 2",
        "line 2",
        "line 2",
        "line 2",
    ]
    assert "features 'frogs' is none of: clear cytoplasm, " in told[0]
    assert "growth_pattern 'blobs' is none of: glands, crypts, " in told[1]
    assert "nuclear_grade 'worst' is none of: low, intermediate, high" in told[2]
    assert "stroma 'none' is none of: scant, moderate, abundant" in told[3]


def test_attributes_without_a_label_are_no_caption(folder: Path) -> None:
    table = write_table(folder / "t.csv", "file,patient,label,stroma", ["a.svs,p1,,scant"])
    assert "neither a caption nor a label" in problems_of(table)[0]


def test_caption_comes_scrubbed_of_identifiers_and_own_names(folder: Path) -> None:
    row = 'a.svs,Kowalczyk,PX-77,COAD,"Colon of KOWALCZYK, case px77, signed by Dr. Wyss, 3 cm"'
    (read,) = read_table(write_table(folder / "t.csv", "file,patient,case,label,caption", [row]))
    assert read.caption == "Colon of, case, 3 cm"
    assert read.scrubbed is not None
    assert read.scrubbed.found == {Kind.NAME: 1, Kind.KNOWN: 2}
    assert scrub(read.caption).text == read.caption


def test_caption_of_nothing_but_names_is_a_fault(folder: Path) -> None:
    table = write_table(folder / "t.csv", "file,patient,caption", ["a.svs,p1,Dr. Wyss 12/03/2021"])
    assert "nothing is left of its text" in problems_of(table)[0]


def test_report_is_a_caption_cut_at_a_sentence(folder: Path) -> None:
    report = "Seen by Dr. Wyss. " + "Glands of the colon with necrosis. " * 40
    table = write_table(folder / "t.csv", "file,patient,report", [f"a.svs,p1,{report}"])
    (row,) = read_table(table)
    assert row.caption == ("Glands of the colon with necrosis. " * 28).strip()
    assert row.notes == ("its report has 1399 characters; the first 979 are its caption",)
    assert row.scrubbed is not None
    assert row.scrubbed.found == {Kind.NAME: 1}


def test_a_second_mark_of_utf8_is_no_part_of_a_name(folder: Path) -> None:
    table = folder / "t.csv"
    table.write_text("\ufeff\ufefffile,patient\u200b,label\na.svs,p1,COAD\n", encoding="utf-8")
    assert [row.patient for row in read_table(table)] == ["p1"]


def test_a_synoptic_report_is_more_than_its_first_sentence(folder: Path) -> None:
    """Lines without a stop: what is diagnosed stands after the only one."""
    report = "Resection of the colon. " + "type: adenocarcinoma; grade: moderate; " * 40
    table = write_table(folder / "t.csv", "file,patient,report", [f"a.svs,p1,{report}"])
    (row,) = read_table(table)
    assert 950 < len(row.caption) <= 1000


def test_report_of_one_endless_sentence_is_cut_at_a_word(folder: Path) -> None:
    rows = [f"a.svs,p1,{'glands ' * 200}", f"b.svs,p2,{'g' * 1200}"]
    words, letters = read_table(write_table(folder / "t.csv", "file,patient,report", rows))
    assert words.caption == ("glands " * 143).strip()
    assert letters.caption == "g" * 1000


def test_what_is_not_used_is_noted(folder: Path) -> None:
    header = "file,patient,label,stroma,caption,report"
    table = write_table(folder / "t.csv", header, ["a.svs,p1,COAD,scant,glands,much longer"])
    (row,) = read_table(table)
    assert row.caption == "glands"
    assert row.notes == (
        "its report is not used: it has a caption",
        "its attributes are not used: it has a text of its own",
    )


def test_free_label_is_scrubbed_and_a_known_one_is_not(folder: Path) -> None:
    rows = ["a.svs,p1,COAD,glands", "b.svs,p2,tumor of Dr. Wyss,glands"]
    known, free = read_table(write_table(folder / "t.csv", "file,patient,label,caption", rows))
    assert (known.label, known.scrubbed_label) == ("COAD", None)
    assert free.label == "tumor of"
    assert free.scrubbed_label is not None


def test_folder_is_a_slide_but_not_with_its_parts(folder: Path) -> None:
    (folder / "series").mkdir()
    (folder / "series" / "1.dcm").touch()
    header = "file,patient,label"
    table = write_table(folder / "t.csv", header, ["series,p1,COAD"])
    assert read_table(table)[0].path == folder / "series"
    table = write_table(folder / "t.csv", header, ["series/1.dcm,p1,COAD", "series,p1,COAD"])
    assert "line 2: file series/1.dcm lies inside series" in problems_of(table)[0]
    table = write_table(folder / "t.csv", header, [".,p1,COAD"])
    assert "file . is the folder of all slides" in problems_of(table)[0]


def test_one_slide_under_two_names_is_found(folder: Path) -> None:
    (folder / "link.svs").symlink_to(folder / "a.svs")
    (folder / "B.svs").touch()
    rows = ["a.svs,p1,COAD", "link.svs,p2,COAD", "b.svs,p3,COAD", "B.svs,p3,COAD"]
    told = problems_of(write_table(folder / "t.csv", "file,patient,label", rows))
    assert told == (
        "line 3: file link.svs is listed before, on line 2, for another patient",
        "line 5: file B.svs differs only in capitals from b.svs on line 4; if they are two, "
        "rename one",
    )


def test_one_patient_under_two_names_is_found(folder: Path) -> None:
    rows = ["a.svs,P 1,c1,COAD", "b.svs,p  1,c1,COAD"]
    (told,) = problems_of(write_table(folder / "t.csv", "file,patient,case,label", rows))
    assert told.startswith("line 3: patient p  1 is written P 1 on line 2; ")


def test_a_case_belongs_to_one_patient(folder: Path) -> None:
    rows = ["a.svs,p1,c1,COAD", "b.svs,p2,c1,COAD"]
    (told,) = problems_of(write_table(folder / "t.csv", "file,patient,case,label", rows))
    assert told == "line 3: case c1 belongs to patient p1 on line 2, and to p2 here"


def test_a_patient_belongs_to_one_cohort(folder: Path) -> None:
    rows = ["a.svs,p1,x,COAD", "b.svs,p1,y,COAD"]
    (told,) = problems_of(write_table(folder / "t.csv", "file,patient,cohort,label", rows))
    assert told.startswith("line 3: patient p1 is in cohort y here and in x on line 2; ")


def test_a_table_holds_the_sites_cohort_only(folder: Path) -> None:
    rows = ["a.svs,p1,x,COAD", "b.svs,p2,y,COAD"]
    table = write_table(folder / "t.csv", "file,patient,cohort,label", rows)
    assert problems_of(table) == (
        "line 3: belongs to cohort y, but line 2 to x; one table for each cohort",
    )
    with pytest.raises(IngestError) as caught:
        read_table(table, cohort="x")
    assert caught.value.problems == (
        "line 3: belongs to cohort y; ingest it in that cohort's home",
    )
    table = write_table(folder / "t.csv", "file,patient,cohort,label", [rows[0], "b.svs,p2,,COAD"])
    assert len(read_table(table, cohort="x")) == len(read_table(table)) == 2


def test_report_of_captions_tells_what_went_and_what_to_look_at(folder: Path) -> None:
    rows = [
        "a.svs,p1,tumor of Dr. Wyss,glands of Kowalczyk on 12/03/2021",
        "b.svs,p2,COAD,plain glands",
    ]
    table = write_table(folder / "t.csv", "file,patient,label,caption", rows)
    (note,) = caption_report(read_table(table))
    assert note.model_dump(mode="json") == {
        "line": 2,
        "table": "",
        "found": {"date": 1, "name": 1},
        "marked": "glands of Kowalczyk [date]",
        "marked_label": "tumor of [name]",
        "look_at": ["Kowalczyk"],
        "unread": "",
        "notes": [],
    }
