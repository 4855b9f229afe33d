"""Scrubbing: what names a patient goes, what describes tissue stays, hostile text costs no more."""

import csv
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.identifiers import Kind
from crafts_client.ingest.known_names import identifying_names
from crafts_client.ingest.listed_names import ListedNames
from crafts_client.ingest.scrub import scrub
from support.slides import REAL_DATA

IDENTIFYING = {
    Kind.DATE: [
        "12.03.2021", "12. 3. 2021", "3/12/2021", "03/12/21", "12-03-2021", "2021-03-12",
        "20210312",
        "2021/3/12", "2021-03-12T14:30:00Z", "12 March 2021", "12th of March, 2021",
        "March 12, 2021",
        "March 12th", "12-Mar-2021", "12-MAR-21", "Mar 2021", "March 2021", "03/2021", "3/2021",
        "03.2021", "2021-03", "Sept. 2021", "12. März 2021", "12. Dezember", "den 12.03.2021",
        "am 12.03.", "12 mars 2021", "le 12/03", "1er août 2021", "12 de marzo de 2021",
        "Monday, 12 March 2021", "2021 Mar 12", "in October", "DOB 1954", "geb. 1954", "born 1954",
    ],
    Kind.TIME: ["14:30", "08:15:20", "2:30 pm", "2 p.m.", "at 2 pm", "14.30 Uhr", "14h30"],
    Kind.NAME: [
        "Dr. Smith", "Dr Jane Smith", "dr. smith", "DR. SMITH", "Dr. Brown",
        "Prof. Dr. med. Müller",
        "Prof. van der Berg", "Mr. O'Neill", "Mrs Smith-Jones", "Ms. Lee", "Frau Kowalczyk",
        "Herrn Özdemir", "Mme Lefèvre", "Patient: Jane Doe", "Patient: Doe, Jane", "Name: jane doe",
        "PATIENT NAME: DOE, JANE", "Patient Kowalczyk", "signed by Smith", "Reported by: J. Smith",
        "electronically signed by JS", "befundet von Kowalczyk", "pathologist Smith",
        "Pathologist: Jane Smith", "cc: Smith", "courtesy of Jane Smith", "J. Smith", "J. R. Smith",
        "J.S.", "J. S.", "Smith, J.", "Jane Smith, MD", "Jane Q. Smith, M.D.", "Nom : Lefèvre",
        "Dr. de la Cruz", "geb.: Kowalczyk",
    ],
    Kind.NUMBER: [
        "S12-34567", "S12-345", "H-2020-001234", "SP 19:1234", "SP19-1234", "E 1234/19",
        "2021-1234",
        "19S1234", "MRN 123456", "MRN: A12-7", "MRN#4711", "case no. 12-34",
        "accession number B17-3",
        "Case: S-1234", "123-45-6789", "123456", "AB123456", "patient ID 4711", "Fallnummer 4711",
        "TCGA-DG-A2KK-01Z-00-DX1.248D92C3-AD5B-4F3C-AE5C-6F8C70C7AE87", "TCGA-DG-A2KK",
        "248d92c3-ad5b-4f3c-ae5c-6f8c70c7ae87", "scan_17.svs", "12-34-567-89", "A1B2C3D4E5F6",
    ],
    Kind.PHONE: [
        "555-123-4567", "(555) 123-4567", "+49 30 1234 567", "Tel. 030 123-45", "030 / 123 45 67",
        "01 23 45 67 89", "phone 4711", "Fax: 1234-56", "+1 555 123 4567",
    ],
    Kind.EMAIL: ["jane.doe@hospital.org", "j_doe+x@mail.uni-x.de", "jane [at] hospital.org"],
    Kind.WEB: ["https://a.b/c?d=1", "www.hospital.org/x", "hospital.org", "10.1371/pone.0104983"],
    Kind.AGE: [
        "92-year-old", "aged 93", "95 years", "101 yo", "94 y/o", "90 yrs old", "age: 91",
        "95-jährige", "95 Jahre alt", "95 ans", "ninety-two-year-old",
    ],
    Kind.ADDRESS: [
        "12 Main Street", "7 Old Mill Rd.", "Hauptstraße 12", "Musterstr. 5a", "12 rue de la Paix",
        "D-12345 Berlin", "SW1A 1AA", "P.O. Box 12", "St. Mary's Hospital", "Klinikum Musterstadt",
        "University Hospital Heidelberg",
    ],
}  # fmt: skip
CLINICAL = [
    "3.5 x 2.0 cm", "5x3.5x3 mm", "1.2.5 cm", "20%", "0.3%-0.4%", "pT2 pN0 pM1a",
    "pT3(SS), ly3, v3",
    "T2a, N0, M0", "G2", "grade 2", "Grade III", "Gleason 3+4=7", "Gleason score 4 + 3 = 7",
    "Ki-67 20%", "CD20", "CD3/CD20", "CK5/6", "CK 8/18", "HER2 3+", "ER 90%, PR 80%", "ER+/PR-",
    "p53", "p16(INK4a)", "MIB-1", "S-100", "PD-L1", "HMB45", "OCT4", "OCT3/4", "Oct 4", "SEPT9",
    "BRAF V600E", "EGFR L858R", "IDH1 R132H", "t(11;22)(q24;q12)", "1p/19q", "12q13-q15", "miR-92a",
    "10/10 HPF", "7/9 cases", "12/14 nodes", "ICD-O 8140/3", "M8140/3", "C50.9", "40x", "×400",
    "(H&E, x200)", "block A1", "blocks A1-A4", "12 o'clock", "1 of 14 lymph nodes", "levels 1-3",
    "dilution 1:50", "ratio 1:100", "HPV 16/18", "HLA-DQB1*06:02", "score 2+3", "0-IIc", "5 cc",
    "63-year-old woman", "aged 45", "fixed for 12 h", "2 cm from the margin", "which may 3 be",
    "Reed-Sternberg cells", "Kaposi sarcoma", "Hodgkin lymphoma", "Sister Mary Joseph nodule",
    "H. pylori", "E. coli", "i.e. necrosis", "H.E. stain", "vitamin D. Normal glands",
    "A. Glands. B. Stroma.", "Fig. 3 A. Photomicrograph", "confirmed by Congo red", "seen by light",
    "the patient has chronic gastritis", "Patient 8 biopsy", "HIV+ patient", "case 5", "slide 2",
    "MR imaging", "MS patients", "PR positive", "pathologist Normal colon", "WHO 2022", "NK/T-cell",
    "Müllerian duct", "(+++)", "5–10 mitoses", ">500–1000 cells", "10,000/µl", "2.5 mm, 0.4 mm",
]  # fmt: skip
SENTENCE = "Moderately differentiated adenocarcinoma {} with tumor necrosis."
SAMPLES = [text for texts in IDENTIFYING.values() for text in texts] + CLINICAL


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in IDENTIFYING.items() for text in texts]
)
def test_what_identifies_goes(kind: Kind, text: str) -> None:
    scrubbed = scrub(SENTENCE.format(f"({text})"))
    assert scrubbed.text == SENTENCE.format("").replace("  ", " ")
    assert kind in scrubbed.found
    assert f"[{kind.value}]" in scrubbed.marked


