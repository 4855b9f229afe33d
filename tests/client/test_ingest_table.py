"""The site's table: read as operators write it, and all its faults told at once."""

from pathlib import Path

import pytest

from crafts_client.ingest import (
    IngestError,
    TableColumns,
    find_slides,
    read_table,
    write_template,
)
from crafts_client.ingest.errors import MAX_LINES
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
        "t.csv: no column file",
        "t.csv: no column patient or source_tile_group",
        "t.csv: no column caption or label or cancer_type or class",
    ]


def test_message_has_one_line_per_fault_and_an_end(folder: Path) -> None:
    rows = [f"gone{number}.svs,p,COAD" for number in range(MAX_LINES + 7)]
    with pytest.raises(IngestError) as caught:
        read_table(write_table(folder / "t.csv", "file,patient,label", rows))
    lines = str(caught.value).splitlines()
    assert len(lines) == MAX_LINES + 1
    assert lines[-1] == "... and 7 more"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"file,patient,label\n", "no rows"),
        (b"\xff\xfe\x00", "cannot read table"),
        (b'file,patient,label\n"a', "cannot read table"),
    ],
)
def test_file_that_is_no_table_is_refused(folder: Path, content: bytes, fault: str) -> None:
    (folder / "t.csv").write_bytes(content)
    assert fault in problems_of(folder / "t.csv")[0]


def test_missing_table_is_refused(tmp_path: Path) -> None:
    assert "cannot read table" in problems_of(tmp_path / "none.csv")[0]


def test_a_template_lists_the_slides_and_nothing_else(tmp_path: Path) -> None:
    """A person fills in whose each is; unfilled it is refused, filled in it is read."""
    (tmp_path / "deep").mkdir()
    write_tissue_slide(tmp_path / "deep" / "b.tiff")
    write_tissue_slide(tmp_path / "a.tiff")
    (tmp_path / "notes.txt").write_text("no slide")
    table = tmp_path / "slides.csv"
    write_template(table, find_slides(tmp_path))
    header, *lines = table.read_text().splitlines()
    assert lines == ["a.tiff,,,,,", "deep/b.tiff,,,,,"]
    assert set(problems_of(table)) == {
        f"slides.csv line {number}: {problem}"
        for number in (2, 3)
        for problem in ("no patient", "neither a caption nor a label")
    }
    filled = [lines[0].replace(",,,,,", ",p1,,COAD,,"), lines[1].replace(",,,,,", ",p2,,LUAD,,")]
    table.write_text("\n".join([header, *filled]) + "\n")
    assert [row.patient for row in read_table(table)] == ["p1", "p2"]


def test_a_template_writes_over_nothing_and_wants_slides(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    with pytest.raises(IngestError, match="no slide was found"):
        write_template(table, find_slides(tmp_path))
    write_tissue_slide(tmp_path / "a.tiff")
    write_template(table, find_slides(tmp_path))
    with pytest.raises(IngestError, match="exists"):
        write_template(table, find_slides(tmp_path))
    with pytest.raises(IngestError, match="cannot write"):
        write_template(tmp_path / "no" / "t.csv", find_slides(tmp_path))
