"""The report: a schema that others rely on, and a page that needs nothing but itself."""

import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from crafts_core.evaluation.baselines import ArmName
from crafts_core.evaluation.examiner import Gate
from crafts_core.evaluation.figures import Arm, Evaluation
from crafts_core.evaluation.judges import ClassShare
from crafts_core.evaluation.leakage import Attack, Leakage
from crafts_core.evaluation.memorisation import Memorisation
from crafts_core.evaluation.resampling import Interval
from crafts_core.evaluation.steering import FoundIn, Steering
from crafts_core.evaluation.table import cell, class_table, plain_text, shown_columns
from crafts_core.plan import Plan
from crafts_simulations.report import (
    Report,
    RoundReport,
    SamplePair,
    SiteReport,
    StudyReport,
    headline,
    study_report,
    write_report,
)
from support.studies import small_plan
from support.summing_sites import plan_of_updates, summed_plan

DOCS = Path(__file__).parents[2] / "docs" / "report.md"


def _arm(name: ArmName, **changes: object) -> Arm:
    """Of each figure another value, so that none can stand for another."""
    place = (
        "real", "generator", "recoloured_by_caption", "recoloured", "reconstruction", "foundation",
    ).index(name) + 1  # fmt: skip
    values: dict[str, object] = {"name": name, "n": 192, "frechet": 10.0 * place}
    for step, field in enumerate(("mmd2", "colour", "structure"), start=1):
        value = place * 0.1 + step * 0.001
        values |= {field: value, f"{field}_interval": Interval(value - 0.01, value + 0.01)}
    for step, field in enumerate(("shape_agreement", "colour_agreement", "drift"), start=4):
        value = place * 0.1 + step * 0.001
        values |= {field: value, f"{field}_interval": Interval(value - 0.01, value + 0.01)}
    values |= {"coverage": place * 0.1 + 0.007}
    return Arm.model_validate(values | changes)


def _evaluation(**changes: object) -> Evaluation:
    values: dict[str, object] = {
        "encoder": "embedded-orthogonal-256",
        "encoder_hash": "0" * 64,
        "metric": "mmd2",
        "n": 192,
        "n_heldout": 100,
        "heldout_patients": 20,
        "floor": 0.01,
        "floor_interval": Interval(0.0, 0.02),
        "distance_foundation": 0.4,
        "distance_foundation_interval": Interval(0.35, 0.45),
        "distance_generator": 0.1,
        "distance_generator_interval": Interval(0.08, 0.12),
        "frechet_foundation": 90.0,
        "frechet_generator": 40.0,
        "drift_foundation": 0.6,
        "drift_generator": 0.5,
        "arms": tuple(
            map(
                _arm,
                (
                    "real",
                    "reconstruction",
                    "foundation",
                    "recoloured",
                    "recoloured_by_caption",
                    "generator",
                ),
            )
        ),
        "judged_classes": ("colon", "lung"),
        "training_tiles": 900,
        "gate": Gate(own=0.7, wrong=-0.2, difference_interval=Interval(0.8, 1.0), patients=10),
        "not_measured": ("precision: <none>",),
    }
    return Evaluation.model_validate(values | changes)


def _leakage() -> Leakage:
    attack = Attack(
        name="loss",
        auc=0.52,
        auc_interval=Interval(0.45, 0.6),
        p_value=0.3,
        true_positive_rate=0.06,
        true_positive_rate_interval=Interval(0.0, 0.1),
    )
    copies = Memorisation(
        share_nearer_members=0.5, interval=Interval(0.4, 0.6), p_value=0.5, encoder="e"
    )
    return Leakage(
        patients=40,
        tiles_per_patient=2,
        num_images=64,
        false_positive_rate=0.05,
        attacks=(attack,),
        memorisation=copies,
    )


def _report(**changes: object) -> Report:
    rounds = tuple(
        RoundReport(
            round=number,
            stage="pretraining",
            factor="second",
            margin_before=0.1,
            margin_after=0.12,
            weights={"north": 0.6, "south": 0.4},
            gains={"north": 0.01, "south": None},
            refused={"<east>": "update holds NaN"},
            step=1.0,
            step_norm=0.3,
            trust_norm=0.02,
            bytes_down=1000,
            bytes_up=500,
            seconds=2.5,
        )
        for number in (1, 2)
    )
    sites = tuple(
        SiteReport(
            name=name,
            declared_patients=80,
            tiles=900,
            epsilon=7.9,
            epsilon_second_opinion=7.91,
            delta=1e-3,
            events=2,
            steps=20,
            noise_multiplier=1.1,
        )
        for name in ("north", "south")
    )
    study = StudyReport(
        name="demo",
        title="Two hospitals & one <generator>",
        plan_hash="1" * 64,
        foundation_hash="2" * 64,
        mechanism="patient_dp",
        target_epsilon=8.0,
        delta=1e-3,
        max_grad_norm=0.1,
        sample_rate=0.2,
        aggregation="alignment_regularized",
        weighed_by="declared noise and alignment",
        repeatable=False,
        adapter_parameters=4000,
    )
    values: dict[str, object] = {
        "created": datetime(2026, 1, 2, tzinfo=UTC),
        "seconds": 60.0,
        "versions": {"torch": "2"},
        "study": study,
        "rounds": rounds,
        "sites": sites,
        "evaluation": _evaluation(),
        "leakage": _leakage(),
    }
    return Report.model_validate(values | changes)