@pytest.mark.parametrize("text", CLINICAL)
def test_what_describes_tissue_stays(text: str) -> None:
    sentence = SENTENCE.format(f"and {text},")
    assert (scrub(sentence).text, scrub(text).text) == (sentence, text)
    assert not scrub(sentence).found


def test_a_real_looking_report_keeps_its_findings_only() -> None:
    report = """Patient: Doe, Jane   DOB: 01/02/1954   MRN: 00471123
        Accession: S21-01234, received 03/12/2021 14:30. Requested by Dr. A. Kowalczyk,
        Tel. 555-123-4567.
        DIAGNOSIS: Invasive ductal carcinoma of the left breast, grade 2, 2.3 x 1.8 cm; ER 90%,
        HER2 1+, Ki-67 15%. 1 of 14 lymph nodes positive (pT2 pN1a). Block A3.
        Electronically signed by Jane Q. Smith, MD, on March 14, 2021."""
    scrubbed = scrub(report)
    assert scrubbed.text.endswith(
        "DIAGNOSIS: Invasive ductal carcinoma of the left breast, grade 2, 2.3 x 1.8 cm; ER 90%, "
        "HER2 1+, Ki-67 15%. 1 of 14 lymph nodes positive (pT2 pN1a). Block A3."
    )
    for word in ("Doe", "Jane", "1954", "471", "S21", "2021", "14:30", "Kowal", "4567", "Smith"):
        assert word not in scrubbed.text
    assert scrubbed.marked.endswith("Block A3. [name], [date].")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Colon (12/03/2021), necrosis.", "Colon, necrosis."),
        ("Colon, 12/03/2021, necrosis.", "Colon, necrosis."),
        ("S12-34567: colon.", "colon."),
        ("Colon. Signed by Dr. Smith. Necrosis.", "Colon. Necrosis."),
        ("Colon; signed by Dr. Smith.", "Colon."),
        ("Colon [12/03/2021; S12-34567]", "Colon"),
        ("Dr. Smith", ""),
        ("Size S12-34567 .5 cm", "Size .5 cm"),
    ],
)
def test_what_is_left_reads_as_a_sentence(text: str, clean: str) -> None:
    assert scrub(text).text == clean


