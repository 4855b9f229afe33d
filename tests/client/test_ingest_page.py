"""The page of an ingest run: nothing is hidden, nothing runs, nothing is fetched."""

import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from crafts_client.ingest.caption_notes import CaptionNote
from crafts_client.ingest.ingest_page import write_ingest_page
from crafts_client.ingest.pictures import write_pictures
from crafts_client.ingest.report import IngestReport, SourceOutcome, Stain
from crafts_client.ingest.stain_outliers import far_stains

HOSTILE = """<script>alert(1)</script>"><img src=x onerror='alert(2)'>&"""


def stain(hematoxylin: float = 0.2, eosin: float = 0.1) -> Stain:
    return Stain(
        hematoxylin=hematoxylin,
        eosin=eosin,
        hematoxylin_shares=(0.25, 0.75),
        eosin_shares=(1.0, 0.0),
    )


def used(line: int, **changes: object) -> SourceOutcome:
    facts: dict[str, object] = {
        "line": line, "file": f"slide-{line}.svs", "patient": f"patient-{line}", "num_tiles": 40,
        "rejected": {"background": 300, "fold": 7, "melted": 2}, "skipped": None,
        "scanner": "Scanner One", "reader": "openslide", "mpp": 0.25, "size_px": (1000, 2000),
        "copied": 30, "identifiers": ("label image",), "stain": stain(), "picture": f"pic{line}",
    }  # fmt: skip
    return SourceOutcome.model_validate(facts | changes)


def skipped(line: int, reason: str) -> SourceOutcome:
    return SourceOutcome(
        line=line, file=f"bad-{line}.svs", patient="patient-x", num_tiles=0, rejected={},
        skipped=reason,
    )  # fmt: skip


def note(line: int, marked: str = "glands of [date]", *look_at: str) -> CaptionNote:
    return CaptionNote(line=line, found={"date": 1}, marked=marked, look_at=look_at)


def page_of(report: IngestReport, folder: Path) -> str:
    return write_ingest_page(report, folder).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_every_skipped_file_is_named_with_its_reason(tmp_path: Path) -> None:
    report = IngestReport.of(
        "slides", [used(1), *(skipped(n, f"cause {n}.") for n in range(2, 99))]
    )
    page = page_of(report, tmp_path)
    assert all(f"bad-{n}.svs" in page and f"cause {n}." in page for n in range(2, 99))
    assert page.index("bad-2.svs") < page.index("slide-1.svs")


def test_every_reason_scanner_and_identifier_is_told(tmp_path: Path) -> None:
    page = page_of(IngestReport.of("slides", [used(1)]), tmp_path)
    for told in (
        "folded tissue", "too little tissue", "melted", "Scanner One", "0.25", "label image",
        "30 tiles copied losslessly", "read by openslide", "must stay at this site",
    ):  # fmt: skip
        assert told in page, told


def test_captions_show_marks_and_words_to_look_at(tmp_path: Path) -> None:
    notes = [note(1, "glands of [date]", "Berger"), CaptionNote(
        line=2, found={}, marked="solid nests", look_at=()
    )]  # fmt: skip
    page = page_of(IngestReport.of("slides", [used(1), used(2)], captions=notes), tmp_path)
    assert "glands of <mark>[date]</mark>" in page
    assert "Berger" in page
    assert "solid nests" not in page


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    sources = [
        used(1, file=HOSTILE, patient=HOSTILE, scanner=HOSTILE, reader=HOSTILE,
             identifiers=(HOSTILE,), rejected={HOSTILE: 3}),
        skipped(2, HOSTILE),
    ]  # fmt: skip
    captions = [CaptionNote(line=1, found={HOSTILE: 1}, marked=f"[{HOSTILE}]", look_at=(HOSTILE,))]
    tags = Tags(page_of(IngestReport.of("slides", sources, captions=captions), tmp_path)).found
    assert "script" not in {tag for tag, _ in tags}
    assert "img" not in {tag for tag, _ in tags}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]