def _pairs() -> list[SamplePair]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    png = buffer.getvalue()
    return [SamplePair(label="KIRC", prompt="H&E, kidney", before=png, after=png)]


def test_the_json_reads_back_as_the_same_report(tmp_path: Path) -> None:
    write_report(_report(), _pairs(), tmp_path)
    assert Report.model_validate_json((tmp_path / "report.json").read_text()) == _report()


def test_the_json_has_the_fields_that_others_rely_on(tmp_path: Path) -> None:
    write_report(_report(), _pairs(), tmp_path)
    values = json.loads((tmp_path / "report.json").read_text())
    assert {"study", "rounds", "sites", "evaluation"} <= values.keys()
    needed = "stage margin_before margin_after weights step bytes_up bytes_down seconds"
    assert set(needed.split()) <= values["rounds"][0].keys()
    assert {"epsilon", "delta", "events"} <= values["sites"][0].keys()
    needed = (
        "encoder metric n floor floor_interval distance_foundation distance_foundation_interval "
        "distance_generator distance_generator_interval drift_foundation drift_generator arms"
    )
    assert set(needed.split()) <= values["evaluation"].keys()


def test_an_unknown_field_is_no_report() -> None:
    values = _report().model_dump(mode="json") | {"surprise": 1}
    with pytest.raises(ValidationError, match="surprise"):
        Report.model_validate(values)


@pytest.mark.parametrize(
    "model",
    [
        Report,
        StudyReport,
        RoundReport,
        SiteReport,
        Evaluation,
        Arm,
        Gate,
        Leakage,
        Attack,
        Memorisation,
        Steering,
        FoundIn,
    ],
)
def test_every_field_is_documented(model: type) -> None:
    documented = set(re.findall(r"`(\w+)`", DOCS.read_text()))
    assert set(model.model_fields) <= documented


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (small_plan(), "declared noise and alignment"),
        (small_plan(rule="by_patients"), "patients"),
        (summed_plan(), "patients"),
        (plan_of_updates(rule="alignment_regularized"), "declared noise"),
    ],
)
def test_the_report_says_what_weighed_the_hospitals(plan: Plan, words: str) -> None:
    assert study_report("title", plan, 1).weighed_by == words


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    write_report(_report(), _pairs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)