def test_untouched_text_loses_only_doubled_spaces() -> None:
    assert scrub(" ( odd ),, but \n clinical : ").text == "( odd ),, but clinical :"


def test_what_removal_brings_together_goes_as_well() -> None:
    assert scrub("Seen by Dr. 12/03/2021 Smith, colon").text == "colon"
    assert scrub("Dr. (12/03/2021) Smith, colon").text == "colon"


def test_letters_that_cannot_be_seen_hide_nothing() -> None:
    assert scrub("Dr. Sm\u00adi\u200bth: 123\u200d45, co\u200blon").text == "colon"
    assert scrub("colon １２３４５ ١٢٣٤٥").text == "colon"


KNOWN = identifying_names(patient="Kowalczyk_Jörg", case="PX-4471", file="in/B21-077_Wyss.svs")


@pytest.mark.parametrize(
    "name",
    [
        "Kowalczyk", "KOWALCZYK", "kowalczyk's", "Kowalczyk Jörg", "Kowalczyk, Jörg", "jorg",
        "Joerg",
        "PX-4471", "px4471", "PX_4471", "PX. 4471", "px 4471", "4471", "B21-077", "b21 077 wyss",
        "Wyss", "Jo\u0308rg",
    ],
)  # fmt: skip
def test_own_names_go_in_any_shape(name: str) -> None:
    scrubbed = scrub(f"colon of {name} with necrosis", known=KNOWN)
    assert not re.search("kowal|rg|px|4471|b21|077|wyss", scrubbed.text.lower())
    assert scrubbed.found


@pytest.mark.parametrize(
    ("patient", "case", "file", "text"),
    [
        ("lung_aca-0", "", "lung_aca/lungaca1352.jpeg", "lung adenocarcinoma"),
        ("p", "breast-lobular-carcinoma", "HE.svs", "breast lobular carcinoma, HE"),
        ("p", "high-grade-glioma-Wyss", "a.svs", "high grade glioma"),
        ("17", "3", "12.svs", "3 of 17 nodes, 12 o'clock, block 3"),
        ("A1", "G2", "T1.svs", "T1, G2, block A1"),
        ("p1", "", "p1.svs", "p16 and p53"),
    ],
)
def test_a_row_called_like_its_tissue_keeps_its_caption(
    patient: str, case: str, file: str, text: str
) -> None:
    known = identifying_names(patient=patient, case=case, file=file)
    assert scrub(text, known=known).text == text


@pytest.mark.parametrize(
    ("patient", "text"),
    [
        ("17", "patient 17"),
        ("17", "Patient #17"),
        ("p1", "p1"),
        ("P-12", "p12"),
        ("White", "white"),
        ("Paget", "Paget"),
    ],
)
def test_names_that_are_words_as_well_go(patient: str, text: str) -> None:
    known = identifying_names(patient=patient, case="", file="a.svs")
    assert scrub(f"colon, {text}, necrosis", known=known).text == "colon, necrosis"


