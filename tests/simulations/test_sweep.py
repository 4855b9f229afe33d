"""Sweeps: arms and seeds from one file, runs that are kept, differences that are paired."""

import json
import os
import shutil
import signal
import threading
import time
import tomllib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from crafts_simulations import cli, sweep_run
from crafts_simulations.errors import ScenarioError
from crafts_simulations.report import Report
from crafts_simulations.run import run_scenario
from crafts_simulations.scenario import Scenario, load_scenario
from crafts_simulations.sites import TileSource
from crafts_simulations.sweep import Run, Sweep, SweepArm, load_sweep, scenario_of
from crafts_simulations.sweep_page import headline, render
from crafts_simulations.sweep_report import (
    Difference,
    Failure,
    SweepReport,
    SweepRow,
    compare,
    markdown,
)
from support.foundations import write_tiny_foundation
from support.scenarios import tile_source, tiles_scenario_values

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TWO_ARMS = """
scenario = "tiny.toml"
seeds = [3, 4]
baseline = "as it is"

[[arm]]
name = "as it is"

[[arm]]
name = "Small steps, by patients!"
stage = { learning_rate = 0.001 }
aggregation = { rule = "by_patients" }
"""


def parse(text: str) -> Sweep:
    return Sweep.model_validate(tomllib.loads(text))


def written(path: Path, values: dict[str, Any]) -> None:
    """A TOML file of a scenario's values; JSON's inline tables are close enough to TOML's."""

    def value(each: Any) -> str:
        if isinstance(each, dict):
            return "{" + ", ".join(f"{key} = {value(item)}" for key, item in each.items()) + "}"
        return json.dumps(each)

    lines = []
    for section, entries in values.items():
        for part in entries if isinstance(entries, list) else [entries]:
            lines.append(f"[[{section}]]" if isinstance(entries, list) else f"[{section}]")
            lines += [f"{key} = {value(item)}" for key, item in part.items()]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def base() -> Scenario:
    return load_scenario("real-tiles")