def test_nothing_is_fetched_from_elsewhere(tmp_path: Path) -> None:
    picture = np.full((64, 64, 3), 200, dtype=np.uint8)
    write_pictures(tmp_path / "pictures", "pic1", picture, Image.fromarray(picture))
    page = page_of(IngestReport.of("slides", [used(1), used(2)]), tmp_path)
    links = {
        value for _, attributes in Tags(page).found
        for name, value in attributes.items() if name in ("src", "href", "srcset", "action")
    }  # fmt: skip
    assert links == {"pictures/pic1.jpg", "pictures/pic1-overlay.jpg"}
    assert not re.search(r"//|@import|url\(", page)


def test_a_picture_cannot_lie_elsewhere() -> None:
    with pytest.raises(ValidationError):
        used(1, picture="../../etc/passwd")


def test_page_is_for_its_owner_only(tmp_path: Path) -> None:
    path = write_ingest_page(IngestReport.of("slides", [used(1)]), tmp_path / "new")
    assert path.name == "ingest.html"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_many_slides_are_folded_and_pictures_load_late(tmp_path: Path) -> None:
    picture = np.full((8, 8, 3), 200, dtype=np.uint8)
    write_pictures(tmp_path / "pictures", "all", picture, Image.fromarray(picture))
    report = IngestReport.of("slides", [used(n, picture="all") for n in range(1, 301)])
    page = page_of(report, tmp_path)
    images = [attributes for tag, attributes in Tags(page).found if tag == "img"]
    assert len(images) == 600
    assert {image["loading"] for image in images} == {"lazy"}
    assert (
        page.index("slide-25.svs, ") < page.index("275 more slides") < page.index("slide-26.svs,")
    )
    assert len(page) < 300 * 4000


def test_ready_tiles_are_counted_not_listed(tmp_path: Path) -> None:
    report = IngestReport.of("tiles", [used(n, num_tiles=1, rejected={}) for n in range(1, 50)])
    page = page_of(report, tmp_path)
    assert "49 images" in page
    assert "slide-7.svs" not in page


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    report = IngestReport.of("slides", [], already=12)
    assert "12 there before the newest run" in page_of(report, tmp_path)


def test_forgetting_a_patient_removes_every_mention(tmp_path: Path) -> None:
    sources = [
        used(1), used(2, file="DOE-1.svs", patient="DOE"), used(3, file="DOE-2.svs", patient="DOE"),
        skipped(4, "broken").model_copy(update={"patient": "DOE", "file": "DOE-3.svs"}),
    ]  # fmt: skip
    captions = [note(1, "glands"), note(2, "Mrs DOE"), note(9, "DOE, of an older table")]
    report = IngestReport.of("slides", sources, captions=captions, already=3).without_patient(
        "doe "
    )
    assert "DOE" not in report.model_dump_json()
    assert "DOE" not in page_of(report, tmp_path)
    assert report == IngestReport.of("slides", sources[:1], captions=captions[:1], already=3)


def test_report_written_before_still_reads() -> None:
    old = """{"kind": "slides", "num_tiles": 1, "rejected": {}, "tiles_per_patient": {"a": 1},
      "sources": [{"line": 2, "file": "a.svs", "patient": "a", "num_tiles": 1, "rejected": {},
      "skipped": null}]}"""
    report = IngestReport.model_validate_json(old)
    assert report.sources[0].scanner is None
    assert report.captions == ()


def test_a_scanner_that_stains_otherwise_stands_out(tmp_path: Path) -> None:
    sources = [
        used(n, scanner=f"S{n % 3}", stain=stain(0.2 + 0.01 * (n % 4) + 0.15 * (n % 3 == 2)))
        for n in range(1, 31)
    ]
    assert far_stains(sources) == ([], ["S2"])
    assert "stands out" in page_of(IngestReport.of("slides", sources), tmp_path)


def test_a_slide_that_is_stained_otherwise_stands_out() -> None:
    sources = [used(n, stain=stain(0.2 + 0.01 * (n % 4))) for n in range(1, 13)]
    odd = used(13, stain=stain(0.2, 0.4))
    assert far_stains([*sources, odd]) == ([odd], [])
    assert far_stains([sources[0], odd]) == ([], [])