def test_words_that_might_be_names_are_shown_and_kept() -> None:
    scrubbed = scrub("The colon of Kowalczyk shows Crohn disease. Tumor near SCHMIDT, DLBCL.")
    assert scrubbed.look_at == ("Kowalczyk", "SCHMIDT")
    assert "Kowalczyk" in scrubbed.text


def test_counts_are_of_what_was_removed() -> None:
    scrubbed = scrub("Dr. Smith, Dr. Jones, 12/03/2021: colon")
    assert scrubbed.found == {Kind.NAME: 2, Kind.DATE: 1}
    assert scrubbed.marked == "[name], [name], [date]: colon"


texts = st.one_of(
    st.text(max_size=80),
    st.lists(
        st.one_of(
            st.sampled_from(SAMPLES),
            st.sampled_from([" ", ". ", ", ", "\n", "(", ")", "-", "Dr. ", "by ", "1", "2021", ""]),
            st.text(alphabet="aB1 .-/:,()@'é\u0301\u200b", max_size=6),
        ),
        max_size=12,
    ).map("".join),
)


@settings(max_examples=100, deadline=None)
@given(texts)
def test_scrubbing_twice_is_scrubbing_once(text: str) -> None:
    once = scrub(text, known=KNOWN)
    twice = scrub(once.text, known=KNOWN)
    assert (twice.text, twice.found) == (once.text, {})


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(texts)
def test_nothing_grows_and_no_long_number_is_left(text: str) -> None:
    clean = scrub(text).text
    assert len(clean) <= len(text)
    assert not re.search(r"\d{5}", clean)


@settings(max_examples=100, deadline=None)
@given(
    texts,
    texts,
    st.sampled_from(["Kowalczyk", "Quist", "PX-4471", "Ab77-Zed", "Nguyễn"]),
    st.sampled_from(["", " ", "-", "_", ". "]),
    st.sampled_from([str.upper, str.lower, str.title]),
)
def test_known_names_are_gone(before: str, after: str, name: str, separator: str, case) -> None:
    written = case(name.replace("-", separator))
    clean = scrub(f"{before} {written} {after}", known=(name,)).text
    left, parts = (re.findall(r"[^\W\d_]+|\d+", text.lower()) for text in (clean, name))
    assert all(left[start : start + len(parts)] != parts for start in range(len(left)))


HOSTILE = [
    "a", "1", "1-", "12-", "1.", "Dr. ", "A.", "ab'", "A-", " ", ",", "(", "Ab ", "12 ", "a@",
    "www.",
    "12 Mar ", "Dr. Ab 1.1.2020 ", "Name:\n", "case: ", "1234a", "+49 12 ", "Abc, A. ", "0123 45 ",
    "in March ", "TCGA-AB-1234-", "e\u0301", "Hauptstr", "9 years ", "kow alczyk", "PX-", "[at] ",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_linear_time(piece: str) -> None:
    """Ten times the text, ten times the time, within a factor; quadratic would be a hundred.

    A pattern that looks at every pair of letters takes seconds for the longer text, each time; a
    collection of garbage or a busy neighbour takes one of three.
    """

    def seconds(length: int) -> float:
        text = (piece * length)[:length] + "x"
        start = time.process_time()
        scrub(text, known=KNOWN)
        return time.process_time() - start

    seconds(1000)
    assert any(seconds(30_000) < 30 * max(seconds(3000), 0.05) for _ in range(3))


def test_text_that_does_not_settle_is_dropped() -> None:
    """Each pass takes out the innermost name and so makes the next."""
    nested = [" ".join(["ab"] * depth + ["cd"] * depth) for depth in (3, 30)]
    assert scrub(f"colon {nested[0]}", known=("ab cd",)).text == "colon"
    assert scrub(f"colon {nested[1]}", known=("ab cd",)).text == ""


def captions() -> Iterator[str]:
    for name in ("pathcap_tcga_labelled.csv", "patchgastric_captions.csv"):
        with (REAL_DATA / "captions" / name).open(encoding="utf-8") as file:
            yield from (row["text"] for row in csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_DATA / "captions").exists(), reason="real captions are not here")
