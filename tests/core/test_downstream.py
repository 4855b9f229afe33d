"""What images add downstream: right ones help, wrong ones harm, nobody is asked what he taught."""

import json
import re
import stat
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from crafts_core.cli import app
from crafts_core.errors import CraftsError
from crafts_core.evaluation.downstream.drawing import requests_of, with_captions
from crafts_core.evaluation.downstream.figures import Score, verdict_of
from crafts_core.evaluation.downstream.measure import DownstreamConfig, examine
from crafts_core.evaluation.downstream.pool import (
    REAL,
    Arm,
    Part,
    Pool,
    Split,
    draw_split,
    lesson,
    usable,
)
from crafts_core.evaluation.downstream.questions import (
    NO,
    UNKNOWN,
    YES,
    answer,
    answers,
    in_words,
    phrases_of,
)
from crafts_core.evaluation.downstream.tasks import (
    Classification,
    Pretraining,
    Questions,
    Retrieval,
    fitting_penalty,
)
from crafts_core.evaluation.encoder import Features
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.evaluation.resampling import Interval
from crafts_core.foundation import Foundation
from crafts_core.generator_record import RECORD_NAME, GeneratorRecord
from support.foundations import write_tiny_pipeline

pytest.importorskip("sklearn", reason="pip install 'crafts-federated[evaluation]'")

CONFIG = DownstreamConfig(num_images=4, splits=4, num_bootstrap=200, pretraining_steps=1)
CAPTIONS = {
    "A": "H&E, lung, follicles",
    "B": "H&E, lung, regular crypts",
    "C": "H&E, colon, regular crypts",
}
EACH, DRAWN = 3, 30


def pool(*, patients: int = 12, swapped: bool = False) -> Pool:
    """Three classes of 12 patients with three tiles each, a variant of each, and 30 images each."""
    names = np.repeat(list(CAPTIONS), patients * EACH)
    drawn = np.repeat(list(CAPTIONS), DRAWN)
    whose = np.repeat(np.arange(len(CAPTIONS) * patients), EACH)
    blank = np.zeros((len(names), 1, 1, 3), np.uint8)
    real = Part(
        source="real",
        images_NHWC=blank,
        classes=names.tolist(),
        captions=[CAPTIONS[name] for name in names],
        patients=whose,
    )
    said = np.roll(drawn, DRAWN) if swapped else drawn
    images = Part(
        source="synthetic",
        generator="g",
        images_NHWC=np.zeros((len(drawn), 1, 1, 3), np.uint8),
        classes=said.tolist(),
        captions=[CAPTIONS[name] for name in said],
    )
    return Pool.of([real, replace(real, source="augmented"), images])