def test_names_cannot_inject_markup(tmp_path: Path) -> None:
    write_report(_report(), _pairs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "one &lt;generator&gt;" in page
    assert "<east>" not in page


def test_the_shape_judge_is_told_class_by_class(tmp_path: Path) -> None:
    """Of the rows that were judged alone; a class without images is empty."""
    shares = {"lung": ClassShare(0.41, Interval(0.3, 0.5)), "colon": ClassShare(0.62, None)}
    arms = (_arm("real", shape_by_class=shares), _arm("foundation"),
            _arm("generator", shape_by_class={"lung": ClassShare(0.27, None)}))  # fmt: skip
    evaluation = _evaluation(arms=arms)
    assert class_table(evaluation) == [
        ["", "real tiles of other patients", "shared generator"],
        ["colon", "0.620", ""],
        ["lung", "0.410 (0.300 to 0.500)", "0.270"],
    ]
    assert "shape judge: lung" in plain_text(evaluation)
    assert class_table(_evaluation()) == []
    write_report(_report(evaluation=evaluation), _pairs(), tmp_path)
    assert "Class by class" in (tmp_path / "report.html").read_text()
    assert Report.model_validate_json((tmp_path / "report.json").read_text()) == _report(
        evaluation=evaluation
    )


def test_a_condition_is_told_nucleus_by_nucleus(tmp_path: Path) -> None:
    between = Interval(0.4, 0.6)
    found = FoundIn(
        where="drawn", dice=0.513, dice_interval=between, found_again=0.417,
        found_again_interval=between, count_error=0.237, count_error_interval=None,
    )  # fmt: skip
    steering = Steering(
        modality="nuclei", tiles=8, loss_own=0.1, loss_other=0.2, share_easier_with_own=0.9,
        found=(found,),
    )  # fmt: skip
    write_report(_report(steering=(steering,)), _pairs(), tmp_path, [_pairs()[0].before])
    page = (tmp_path / "report.html").read_text()
    for told in ("drawn from its mask", "0.51 (0.40 to 0.60)", "0.42 (0.40 to 0.60)", "0.24"):
        assert told in page
    assert "what is drawn from these" in page


def test_the_headline_tells_colour_and_structure_apart() -> None:
    def said(**after: float) -> str:
        before = _arm("foundation", colour=0.4, structure=0.4)
        return headline(_evaluation(arms=(before, _arm("generator", **after))))

    assert "colours are 4.0 times closer" in said(colour=0.1, structure=0.2)
    assert "structure is 2.0 times closer" in said(colour=0.1, structure=0.2)
    assert "structure is no closer" in said(colour=0.1, structure=0.4)
    assert "colours are over ten times closer" in said(colour=-0.001, structure=0.2)


def test_the_page_shows_every_figure_of_every_arm_beside_its_remarks(tmp_path: Path) -> None:
    write_report(_report(), _pairs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    for arm in _evaluation().arms:
        for _, field in shown_columns(_evaluation()):
            assert f'<td class="n">{cell(arm, field)}</td>' in page
    assert "0.204 (0.194 to 0.214)" in page  # the generator's shape
    assert "chance is 0.50" in page
    assert "not measured: precision: &lt;none&gt;" in page
    assert "recoloured by caption" in page


def test_a_hundred_hospitals_can_be_read_on_paper(tmp_path: Path) -> None:
    """Whatever a colour or a pointer would say is in a table, too."""
    report = _report()
    names = [f"site-{number:03d}" for number in range(1, 101)]
    sites = tuple(report.sites[0].model_copy(update={"name": name}) for name in names)
    weights = [
        {name: (100 + sign * place) / 15_050 for place, name in enumerate(names, start=1)}
        for sign in (1, -1)
    ]
    rounds = tuple(
        entry.model_copy(update={"weights": each})
        for entry, each in zip(report.rounds, weights, strict=True)
    )
    write_report(_report(sites=sites, rounds=rounds), _pairs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    table = page[page.index("<h2>Hospitals</h2>") : page.index("<h2>Rounds</h2>")]
    rows = re.findall(r"<tr><td>(site-\d+)</td>(.*?)</tr>", table)
    assert [name for name, _ in rows] == names
    assert all('<td class="n">0.0066</td>' in row for _, row in rows), "the mean of both rounds"
    assert "100 hospitals, 0.0067 to 0.0133" in page
    assert "in the order of the table of hospitals" in page
    assert "on hover" not in page


def test_a_repeatable_run_says_in_capitals_that_it_is_not_private(tmp_path: Path) -> None:
    report = _report()
    study = report.study.model_copy(update={"repeatable": True})
    write_report(_report(study=study), _pairs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<strong>NOT PRIVATE</strong>" in page
    assert "within the promise" not in page
    assert "can tell only within" not in page


def test_a_run_without_privacy_says_so_and_draws_no_epsilon(tmp_path: Path) -> None:
    report = _report()
    sites = tuple(site.model_copy(update={"epsilon": None, "delta": None}) for site in report.sites)
    study = report.study.model_copy(
        update={"mechanism": "none", "target_epsilon": None, "delta": None}
    )
    write_report(_report(sites=sites, study=study), _pairs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "not private" in page
    assert "Spent according" not in page


def test_the_page_says_how_attacks_fared_and_does_without(tmp_path: Path) -> None:
    write_report(_report(), _pairs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "membership: loss" in page
    assert "0.52 (0.45 to 0.60)" in page
    write_report(_report(leakage=None), _pairs(), tmp_path)
    assert "membership" not in (tmp_path / "report.html").read_text()


def test_the_page_says_of_how_many_hospitals_the_ledger_is_within_the_promise(
    tmp_path: Path,
) -> None:
    """From the figures, with a delta that is not rounded down."""
    report = _report()
    target = report.study.target_epsilon
    study = report.study.model_copy(update={"delta": 1.491e-4})
    write_report(_report(study=study), _pairs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Every hospital&#39;s ledger is within the promise" in page
    assert "at delta 0.00015." in page
    first, *others = report.sites
    above = first.model_copy(update={"epsilon": target + 0.1})
    write_report(_report(sites=(above, *others)), _pairs(), tmp_path)
    said = f"The ledgers of only {len(others)} of {len(others) + 1} hospitals are within"
    assert said in (tmp_path / "report.html").read_text()