class TestFile:
    def test_every_combination_is_an_arm_beside_those_written_out(self) -> None:
        sweep = parse(
            TWO_ARMS
            + '[vary]\n"privacy.target_epsilon" = [1.0, 8.0]\n"aggregation.rule" = ["uniform"]\n'
        )
        assert [arm.name for arm in sweep.arms] == [
            "as it is",
            "Small steps, by patients!",
            "target epsilon 1.0, rule uniform",
            "target epsilon 8.0, rule uniform",
        ]
        assert sweep.arms[1].folder == "small-steps-by-patients"
        assert sweep.arms[2].changes == {
            "privacy": {"target_epsilon": 1.0},
            "aggregation": {"rule": "uniform"},
        }
        assert sweep.compared_with.name == "as it is"

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (('name = "as it is"', 'name = "As it is"'), "baseline: no arm has the name"),
            (
                ('name = "Small steps, by patients!"', 'name = "as it is"'),
                "'as it is' is there twice",
            ),
            (("[3, 4]", "[3, 3]"), "seed '3' is there twice"),
            (("[3, 4]", "[]"), "seeds"),
            (("stage =", "stages ="), "stages"),
            (("stage = { learning_rate = 0.001 }", "study = { seed = 1 }"), "study.seed"),
            (('"by_patients" }', '"uniform" }\n[vary]\n"tiles.seed" = [1, 2]'), "tiles.seed"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, tmp_path: Path, change: tuple[str, str], says: str
    ) -> None:
        path = tmp_path / "sweep.toml"
        path.write_text(TWO_ARMS.replace(*change))
        with pytest.raises(ScenarioError, match=says):
            load_sweep(path)

    def test_a_wrong_value_of_one_arm_is_named_before_anything_runs(self, tmp_path: Path) -> None:
        path = tmp_path / "sweep.toml"
        text = TWO_ARMS.replace('"tiny.toml"', '"real-tiles"').replace("0.001", "-1.0")
        path.write_text(text)
        with pytest.raises(ScenarioError, match=r"Small steps, by patients!.*learning_rate"):
            load_sweep(path)

    def test_an_arm_changes_all_stages_and_a_seed_all_draws(self, base: Scenario) -> None:
        sweep = parse(TWO_ARMS)
        found = scenario_of(sweep, base, sweep.arms[1], 12)
        assert {stage.learning_rate for stage in found.stage} == {0.001}
        assert found.aggregation.rule == "by_patients"
        assert found.tiles is not None
        assert {found.tiles.seed, found.study.seed, found.evaluation.seed} == {12}
        assert found.privacy == base.privacy
        assert not found.scenario.repeatable

    def test_a_seed_may_leave_tiles_as_they_are_dealt_and_repeat_the_noise(
        self, base: Scenario
    ) -> None:
        sweep = parse(TWO_ARMS.replace("seeds", 'seeded = ["study"]\nrepeatable = true\nseeds'))
        found = scenario_of(sweep, base, sweep.arms[0], 12)
        assert found.tiles == base.tiles
        assert (found.evaluation, found.study.seed) == (base.evaluation, 12)
        assert found.scenario.repeatable

    def test_some_arms_and_seeds_are_chosen_by_name(self) -> None:
        sweep = parse(TWO_ARMS)
        assert len(sweep.chosen((), ())) == 4
        assert sweep.chosen(["as it is"], ()) == {("as it is", 3), ("as it is", 4)}
        assert sweep.chosen(["as it is"], [4]) == {("as it is", 4)}
        with pytest.raises(ScenarioError, match="no arm 'as it was'; it has: as it is, Small"):
            sweep.chosen(["as it was"], ())
        with pytest.raises(ScenarioError, match="no seed 5; it has: 3, 4"):
            sweep.chosen((), [5])

    def test_an_arm_may_have_stages_of_its_own(self, base: Scenario) -> None:
        one = {"name": "pretraining", "rounds": 3, "local_steps": 1, "learning_rate": 0.2}
        arm = SweepArm(name="one stage", stages=[one], stage={"learning_rate": 0.1})
        (stage,) = scenario_of(parse(TWO_ARMS), base, arm, 12).stage
        assert (stage.name, stage.rounds, stage.learning_rate) == ("pretraining", 3, 0.1)
        wrong = arm.model_copy(update={"stages": [one | {"rounds": 0}]})
        with pytest.raises(ScenarioError, match=r"one stage.*rounds"):
            scenario_of(parse(TWO_ARMS), base, wrong, 12)

    def test_the_experiment_on_alignment_differs_in_its_stages_alone(self) -> None:
        sweep, runs = load_sweep(BENCHMARKS / "alignment.toml")
        assert [name for name, _ in runs][: len(sweep.arms)] == [arm.name for arm in sweep.arms]
        own = [found for (_, seed), found in runs.items() if seed == 7]
        assert len({each.model_copy(update={"stage": ()}).model_dump_json() for each in own}) == 1
        assert own[0].privacy.target_epsilon == 8.0
        trained = {
            sum(
                stage.rounds
                for stage in found.stage
                if not stage.is_release and not stage.is_retrieval
            )
            for found in runs.values()
        }
        assert trained == {12}

    def test_without_privacy_there_is_no_epsilon(self, base: Scenario) -> None:
        arm = parse(TWO_ARMS + '[[arm]]\nname = "bare"\nprivate = false\n').arms[2]
        assert scenario_of(parse(TWO_ARMS), base, arm, 1).privacy.mechanism == "none"

    def test_a_section_that_the_scenario_lacks_is_refused(self) -> None:
        drawn = load_scenario("quickstart")
        arm = parse(TWO_ARMS + '[[arm]]\nname = "dealt"\ntiles = { alpha = 9.0 }\n').arms[2]
        with pytest.raises(ScenarioError, match="no section tiles"):
            scenario_of(parse(TWO_ARMS), drawn, arm, 1)