def looks(of: Pool, *, per_patient: float, seed: int = 0) -> Features:
    """Three features that tell the classes of honest rows, under what each patient looks like."""
    rng = np.random.default_rng(seed)
    honest = pool(patients=of.num_patients // 3).class_R
    patient_PD = per_patient * rng.normal(size=(of.num_patients, 3))
    own_RD = np.where(of.patient_R[:, None] < 0, 0.0, patient_PD[of.patient_R])
    class_RD = np.eye(3)[np.searchsorted(sorted(CAPTIONS), honest)]
    found: Features = class_RD + own_RD + 0.05 * rng.normal(size=own_RD.shape)
    return found


def found(scores: list[Score], kind: str, shot: int | None, measure: str = "") -> Score:
    (score,) = (
        each
        for each in scores
        if (each.arm, each.patients) == (kind, shot) and measure in ("", each.measure)
    )
    return score


class TestClassification:
    """The oracle: classes that images show without what hides them in one patient's tiles."""

    def scores(self, *, swapped: bool = False, config: DownstreamConfig = CONFIG) -> list[Score]:
        of = pool(swapped=swapped)
        task = Classification(pool=of, features_RD=looks(of, per_patient=0.5))
        return examine(of, [task], ["g"], config)

    def test_right_images_help_whoever_has_one_patient(self) -> None:
        scores = self.scores(config=CONFIG.model_copy(update={"splits": 10}))
        assert found(scores, "real", 1).value < 0.8
        both = found(scores, "both", 1)
        assert both.verdict == "helps"
        assert both.difference == pytest.approx(both.value - found(scores, "real", 1).value)
        assert found(scores, "synthetic", 1).verdict is None, "it adds nothing to real tiles"

    def test_images_of_other_classes_than_they_say_harm(self) -> None:
        scores = self.scores(swapped=True)
        assert found(scores, "both", None).verdict == "harms"
        assert found(scores, "synthetic", None).value < 1 / 3

    def test_a_seed_repeats_all_and_another_draws_other_patients(self) -> None:
        once, again = (self.scores() for _ in range(2))
        assert once == again
        assert once != self.scores(config=CONFIG.model_copy(update={"seed": 1}))

    def test_nothing_is_learnt_where_patients_are_all_there_is_to_learn(self) -> None:
        """Each patient has a look and a class at random: whoever knows his tiles knows theirs."""
        of = pool(patients=16)
        rng = np.random.default_rng(0)
        features_RD = rng.normal(size=(of.num_patients + 1, 40))[of.patient_R]
        task = Classification(pool=of, features_RD=features_RD)
        score = found(examine(of, [task], [], CONFIG), "augmented", None)
        assert score.chance == pytest.approx(1 / 3)
        assert abs(score.value - 1 / 3) < 0.12

    def test_variants_add_nothing_that_was_not_there(self) -> None:
        of = pool()
        features_RD = looks(of, per_patient=0.5)
        features_RD[of.source_R == "augmented"] = features_RD[of.source_R == "real"]
        scores = examine(of, [Classification(pool=of, features_RD=features_RD)], ["g"], CONFIG)
        score = found(scores, "augmented", None)
        assert score.difference == pytest.approx(0, abs=0.02)
        assert score.verdict == "makes no difference that could be seen"


class TestSplit:
    """A patient is on one side, with his tiles, their variants and his captions."""

    def own_captions(self) -> Pool:
        """Every patient says something of his own, and one image is drawn from each caption."""
        of = pool()
        said = np.asarray([f"caption of {patient}" for patient in of.patient_R])
        rows = np.flatnonzero(of.source_R == "synthetic")
        said[rows] = [f"caption of {n % of.num_patients}" for n in range(len(rows))]
        return replace(of, caption_R=said)

    @pytest.mark.parametrize("number", range(5))
    def test_who_is_asked_about_teaches_nobody(self, number: int) -> None:
        of = self.own_captions()
        split = draw_split(of, seed=0, number=number)
        tested = split.tested_rows(of)
        assert set(of.source_R[tested]) == {"real"}
        assert set(of.class_R[tested]) == set(CAPTIONS)
        for arm in (REAL, Arm("augmented"), Arm("synthetic", "g"), Arm("both", "g")):
            for shot in (1, 3, None):
                rows = lesson(of, split, arm, shot).rows
                assert not set(of.patient_R[rows]) & set(split.tested.tolist())
                assert not set(of.caption_R[rows]) & set(of.caption_R[tested])

    def test_a_split_with_a_patient_on_both_sides_is_refused(self) -> None:
        with pytest.raises(ValueError, match="1 patients are on both sides"):
            Split(number=0, tested=np.array([1, 2]), taught={"A": np.array([2, 3])})

    def test_few_patients_are_the_first_of_more(self) -> None:
        of = pool()
        split = draw_split(of, seed=0, number=0)
        one, four = (set(lesson(of, split, REAL, shot).rows.tolist()) for shot in (1, 4))
        assert one < four
        assert (len(one), len(four)) == (3 * EACH, 3 * 4 * EACH)

    def test_parts_of_a_lesson_count_the_same(self) -> None:
        """And all lessons of a shot weigh the same, so that none is regularised less."""
        of = pool()
        split = draw_split(of, seed=0, number=0)
        for arm in (Arm("augmented"), Arm("both", "g")):
            learnt = lesson(of, split, arm, 1)
            is_real_L = of.source_R[learnt.rows] == "real"
            assert learnt.weight_L[is_real_L].sum() == pytest.approx(learnt.weight_L.sum() / 2)
        for arm in (REAL, Arm("augmented"), Arm("synthetic", "g"), Arm("both", "g")):
            assert lesson(of, split, arm, 1).weight_L.sum() == pytest.approx(3 * EACH)

    def test_classes_of_a_part_count_the_same(self) -> None:
        """However many tiles a class has: images are balanced, which alone would look like help."""
        of = pool()
        rows = np.flatnonzero((of.class_R != "A") | (np.arange(len(of.class_R)) % EACH == 0))
        fewer = Pool(**{field.name: getattr(of, field.name)[rows] for field in fields(of)})
        split = draw_split(fewer, seed=0, number=0)
        for arm in (REAL, Arm("augmented"), Arm("both", "g")):
            learnt = lesson(fewer, split, arm, 1)
            for source in set(fewer.source_R[learnt.rows]):
                is_of_L = fewer.source_R[learnt.rows] == source
                shares = [
                    learnt.weight_L[is_of_L & (fewer.class_R[learnt.rows] == name)].sum()
                    for name in CAPTIONS
                ]
                assert shares == pytest.approx([sum(shares) / 3] * 3)

    def test_a_patient_of_several_classes_is_on_one_side(self) -> None:
        of = pool()
        shared = replace(of, patient_R=np.where(of.patient_R < 0, -1, of.patient_R % 18))
        split = draw_split(shared, seed=0, number=0)
        assert all(len(patients) for patients in split.taught.values())
        assert set(shared.class_R[split.tested_rows(shared)]) == set(CAPTIONS)

    def test_images_of_a_class_may_not_all_be_from_captions_of_others(self) -> None:
        of = self.own_captions()
        said = np.where(of.source_R == "synthetic", "nobody's", of.caption_R)
        with pytest.raises(CraftsError, match=r"g: no image of 'A' is left .* \(--num\)"):
            lesson(
                replace(of, caption_R=said),
                draw_split(of, seed=0, number=0),
                Arm("synthetic", "g"),
                None,
            )


def test_a_penalty_is_chosen_by_patients_and_not_by_tiles() -> None:
    """Each patient has a look of its own, and twenty tiles of it: what tells it, tells it alone."""
    rng = np.random.default_rng(0)
    patient_L = np.repeat(np.arange(6), 20)
    image_LE = rng.normal(size=(6, 8))[patient_L] + 0.01 * rng.normal(size=(120, 8))
    text_LE = rng.normal(size=(6, 4))[patient_L]
    even_L = np.ones(120)
    assert fitting_penalty(image_LE, text_LE, even_L, patient_L) == 10.0
    assert fitting_penalty(image_LE, text_LE, even_L, np.arange(120)) < 10.0
    nobodys = np.full(120, -1)  # images of a generator: each its own
    assert fitting_penalty(image_LE, text_LE, even_L, nobodys) < 10.0
    assert fitting_penalty(image_LE, text_LE, even_L, np.zeros(120, dtype=np.int64)) == 10.0


def test_a_penalty_errs_least_by_a_slow_loop() -> None:
    rng = np.random.default_rng(1)
    image_LE, text_LE = rng.normal(size=(10, 3)), rng.normal(size=(10, 2))
    weight_L, patient_L = rng.uniform(0.5, 2.0, size=10), np.repeat(np.arange(5), 2)
    errors = {}
    for penalty in (0.001, 0.01, 0.1, 1.0, 10.0):
        total = 0.0
        for left in range(5):
            kept = patient_L != left
            scale = weight_L[kept, None] / weight_L[kept].sum()
            mid_E, mid_T = (scale * image_LE[kept]).sum(0), (scale * text_LE[kept]).sum(0)
            x_LE, y_LT = image_LE[kept] - mid_E, text_LE[kept] - mid_T
            gram = x_LE.T @ (weight_L[kept, None] * x_LE) + penalty * np.eye(3)
            slope = np.linalg.solve(gram, x_LE.T @ (weight_L[kept, None] * y_LT))
            off = (image_LE[~kept] - mid_E) @ slope + mid_T - text_LE[~kept]
            total += float(weight_L[~kept] @ (off**2).sum(1))
        errors[penalty] = total
    found = fitting_penalty(image_LE, text_LE, weight_L, patient_L)
    assert found == min(errors, key=lambda each: errors[each])


@pytest.mark.slow
def test_captions_are_found_by_a_head_that_was_taught_the_way() -> None:
    """Images are embedded a rotation away from their captions, which only a lesson can undo."""
    for swapped in (False, True):
        of = pool(swapped=swapped)
        rng = np.random.default_rng(1)
        text_RE = np.eye(3)[np.searchsorted(sorted(CAPTIONS), of.class_R)]
        turned_RE = np.roll(looks(of, per_patient=0.3), 1, axis=1)
        task = Retrieval(
            pool=of, image_RE=turned_RE + 0.1 * rng.normal(size=turned_RE.shape), text_RE=text_RE
        )
        scores = examine(of, [task], ["g"], CONFIG)
        measure = "caption of an image, R@1"
        assert found(scores, "untrained", None, measure).value < 0.2
        assert found(scores, "real", None, measure).value > 0.9
        assert found(scores, "real", None, measure).chance == pytest.approx(1 / 3)
        told = found(scores, "synthetic", None, measure)
        assert told.value < 0.1 if swapped else told.value > 0.9
        k = {each.measure for each in scores}
        assert k == {measure, *(f"image of a caption, R@{k}" for k in (1, 5, 10))}


class TestQuestions:
    """What captions say is asked, what they are silent about is not."""

    @pytest.mark.parametrize(
        ("caption", "phrase", "expected"),
        [
            ("H&E, normal lung", "lung", YES),
            ("H&E, lung adenocarcinoma, lung", "normal lung", NO),
            ("H&E, colon, glands with lumina", "glands with lumina", YES),
            ("H&E, colon, glands with lumina", "papillae", NO),
            ("H&E, colon, high grade nuclei", "papillae", UNKNOWN),
            ("H&E, colon, glands with lumina", "low grade nuclei", UNKNOWN),
            ("H&E, colon, glands with lumina", "necrosis", NO),
            ("H&E, colon", "necrosis", UNKNOWN),
        ],
    )
    def test_silence_is_not_no(self, caption: str, phrase: str, expected: int) -> None:
        assert answer(caption, phrase) == expected

    def test_asked_is_what_several_patients_answer_either_way(self) -> None:
        """A class and the organ that is always with it are one question; of one patient is none."""
        captions = ["H&E, sarcoma, soft tissue"] * 4 + ["H&E, thymoma, thymus"] * 5 + ["H&E, eye"]
        assert phrases_of(captions, np.arange(10)) == ["thymoma", "sarcoma"]
        assert in_words("lung") == "Does this tile show lung?"

    def task(self, of: Pool) -> Questions:
        phrases = ["colon", "crypts"]
        return Questions(
            pool=of,
            image_RE=looks(of, per_patient=0.3) @ np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
            - 0.5,
            question_QE=np.eye(2),
            answer_RQ=answers(of.caption_R.tolist(), phrases),
        )

    def test_right_images_teach_and_wrong_ones_mislead(self) -> None:
        of = pool()
        scores = examine(of, [self.task(of)], ["g"], CONFIG)
        assert all(found(scores, kind, None).value > 0.85 for kind in ("real", "synthetic"))
        assert found(scores, "real", None).chance == 0.5
        of = pool(swapped=True)
        wrong = found(examine(of, [self.task(of)], ["g"], CONFIG), "synthetic", None)
        assert wrong.value < 0.2
        assert wrong.difference_interval is not None
        assert wrong.difference_interval.high < -0.5

    def test_who_knows_only_which_answer_is_frequent_is_right_half_of_the_time(self) -> None:
        """Both questions are answered no twice as often as yes."""
        of = pool()
        answer_RQ = answers(of.caption_R.tolist(), ["colon", "follicles"])
        blind = replace(self.task(of), image_RE=np.ones((len(of.class_R), 2)), answer_RQ=answer_RQ)
        scores = examine(of, [blind], ["g"], CONFIG)
        assert {each.value for each in scores} == {0.5}

    def test_a_lesson_does_not_teach_to_say_what_is_frequent(self) -> None:
        of = pool()
        rng = np.random.default_rng(0)
        guessing = replace(
            self.task(of),
            image_RE=rng.normal(size=(len(of.class_R), 2)),
            answer_RQ=answers(of.caption_R.tolist(), ["colon", "follicles"]),
        )
        (exam,) = guessing.sit(draw_split(of, seed=0, number=0), Arm("augmented"), [None])
        is_yes = exam.marks.group_N % 2 == 1
        assert 0.3 < exam.marks.is_right_N[is_yes].mean() < 0.7


def test_the_network_that_saw_nothing_is_asked_too() -> None:
    of = pool()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (len(of.class_R), 32, 32, 3), dtype=np.uint8)
    task = Pretraining(pool=replace(of, images_RHWC=images), steps=1, seed=0)
    split = draw_split(of, seed=0, number=0)
    sat = {kind: list(task.sit(split, Arm(kind, "g"), [1, None])) for kind in task.kinds}
    assert [exam.shot for exam in sat["untrained"]] == [1, None]
    marks = {kind: exams[1].marks.is_right_N.tolist() for kind, exams in sat.items()}
    assert len({tuple(each) for each in marks.values()}) > 1


