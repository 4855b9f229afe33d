"""From answers to figures, a table and a page."""

import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest

from crafts_core.study.analysis import analyse
from crafts_core.study.analysis_page import render_page
from crafts_core.study.plots import roc
from crafts_core.study.questions import StudyError
from crafts_core.study.records import Reading
from crafts_core.study.results import StudyAnalysis
from crafts_core.study.verdict import table, verdict
from support.reader_studies import reading

Score = Callable[[int, int, bool], int]


def answers(score: Score, *, readers: int = 2, images: int = 24, **values: object) -> list[Reading]:
    """Every reader judges every image; odd images are synthetic."""
    return [
        reading(reader, image, score(reader, image, image % 2 == 1),
                is_synthetic=image % 2 == 1, **values)
        for reader in range(1, readers + 1)
        for image in range(images)
    ]  # fmt: skip


def knows(_reader: int, _image: int, is_synthetic: bool) -> int:
    return 6 if is_synthetic else 1


def guesses(reader: int, image: int, _is_synthetic: bool) -> int:
    return 1 + (7 * reader + image // 2) % 6


def found_by(score: Score, **values: object) -> StudyAnalysis:
    return analyse("s", answers(score, **values))  # type: ignore[arg-type]


def test_readers_who_know_are_said_to_tell_them_apart() -> None:
    found = found_by(knows)
    assert found.mean_reader["balanced_accuracy"].value == 1
    assert found.mean_reader["area"].value == 1
    assert "told from real ones more often than guessing would" in " ".join(verdict(found))
    assert found.inter_rater is not None
    assert (found.inter_rater.fleiss, found.inter_rater.alpha) == (1, 1)


def test_readers_who_guess_prove_nothing() -> None:
    found = found_by(guesses)
    assert found.mean_reader["d_prime"].value == pytest.approx(0)
    assert found.mean_reader["balanced_accuracy"].value == pytest.approx(0.5)
    told = " ".join(verdict(found))
    low, high = found.mean_reader["d_prime"].by_image_and_reader or (0, 0)
    assert "not distinguishable from guessing. It does not prove" in told
    assert f"a d' of {max(high, -low):.2f} would go with it" in told


def test_readers_who_take_one_for_the_other_see_a_difference() -> None:
    told = " ".join(verdict(found_by(lambda r, i, synthetic: 1 if synthetic else 6)))
    assert "read it the wrong way round" in told


@pytest.mark.parametrize("name", ["d_prime", "area", "balanced_accuracy"])
def test_readers_who_say_the_same_tell_no_more_than_one(name: str) -> None:
    """The interval over images is the one reader's, to the digit."""
    alike = [found_by(lambda _r, i, s: guesses(1, i, s), readers=count) for count in (1, 8)]
    one, eight = (each.mean_reader[name].by_image for each in alike)
    assert one == pytest.approx(eight)


@pytest.mark.parametrize(("real", "synthetic"), [(14, 8), (8, 14), (50, 8), (50, 50)])
def test_readers_who_always_say_real_prove_nothing(real: int, synthetic: int) -> None:
    """Neither how many there are of each kind nor answers without any spread are evidence."""
    found = analyse("s", [
        reading(reader, image, 2, is_synthetic=image >= real)
        for reader in (1, 2) for image in range(real + synthetic)
    ])  # fmt: skip
    assert found.mean_reader["d_prime"].value == pytest.approx(0)
    told = " ".join(verdict(found))
    assert "nothing follows" in told
    assert "95 %" not in told


def test_one_reader_has_no_interval_over_readers_and_no_agreement() -> None:
    found = found_by(guesses, readers=1)
    assert found.mean_reader["d_prime"].by_image_and_reader is None
    assert found.inter_rater is None
    assert "agreement between readers needs two of them" in found.remarks
    assert "one reader; other readers may differ" in " ".join(verdict(found))


def test_shares_of_a_reader_have_wilsons_interval() -> None:
    (one, _) = found_by(lambda r, i, s: 6 if i % 3 else 1).readers
    right = round(one.sensitivity.value * one.sensitivity.num)
    exact = binomtest(right, one.sensitivity.num).proportion_ci(0.95, method="wilson")
    assert one.sensitivity.wilson == pytest.approx((exact.low, exact.high))
    assert one.accuracy.num == 24


def test_repeats_count_for_agreement_with_oneself_and_for_nothing_else() -> None:
    """Eight repeats, of which six get the same side again."""
    first = answers(knows, readers=1)
    again = [
        reading(1, each.image, 7 - each.score if each.image < 2 else each.score,
                is_synthetic=each.is_synthetic, is_repeat=True)
        for each in first[:8]
    ]  # fmt: skip
    found = analyse("s", first + again)
    (own,) = found.intra_rater
    assert found.readers[0].accuracy.value == 1
    assert (own.same_side.value, own.num_repeats) == (0.75, 8)
    assert own.kappa == pytest.approx(0.5)


def test_few_repeats_are_a_remark() -> None:
    first = answers(knows, readers=1)
    again = [reading(1, 0, 1, is_synthetic=False, is_repeat=True)]
    found = analyse("s", first + again)
    assert found.intra_rater == ()
    assert any("needs 5 repeated images, got 1" in remark for remark in found.remarks)


def test_too_few_answers_are_a_sentence() -> None:
    with pytest.raises(StudyError, match="too few answers: no reader has judged 5 real and 5"):
        analyse("s", answers(knows, images=8))
    with pytest.raises(StudyError, match="0 answers in all"):
        analyse("s", [])


def test_a_reader_who_has_hardly_begun_is_left_out() -> None:
    late = answers(knows, readers=3)
    late = [each for each in late if each.reader < 3 or each.image < 4]
    found = analyse("s", late)
    assert [each.reader for each in found.readers] == [1, 2]
    assert any("reader 3 is left out: 2 real and 2 synthetic" in each for each in found.remarks)


def test_an_unfinished_reader_counts_with_what_was_read() -> None:
    part = [each for each in answers(knows, readers=2) if each.reader == 1 or each.image < 12]
    found = analyse("s", part)
    assert [each.num_real + each.num_synthetic for each in found.readers] == [24, 12]
    assert found.mean_reader["d_prime"].by_image is not None


def test_ratings_are_compared_between_kinds() -> None:
    rated = [
        reading(reader, image, 3, is_synthetic=bool(image % 2), nuclei=2 + reader - image % 2,
                architecture=4, stain=1 + image % 5, artefacts=5)
        for reader in (1, 2)
        for image in range(20)
    ]  # fmt: skip
    found = analyse("s", rated)
    by_name = {each.attribute: each for each in found.ratings}
    nuclei = by_name["nuclei"]
    assert (nuclei.real.value, nuclei.synthetic.value) == (3.5, 2.5)
    assert nuclei.difference.value == -1
    assert nuclei.difference.by_image == pytest.approx((-1, -1))
    assert nuclei.shares_real == (0, 0, 0.5, 0.5, 0)
    assert by_name["stain"].difference.by_image != (0, 0)
    assert found.inter_rater is not None
    assert found.inter_rater.alpha_ratings["architecture"] is None
    assert found.inter_rater.alpha_ratings["stain"] == 1


def test_types_are_judged_where_one_is_known() -> None:
    guessed = [
        reading(1, image, 3, is_synthetic=bool(image % 2), type=None if image < 4 else "COAD",
                type_guess=("COAD", "LUAD", "unsure", "COAD")[image // 2 % 4])
        for image in range(36)
    ]  # fmt: skip
    real, synthetic = analyse("s", guessed).types
    assert (real.kind, real.num, synthetic.kind) == ("real", 16, "synthetic")
    assert (real.right.value, real.unsure.value) == (0.5, 0.25)
    assert real.right.by_image == pytest.approx((0.27, 0.73), abs=0.06)


def test_the_same_seed_gives_the_same_intervals() -> None:
    rng = np.random.default_rng(0)
    scored = [
        reading(1, image, int(rng.integers(1, 7)), is_synthetic=bool(image % 2))
        for image in range(30)
    ]
    assert analyse("s", scored, seed=3) == analyse("s", scored, seed=3)
    assert analyse("s", scored, seed=3) != analyse("s", scored, seed=4)


def full_study() -> StudyAnalysis:
    rng = np.random.default_rng(1)
    first = [
        reading(reader, image, int(np.clip(rng.normal(3 + image % 2 * reader / 2, 1.4), 1, 6)),
                is_synthetic=bool(image % 2), type="COAD",
                type_guess=("COAD", "unsure")[int(rng.integers(2))],
                **{k: int(rng.integers(1, 6)) for k in ("nuclei", "architecture")},
                stain=5, artefacts=4, seconds=float(rng.uniform(3, 20)))
        for reader in (1, 2, 3)
        for image in range(40)
    ]  # fmt: skip
    again = [
        reading(each.reader, each.image, each.score, is_synthetic=each.is_synthetic,
                is_repeat=True, type="COAD", type_guess="COAD", nuclei=3, architecture=3,
                stain=5, artefacts=4)
        for each in first if each.image < 8
    ]  # fmt: skip
    return analyse("Lung <b>& colon", first + again)


def test_json_holds_everything_and_no_nan() -> None:
    found = full_study()
    assert StudyAnalysis.model_validate(json.loads(found.model_dump_json())) == found
    assert not any(math.isnan(each.value) for each in found.mean_reader.values())


def test_page_is_one_file_with_plots_and_says_what_guessing_is() -> None:
    text = render_page(full_study())
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|<link(?! rel=\"icon\")", text)
    assert "Lung &lt;b&gt;&amp; colon" in text
    assert text.count("<svg") == 8
    assert "0.5 is guessing" in text
    assert "what guessing gives" in text
    for heading in ("The mean reader", "Ratings", "Tissue type", "Agreement"):
        assert f"<h2>{heading}</h2>" in text
    assert "nan" not in re.sub(r"<[^>]*>", " ", text).lower().split()


def test_the_legend_names_every_reader_within_the_drawing() -> None:
    drawn = roc([(f"reader {n}", [5] * 6, [5] * 6) for n in range(1, 41)], title="ROC")
    height = float(re.findall(r'viewBox="0 0 500 (\d+)"', drawn)[0])
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>reader (\d+)<', drawn)
    assert [int(number) for *_, number in places] == list(range(1, 41))
    assert len({(x, y) for x, y, _ in places}) == 40
    assert all(float(x) <= 430 and float(y) < height for x, y, _ in places)
    lines = re.findall(r'<path d="M[^"]*h18" (stroke="[^>]*?)/>', drawn)
    assert len(set(lines[:32])) == 32


def test_page_of_a_bare_study_leaves_out_what_was_not_asked() -> None:
    text = render_page(found_by(guesses, readers=1))
    for heading in ("Ratings", "Tissue type", "Agreement"):
        assert f"<h2>{heading}</h2>" not in text
    assert text.count("<svg") == 4


def test_table_holds_a_line_for_each_reader() -> None:
    lines = list(table(full_study()))
    assert sum(bool(re.match(r" +[123] +40 ", line)) for line in lines) == 3
    assert sum("with themselves" in line for line in lines) == 3
    assert any(line.startswith("between readers: Cohen") for line in lines)