class TestDifference:
    def test_one_arm_has_the_interval_of_a_paired_t_test(self) -> None:
        rng = np.random.default_rng(1)
        mine, its = rng.normal(size=6), rng.normal(size=6)
        found = Difference.of((mine - its).tolist(), num_arms=1)
        expected = stats.ttest_rel(mine, its).confidence_interval(0.9)
        assert found.mean == pytest.approx(float((mine - its).mean()))
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))

    def test_several_arms_hold_together(self) -> None:
        """Among ten arms without any effect all intervals hold 0 in at least 0.9 of sweeps."""
        rng = np.random.default_rng(2)
        held = 0
        for _ in range(400):
            baseline = rng.normal(size=5)
            arms = [rng.normal(size=5) - baseline for _ in range(10)]
            found = [Difference.of(arm.tolist(), num_arms=10) for arm in arms]
            held += all(each.low < 0 < each.high for each in found)  # type: ignore[operator]
        assert held / 400 > 0.88

    def test_one_seed_has_no_interval(self) -> None:
        found = Difference.of([0.25], num_arms=3)
        assert (found.mean, found.low, found.high) == (0.25, None, None)
        assert found.text == "+0.2500"
        assert not found.is_away_from_zero

    def test_what_leaves_out_zero_is_away_from_it(self) -> None:
        assert Difference(mean=0.1, low=0.05, high=0.2).is_away_from_zero
        assert not Difference(mean=0.1, low=-0.05, high=0.2).is_away_from_zero


class TestPage:
    def row(self, name: str, structure: tuple[float, float, float] | None) -> SweepRow:
        told = {}
        if structure is not None:
            mean, low, high = structure
            told = {"structure": Difference(mean=mean, low=low, high=high)}
        return SweepRow(
            name=name, epsilon=8.0, seeds=(1, 2), values={"structure": (0.1, 0.2)}, differences=told
        )

    def report(self, *rows: SweepRow) -> SweepReport:
        return SweepReport(
            scenario="tiny", seeds=(1, 2), baseline="plain", arms=(self.row("plain", None), *rows),
            beside=(), remarks=(),
        )  # fmt: skip

    def test_the_headline_names_what_differs_and_which_way(self) -> None:
        report = self.report(
            self.row("good", (-0.1, -0.2, -0.05)),
            self.row("bad", (0.1, 0.05, 0.2)),
            self.row("chance", (-0.1, -0.2, 0.1)),
        )
        assert headline(report) == (
            "“good” is nearer to real structure than “plain”; “bad” is farther than “plain”."
        )
        assert headline(self.report(self.row("chance", (-0.1, -0.2, 0.1)))) == (
            "No arm differs from “plain” in structure."
        )

    def test_markup_in_a_name_stays_text(self) -> None:
        page = render(self.report(self.row("<script>alert(1)</script>", (0.1, 0.0, 0.2))), {})
        assert "<script" not in page


def some_job(number: int, call: partial[Any]) -> Any:
    """Of a library, so that a process that begins anew finds it."""
    call.run = ("arm", number)  # type: ignore[attr-defined]
    return call