def test_a_verdict_needs_the_whole_interval() -> None:
    unseen = "makes no difference that could be seen"
    assert verdict_of("both", Interval(0.01, 0.2)) == "helps"
    assert verdict_of("both", Interval(-0.01, 0.2)) == unseen
    assert verdict_of("augmented", Interval(-0.2, -0.01)) == "harms"
    assert verdict_of("synthetic", Interval(0.01, 0.2)) is None
    assert verdict_of("real", None) is None


class TestRealTiles:
    """What cannot be split is a sentence."""

    def tiles(self, *counts: int, says_patients: bool = True, captions: bool = False) -> RealTiles:
        labels = [f"class {n}" for n, count in enumerate(counts) for _ in range(count)]
        images_NHWC = np.zeros((sum(counts), 32, 32, 3), np.uint8)
        images_NHWC[:, 0, 0, 0] = np.arange(sum(counts))
        return RealTiles(
            images_NHWC=images_NHWC,
            patients=np.asarray([str(n) for n in range(sum(counts))]),
            captions=[f"{label}, {n % 2}" if captions else "" for n, label in enumerate(labels)],
            labels=labels,
            says_patients=says_patients,
        )

    def test_too_few_patients_or_classes(self) -> None:
        with pytest.raises(CraftsError, match=r"two classes .* of at least 4 patients.* 1 of 2"):
            usable(self.tiles(5, 3), Path("real"))
        with pytest.raises(CraftsError, match="nobody says whose the images are"):
            usable(self.tiles(5, 5, says_patients=False), Path("real"))

    def test_a_class_of_few_patients_is_left_out_and_counted_without_its_name(self) -> None:
        kept, told = usable(self.tiles(5, 3, 4), Path("real"))
        assert set(kept.classes) == {"class 0", "class 2"}
        assert told == ["1 of 3 classes (3 tiles): fewer than 4 patients each"]

    def test_a_tile_that_two_patients_have_is_left_out(self) -> None:
        """It would teach, and be asked about; one patient may have it twice."""
        tiles = self.tiles(6, 6)
        tiles.images_NHWC[1] = tiles.images_NHWC[0]
        tiles.images_NHWC[8] = tiles.images_NHWC[7]
        tiles.patients[8] = tiles.patients[7]
        kept, told = usable(tiles, Path("real"))
        assert set(kept.patients) == set(tiles.patients) - {"0", "1"}
        assert len(kept) == 10
        assert told == ["2 tiles: several patients have the same pixels"]

    def test_labels_that_we_know_are_captions(self) -> None:
        tiles = replace(self.tiles(4, 4), labels=["LUAD"] * 4 + ["normal lung"] * 4)
        assert set(with_captions(tiles).captions) == {
            "H&E, lung adenocarcinoma, lung",
            "H&E, normal lung",
        }
        with pytest.raises(
            CraftsError, match=r"no captions to draw from: .*; add a column caption"
        ):
            with_captions(self.tiles(4, 4))

    def test_each_class_is_drawn_from_its_own_captions(self) -> None:
        asked = requests_of(self.tiles(8, 8, captions=True), num=6, seed=0)
        assert sum(request.count for name, request in asked if name == "class 0") == 6
        assert all(request.prompt.startswith(name) for name, request in asked)


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A table of two classes of five patients with two tiles each."""
    rng, rows = np.random.default_rng(0), []
    for patient in range(10):
        for tile in range(2):
            name = f"{patient}-{tile}.png"
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) // (1 + patient % 2)
            Image.fromarray(pixels).save(tmp_path / name)
            label = ("LUAD", "normal lung")[patient % 2]
            rows.append({"file": name, "label": label, "patient": f"p{patient}"})
    path = tmp_path / "tiles.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def generator(tmp_path: Path, foundation: Foundation) -> Path:
    """An export that was trained from the tiny foundation."""
    path = write_tiny_pipeline(tmp_path / "mine", seed=1)
    record = GeneratorRecord(
        study="s",
        plan_hash="0" * 64,
        rounds=1,
        foundation="tiny",
        foundation_hash=foundation.manifest.hash,
        privacy="epsilon 8",
    )
    (path / RECORD_NAME).write_text(record.model_dump_json())
    return path


def run(foundation: Foundation, *words: object) -> tuple[int, str, str]:
    options = ["--foundation", foundation.path, "--encoder", "orthogonal", "--num", 4]
    options += ["--seeds", 2, "--pretraining-steps", 1, "--mpp", 1]
    asked = ["evaluate", "downstream", *map(str, [*words, *options])]
    result = CliRunner().invoke(app, asked)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
def test_the_program_tells_draws_once_and_writes_a_page(
    foundation: Foundation, generator: Path, real: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, told, error = run(foundation, generator, "--real", real, "--out", out)
    assert code == 0, error
    assert "Classification of tiles, balanced accuracy, all patients; chance 0.50" in told
    assert re.search(r"real \+ images of mine +0\.\d{3}  [+-]0", told)
    assert "Adding images of public foundation to real tiles of 1 patient a class " in told
    pages = [out / "downstream.html", out / "downstream.json"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in pages] == [0o600] * 2
    page = pages[0].read_text()
    assert page.count("<svg") == 8
    assert "epsilon 8" in page
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="', page)
    drawn = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(drawn) == 2 * 2 * 4
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in drawn} == {0o700}
    code, again, error = run(foundation, generator, "--real", real, "--out", out, "--json")
    assert code == 0, error
    assert json.loads(again) == json.loads((out / "downstream.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == drawn
    assert {each["task"] for each in json.loads(again)["scores"]} == {
        "classification", "retrieval", "pretraining", "questions",
    }  # fmt: skip


@pytest.mark.slow
def test_another_generator_stands_beside_and_a_stranger_to_the_foundation_is_named(
    foundation: Foundation, real: Path, tmp_path: Path
) -> None:
    paths = [write_tiny_pipeline(tmp_path / name / "generator", seed=2) for name in ("a", "b")]
    words = [paths[0], "--against", paths[1], "--real", real, "--json"]
    code, told, error = run(foundation, *words)
    assert code == 0, error
    result = json.loads(told)
    assert [each["generator"] for each in result["generators"]] == [str(path) for path in paths]
    assert any("nothing was trained from" in line for line in result["not_measured"])


def test_what_cannot_be_measured_is_one_line(
    foundation: Foundation, real: Path, tmp_path: Path
) -> None:
    rows = real.read_text().splitlines()
    real.write_text("\n".join(rows[:6]))
    code, _, error = run(foundation, foundation.path, "--real", real)
    assert code == 1
    assert error.strip().splitlines()[-1].startswith(f"crafts: {real}: expected two classes")


def test_what_cannot_be_split_is_told_before_anything_is_drawn(
    foundation: Foundation, real: Path, tmp_path: Path
) -> None:
    """All patients of the third class have another one, too: some splits put them on one side."""
    rows = [json.loads(line) for line in real.read_text().splitlines()][:16]
    for row in rows:
        row["label"] = {"LUAD": "LUAD", "normal lung": "LUSC"}[row["label"]]
        if row["file"] in ("0-0.png", "1-0.png", "2-0.png", "3-0.png"):
            row["label"] = "normal lung"
    real.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    words = ["evaluate", "downstream", foundation.path, "--real", real, "--out", out]
    words += ["--foundation", foundation.path, "--encoder", "orthogonal", "--seeds", 300]
    result = CliRunner().invoke(app, [*map(str, words), "--mpp", "1"])
    assert result.exit_code == 1
    assert "no way was found to put patients of" in result.stderr
    assert not out.exists()