def test_real_captions_are_left_alone() -> None:
    """11 of 4661 hold something that goes, nearly all truly a name, a link or a date."""
    changed = [text for text in captions() if scrub(text).found]
    assert len(changed) < 0.005 * 4661


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Seen with Kowalczyk, who agrees.", "Seen with, who agrees."),
        ("KOWALCZYK: glands", "glands"),
        ("Kowalczyk's slide, glands", "slide, glands"),
        ("glands (Schroeder)", "glands"),
        ("glands per O'Brien", "glands per"),
        ("Schröder-Kowalczyk saw glands", "saw glands"),
        ("Mullerian glands, pat of fat", "Mullerian glands, pat of fat"),
    ],
)
def test_listed_names_go_however_they_are_spelled(text: str, clean: str) -> None:
    listed = ListedNames.of(["Kowalczyk, Anna", "Dr. Hans von Schröder", "Pat O'Brien"])
    scrubbed = scrub(text, listed=listed)
    assert scrubbed.text == clean
    assert scrub(scrubbed.text, listed=listed).text == clean


def test_listed_names_that_are_words_of_pathology_stay_and_are_shown() -> None:
    """Otherwise a Dr. Gross costs every gross description its word."""
    listed = ListedNames.of(["Gross", "Gleason", "Li"])
    scrubbed = scrub("Gleason 3+4; gross tumor, Li and Gross agree.", listed=listed)
    assert scrubbed.text == "Gleason 3+4; gross tumor, Li and Gross agree."
    assert {"Gleason", "Gross", "Li"} <= set(scrubbed.look_at)


def test_fifty_thousand_listed_names_cost_no_more_than_one() -> None:
    letters = str.maketrans("0123456789", "abcdefghij")
    listed = ListedNames.of(f"Zz{number:05d}".translate(letters) for number in range(50_000))
    assert len(listed.words) > 40_000
    text = "glands of the colon with Zzabcdf " * 20
    started = time.perf_counter()
    assert "Zz" not in scrub(text, listed=listed).text
    assert time.perf_counter() - started < 1


def test_a_list_of_names_is_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "n.txt").write_text("# staff\n\nSchröder, Hans  # left\n", encoding="utf-8")
    assert ListedNames.read(tmp_path / "n.txt").words == {"schroder", "hans"}
    (tmp_path / "n.txt").write_text("Meier\n4711\n")
    with pytest.raises(IngestError, match="line 2: no name on it"):
        ListedNames.read(tmp_path / "n.txt")
    (tmp_path / "n.txt").write_bytes("Müller".encode("latin-1"))
    with pytest.raises(IngestError, match="not UTF-8"):
        ListedNames.read(tmp_path / "n.txt")


@pytest.mark.parametrize(
    "text",
    [
        "Hans Müller, born 03.04.1950, {}", "Müller, Hans, *03.04.1950, {}",
        "Hans Müller (geb. 3.4.50), {}", "Hans Müller, geb. 1950, {}",
        "Paget, born 12 May 1944, {}", "Anna Crohn, DOB 1950-02-01, {}",
        "Maria Schmidt geb. Müller, {}",
        "née Müller, {}", "Anna von der Heide, born 3.4.1950, {}", "John Brown, born 1950, {}",
        "Born: 03.04.1950 Hans Müller, {}", "(Hans Müller, 1950-04-03) {}",
        "Hans Müller 3.4.1950, {}", "Anna Schmidt, 3.4.1950, {}", "Ms Müller, {}", "DR Müller, {}",
        "frau müller, {}", "dr. müller, {}", "mr crohn, {}", "HERR Gleason, {}",
    ],
)  # fmt: skip
def test_a_name_beside_a_date_or_a_title_goes_though_it_is_an_eponym(text: str) -> None:
    assert scrub(text.format("colon with tumor")).text == "colon with tumor"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Gleason 3+4, 03.04.2021", "Gleason 3+4"),
        ("03.04.2021: Burkitt lymphoma", "Burkitt lymphoma"),
        ("Crohn disease since 2010, newborn", "Crohn disease since 2010, newborn"),
        ("Operated 03.04.2021", "Operated"),
        ("Gallenblase vom 03.04.2021", "Gallenblase"),
        ("MR enterography of Crohn disease", "MR enterography of Crohn disease"),
    ],
)
def test_what_is_no_name_beside_a_date_stays(text: str, left: str) -> None:
    assert scrub(text).text == left