@pytest.mark.slow
def test_interrupting_waits_for_no_run() -> None:
    # Whoever starts tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    jobs = [some_job(number, partial(time.sleep, 90)) for number in range(4)]
    started = time.monotonic()
    ctrl_c = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    ctrl_c.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(sweep_run._at_once(jobs, 2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_runs_of_a_process_that_is_killed_have_failed_and_say_why() -> None:
    jobs = [some_job(number, partial(os._exit, 9)) for number in range(3)]
    told = dict(sweep_run._at_once(jobs, 1))
    assert set(told) == {("arm", 0), ("arm", 1), ("arm", 2)}
    for (_, seed), failure in told.items():
        assert isinstance(failure, Failure)
        assert failure.seed == seed
        assert "perhaps for want of memory" in failure.reason


class Swept(NamedTuple):
    """A sweep that ran, in a folder with its file, its tiles and its results."""

    folder: Path
    source: TileSource
    report: SweepReport

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def loaded(self, text: str) -> tuple[Sweep, dict[Run, Scenario]]:
        """Another file in the same folder."""
        (self.folder / "sweep.toml").write_text(text)
        return load_sweep(self.folder / "sweep.toml")

    def again(self, text: str = TWO_ARMS) -> SweepReport:
        """With perhaps another file."""
        sweep, scenarios = self.loaded(text)
        return sweep_run.run_sweep(sweep, scenarios, self.out, source=self.source)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("sweep")
    written(folder / "tiny.toml", tiles_scenario_values(write_tiny_foundation(folder / "tiny")))
    (folder / "sweep.toml").write_text(TWO_ARMS)
    source = tile_source(folder)
    sweep, scenarios = load_sweep(folder / "sweep.toml")
    report = sweep_run.run_sweep(sweep, scenarios, folder / "out", source=source)
    return Swept(folder, source, report)


@pytest.mark.slow
def test_a_sweep_says_what_differs(swept: Swept) -> None:
    out, report = swept.out, swept.report
    still, moved = report.arms
    assert len(still.values["structure"]) == len(moved.values["structure"]) == 2
    assert still.epsilon is not None
    assert not still.differences
    pairs = zip(moved.values["structure"], still.values["structure"], strict=True)
    expected = np.mean([mine - its for mine, its in pairs])
    assert moved.differences["structure"].mean == pytest.approx(float(expected))
    assert report.beside[0].name == "real tiles of other patients"
    assert not report.failures
    assert len(list(out.glob("runs/*/*/adapter.safetensors"))) == 4


@pytest.mark.slow
def test_what_is_finished_of_a_sweep_is_kept(swept: Swept) -> None:
    out = swept.out
    runs = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/adapter.safetensors")}
    (swept.folder / "sweep.toml").write_text(TWO_ARMS)
    command = ["sweep", str(swept.folder / "sweep.toml"), "--out", str(out)]
    again = CliRunner().invoke(cli.app, command)
    assert again.exit_code == 1, "its tiles are not named this time"
    said = " ".join(again.stderr.split())
    assert "arm 'as it is', seed 3: this scenario deals real tiles" in said
    assert "(and 3 more runs failed)" in said, "the others went on"
    assert "compares" not in said, "nothing was finished"
    assert swept.again() == swept.report
    assert SweepReport.model_validate_json((out / "sweep.json").read_bytes()) == swept.report
    assert 'href="runs/small-steps-by-patients/4/report.html"' in (out / "sweep.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in runs} == runs, "nothing was trained again"


@pytest.mark.slow
def test_other_tiles_are_another_sweep(swept: Swept) -> None:
    tile = next(swept.source.folder.glob("*.png"))
    before = tile.stat()
    os.utime(tile, (0, 0))
    try:
        with pytest.raises(ScenarioError, match="other tiles"):
            swept.again()
    finally:
        os.utime(tile, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
def test_an_arm_that_fails_leaves_a_page_of_the_others_with_its_reason(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That sites refuse: ``test_a_site_that_does_not_agree_is_named_and_the_others_go_on``."""
    refused = '[[arm]]\nname = "nobody agrees"\npolicy = { max_local_steps = 1 }\n'

    def run(scenario: Scenario, out: Path, **options: Any) -> Report:
        if "max_local_steps" in scenario.policy:
            raise ScenarioError("too many local steps")
        return run_scenario(scenario, out, **options)

    monkeypatch.setattr(sweep_run, "run_scenario", run)
    page = swept.out / "sweep.html"
    with pytest.raises(ScenarioError) as raised:
        swept.again(TWO_ARMS + refused)
    said = str(raised.value)
    assert said.startswith("arm 'nobody agrees', seed 3: ")
    assert "too many local steps" in said
    assert said.endswith(f"(and 1 more runs failed); {page} compares what finished")
    found = SweepReport.model_validate_json((swept.out / "sweep.json").read_bytes())
    assert found.arms == swept.report.arms
    assert [(each.arm, each.seed) for each in found.failures] == [
        ("nobody agrees", 3),
        ("nobody agrees", 4),
    ]
    text = page.read_text()
    assert "2 runs failed" in text
    assert "too many local steps" in text
    assert "runs/nobody-agrees" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_parallel", [1, pytest.param(2, marks=pytest.mark.exhaustive)], ids=["here", "elsewhere"]
)
def test_what_is_chosen_runs_and_is_compared_with_what_is_finished(
    swept: Swept, num_parallel: int
) -> None:
    """Here or in a process of its own, and compared with what ran before."""
    third = '[[arm]]\nname = "third"\naggregation = { rule = "uniform" }\n'
    sweep, scenarios = swept.loaded(TWO_ARMS + third)
    folder = swept.out / "runs" / "third"
    chosen = sweep.chosen(["third"], [4])
    found = sweep_run.run_sweep(
        *(sweep, scenarios, swept.out),
        chosen=chosen,
        source=swept.source,
        num_parallel=num_parallel,
    )
    assert [row.name for row in found.arms] == ["as it is", "Small steps, by patients!", "third"]
    assert found.arms[0] == swept.report.arms[0]
    assert found.arms[2].seeds == (4,)
    assert [path.name for path in folder.iterdir()] == ["4"]
    assert "third (only seed 4)" in markdown(found)
    shutil.rmtree(folder)  # the other tests count what is there


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["as it is", "Small steps, by patients!"])
def test_of_a_run_that_failed_the_pair_is_left_out(swept: Swept, missing: str) -> None:
    """Of two seeds one is left: a difference without an interval, and the row says so."""
    sweep = parse(TWO_ARMS)
    reports = {
        (arm.name, seed): Report.model_validate_json(
            (swept.out / "runs" / arm.folder / str(seed) / "report.json").read_bytes()
        )
        for arm in sweep.arms
        for seed in sweep.seeds
        if (arm.name, seed) != (missing, 3)
    }
    found = compare(sweep, reports, [Failure(arm=missing, seed=3, reason="<killed>")])
    still, moved = swept.report.arms
    (pair,) = (row.differences["structure"] for row in found.arms if row.differences)
    expected = moved.values["structure"][1] - still.values["structure"][1]
    assert (pair.mean, pair.interval) == (pytest.approx(expected), None)
    page = render(found, {})
    assert f"{missing} (only seed 4)" in markdown(found)
    assert f"{missing} (only seed 4)" in page
    assert "One seed says nothing about chance" in page
    assert "&lt;killed&gt;" in page


@pytest.mark.slow
def test_without_a_run_of_the_baseline_nothing_is_compared(swept: Swept) -> None:
    sweep = parse(TWO_ARMS)
    moved = sweep.arms[1]
    report = Report.model_validate_json(
        (swept.out / "runs" / moved.folder / "3" / "report.json").read_bytes()
    )
    failures = [Failure(arm="as it is", seed=seed, reason="killed") for seed in sweep.seeds]
    found = compare(sweep, {(moved.name, 3): report}, failures)
    assert [(row.name, row.differences) for row in found.arms] == [(moved.name, {})]
    assert headline(found) == ("No run of “as it is” finished: there is nothing to compare with.")
    assert "Against as it is" not in render(found, {})


PICKS = """
[[arm]]
name = "picks"
study = { captions = ["lung"] }
stages = [
  { name = "anchors", noise_multiplier = 0.2 },
  { name = "retrieval", public_steps = 4, learning_rate = 0.05, tiles_per_caption = 5 },
]
"""


def test_the_pool_is_given_to_the_arms_that_pick_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, object] = {}

    def run(_scenario: Scenario, out: Path, **options: object) -> Report:
        given[out.parent.name] = options["pool"]
        raise ScenarioError("seen")

    monkeypatch.setattr(sweep_run, "run_scenario", run)
    table, plan = tmp_path / "pool.csv", tmp_path / "sweep.toml"
    table.touch()
    words = ["sweep", str(plan), "--out", str(tmp_path / "out"), "--pool", str(table)]
    plan.write_text(TWO_ARMS.replace("tiny.toml", "quickstart").replace("[3, 4]", "[3]") + PICKS)
    told = CliRunner().invoke(cli.app, words)
    assert "seen" in told.stderr
    assert given == {"as-it-is": None, "small-steps-by-patients": None, "picks": table}
    plan.write_text(TWO_ARMS.replace("tiny.toml", "quickstart"))
    told = CliRunner().invoke(cli.app, words)
    assert "no arm has stage retrieval; leave out --pool" in " ".join(told.stderr.split())
