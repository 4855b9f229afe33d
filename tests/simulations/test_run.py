import json
import shutil
import tomllib
from functools import partial
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from dp_accounting import pld
from PIL import Image
from typer.testing import CliRunner

from crafts_client.home import SiteHome
from crafts_client.ingest.errors import IngestError
from crafts_core.errors import CraftsError
from crafts_core.evaluation.baselines import ArmName
from crafts_core.evaluation.figures import Arm, Evaluation
from crafts_core.foundation import Foundation
from crafts_privacy.ledger import EntryKind, Ledger
from crafts_server.errors import AggregationError
from crafts_simulations import cli, results
from crafts_simulations import run as simulation
from crafts_simulations.errors import ScenarioError, WorkspaceError
from crafts_simulations.report import Report
from crafts_simulations.scenario import parse_scenario
from crafts_simulations.sites import TileSource, heldout_store
from crafts_simulations.workspace import Workspace
from support.foundations import tiny_foundation
from support.scenarios import (
    tile_source,
    tiles_scenario_values,
    tiny_scenario,
    tiny_scenario_values,
    tiny_site,
)
from support.toml_text import toml_text

pytestmark = pytest.mark.slow
run_scenario = partial(simulation.run_scenario, num_workers=0)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return tiny_foundation(tmp_path_factory.mktemp("foundation") / "tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, foundation: Foundation) -> Path:
    """One whole run, shared by every test that only looks at it."""
    out = tmp_path_factory.mktemp("run") / "out"
    run_scenario(tiny_scenario(foundation.path), out)
    return out


@pytest.fixture(scope="module")
def report(finished: Path) -> Report:
    return Report.model_validate_json((finished / "report.json").read_bytes())


@pytest.fixture(scope="module")
def dealt(tmp_path_factory: pytest.TempPathFactory, foundation: Foundation) -> Report:
    """Tiles at three sites, and judges that learn from 16 of their 36."""
    path = tmp_path_factory.mktemp("dealt")
    scenario = parse_scenario(_few_to_learn_from(tiles_scenario_values(foundation.path)), "test")
    return run_scenario(scenario, path / "out", source=tile_source(path))


@pytest.fixture
def source(tmp_path: Path) -> TileSource:
    return tile_source(tmp_path)


@pytest.fixture
def values(foundation: Foundation) -> dict:
    return tiles_scenario_values(foundation.path)


def ledger_of(out: Path, name: str) -> Ledger:
    return Ledger(SiteHome.open(out / "sites" / name).ledger_path)


def test_everything_the_report_names_is_there(finished: Path) -> None:
    for name in (
        "report.html",
        "report.json",
        "adapter.safetensors",
        "generator/model_index.json",
        "samples/luad-after.png",
        "samples/sheet-before.png",
        "sites/north/ledger.db",
        "sites/south/ledger.db",
        "coordinator/registry.db",
    ):
        assert (finished / name).is_file(), name


def test_every_round_has_both_sites_and_both_factors(report: Report) -> None:
    assert [entry.stage for entry in report.rounds] == ["pretraining"] * 2 + ["alignment"] * 2
    assert [entry.factor for entry in report.rounds] == ["second", "first"] * 2
    for entry in report.rounds:
        assert entry.weights.keys() == {"north", "south"}
        assert sum(entry.weights.values()) == pytest.approx(1.0)


def test_the_reported_epsilon_is_dp_accountings_for_the_ledgers_events(
    finished: Path, report: Report
) -> None:
    for site in report.sites:
        accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
        for event in ledger_of(finished, site.name).events("main"):
            step = dp_accounting.PoissonSampledDpEvent(
                event.sample_rate, dp_accounting.GaussianDpEvent(event.noise_multiplier)
            )
            accountant.compose(step, event.steps)
        assert site.epsilon == pytest.approx(accountant.get_epsilon(1e-3), abs=1e-6)
        assert 7.9 < site.epsilon <= 8.0


def test_each_site_paid_once_per_round(finished: Path, report: Report) -> None:
    for site in report.sites:
        kinds = [entry.kind for entry in ledger_of(finished, site.name).entries()]
        assert kinds == [EntryKind.PLACED, *[EntryKind.RESERVED, EntryKind.COMMITTED] * 4]
        assert (site.events, site.steps) == (4, 8)


def test_no_site_has_a_held_out_patient(finished: Path) -> None:
    names = set()
    for name in ("north", "south", "north-heldout", "south-heldout"):
        table = (finished / "hospitals" / name / "slides.csv").read_text().splitlines()[1:]
        patients = {line.split(",")[1] for line in table}
        assert not names & patients
        names |= patients
    sites = {entry["patient"] for entry in _sources(finished / "sites" / "north")}
    assert all(patient.startswith("north-0") for patient in sites)


def test_the_pixels_of_a_site_stay_out_of_the_test_set(finished: Path) -> None:
    store = heldout_store(Workspace(finished))
    heldout = {image.tobytes() for image in store.read_images(np.arange(store.num_tiles))}
    site = SiteHome.open(finished / "sites" / "north")
    from crafts_core.tiles import TileStore

    tiles = TileStore.open(site.tile_store_path)
    assert not heldout & {image.tobytes() for image in tiles.read_images(range(tiles.num_tiles))}


def test_images_say_that_they_are_synthetic(finished: Path) -> None:
    with Image.open(finished / "samples" / "luad-after.png") as image:
        assert image.info["Synthetic"] == "true"


def test_run_again_nothing_is_spent_and_nothing_changes(
    finished: Path, foundation: Foundation, report: Report
) -> None:
    before = ledger_of(finished, "north").entries()

    again = run_scenario(tiny_scenario(foundation.path), finished)

    assert ledger_of(finished, "north").entries() == before
    assert (again.rounds, again.sites, again.evaluation) == (
        report.rounds,
        report.sites,
        report.evaluation,
    )


def test_another_scenario_is_refused_in_the_same_folder(
    finished: Path, foundation: Foundation
) -> None:
    with pytest.raises(WorkspaceError, match="another scenario, other options or other tiles"):
        run_scenario(tiny_scenario(foundation.path).changed(epsilon=4.0), finished)


def test_a_folder_with_something_else_in_it_is_left_alone(
    tmp_path: Path, foundation: Foundation
) -> None:
    (tmp_path / "thesis.doc").write_text("mine")

    with pytest.raises(WorkspaceError, match="not an empty folder"):
        run_scenario(tiny_scenario(foundation.path), tmp_path)


def test_stock_diffusers_draws_with_the_shared_generator(finished: Path) -> None:
    """That a stranger's process does, without this project: ``tests/core/test_export.py``."""
    pipeline = DiffusionPipeline.from_pretrained(finished / "generator")
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("lung tissue", num_inference_steps=2, height=32, width=32).images
    assert np.asarray(image).std() > 0


def test_interrupted_anywhere_the_same_command_goes_on(
    tmp_path: Path, source: TileSource, values: dict
) -> None:
    """Ctrl-C while reading tiles, in the third site's second round, in the measurement."""
    values["stage"][0]["rounds"] = 2
    scenario, out = parse_scenario(values, "test"), tmp_path / "out"
    for stop_at in ("site-2: reading tiles", "training, round 2 at site-3", "measuring images"):
        with pytest.raises(KeyboardInterrupt):
            run_scenario(scenario, out, source=source, progress=_stop_at(stop_at))

    report = run_scenario(scenario, out, source=source)

    assert [entry.round for entry in report.rounds] == [1, 2]
    for name in scenario.site_names:
        assert len(ledger_of(out, name).events("main")) == 2, "an interruption must cost nothing"


def test_a_site_that_does_not_agree_is_named_and_the_others_go_on(
    tmp_path: Path, source: TileSource, values: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hospital changes its own policy.toml after its data are in place."""
    scenario, out = parse_scenario(values, "test"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_scenario(scenario, out, source=source, progress=_stop_at("training"))
    policy = out / "sites" / "site-2" / "policy.toml"
    policy.write_text(policy.read_text().replace("max_epsilon = 8.0", "max_epsilon = 1.0"))
    monkeypatch.setattr(results, "evaluate", _no_evaluation)

    report = run_scenario(scenario, out, source=source)

    (entry,) = report.rounds
    assert entry.weights.keys() == {"site-1", "site-3"}
    assert "policy: the target epsilon is too high" in next(iter(entry.refused.values()))
    assert not ledger_of(out, "site-2").events("main")


def test_too_few_sites_stop_the_run_with_their_reasons(
    tmp_path: Path, source: TileSource, values: dict
) -> None:
    values["policy"] = {"max_local_steps": 1}

    with pytest.raises(AggregationError, match="too many local steps"):
        run_scenario(parse_scenario(values, "test"), tmp_path / "out", source=source)


def test_a_policy_key_that_does_not_exist_is_named(
    tmp_path: Path, source: TileSource, values: dict
) -> None:
    values["policy"] = {"max_epsilom": 1}

    with pytest.raises(ScenarioError, match="max_epsilom: unknown key"):
        run_scenario(parse_scenario(values, "test"), tmp_path / "out", source=source)


def test_a_missing_foundation_is_named(tmp_path: Path) -> None:
    with pytest.raises(CraftsError, match="nowhere"):
        run_scenario(tiny_scenario(tmp_path / "nowhere"), tmp_path / "out")


def test_a_tile_of_two_patients_comes_to_no_two_sites(
    tmp_path: Path, source: TileSource, values: dict
) -> None:
    shutil.copy(source.folder / "0-0.png", source.folder / "1-0.png")
    with pytest.raises(IngestError, match=r"line 4: 1-0\.png is the same image as 0-0\.png"):
        run_scenario(parse_scenario(values, "test"), tmp_path / "out", source=source)


def test_what_is_wrong_with_a_table_is_not_hidden_by_where_it_lies(source: TileSource) -> None:
    source.labels.write_text(source.labels.read_text().replace("\t7\t", "\t\t", 1))
    with pytest.raises(IngestError) as error:
        source.rows()
    assert error.value.problems == ("line 16: no patient",)


class TestRealTiles:
    def test_a_folder_of_tiles_becomes_three_sites_and_a_test_set(self, dealt: Report) -> None:
        assert [site.name for site in dealt.sites] == ["site-1", "site-2", "site-3"]
        assert sum(site.tiles for site in dealt.sites) == 36
        assert (dealt.evaluation.n_heldout, dealt.evaluation.heldout_patients) == (12, 6)

    def test_pooled_without_privacy_the_ruler_is_the_same_and_nothing_is_promised(
        self, tmp_path: Path, source: TileSource, values: dict, dealt: Report
    ) -> None:
        scenario = parse_scenario(_few_to_learn_from(values), "test")

        report = run_scenario(
            scenario.changed(private=False, num_sites=1), tmp_path / "out", source=source
        )

        (site,) = report.sites
        assert (site.epsilon, site.delta, site.noise_multiplier) == (None, None, 0.0)
        assert ledger_of(tmp_path / "out", "site-1").epsilon("main", 1e-3) == float("inf")
        _measured_alike(report, dealt)

    def test_a_site_that_does_not_take_part_keeps_its_patients_and_the_ruler_its_tiles(
        self, tmp_path: Path, source: TileSource, values: dict, dealt: Report
    ) -> None:
        values["scenario"]["participants"] = ["site-2"]
        values["aggregation"]["min_sites"] = 1

        scenario = parse_scenario(_few_to_learn_from(values), "test")

        report = run_scenario(scenario, tmp_path / "out", source=source)

        assert [site.name for site in report.sites] == ["site-2"]
        assert not (tmp_path / "out" / "sites" / "site-1" / "ledger.db").exists()
        _measured_alike(report, dealt)

    def test_tiles_and_scenario_must_fit(
        self, tmp_path: Path, source: TileSource, values: dict, foundation: Foundation
    ) -> None:
        with pytest.raises(ScenarioError, match="give --tiles"):
            run_scenario(parse_scenario(values, "test"), tmp_path / "a")
        with pytest.raises(ScenarioError, match="takes no --tiles"):
            run_scenario(tiny_scenario(foundation.path), tmp_path / "b", source=source)


def _few_to_learn_from(values: dict) -> dict:
    values["evaluation"]["num_training_tiles"] = 16
    return values


def _measured_alike(one: Report, other: Report) -> None:
    """What nobody trained has the same figures, judges and colour map included."""
    for name in ("real", "reconstruction", "foundation", "recoloured"):
        assert one.evaluation.arm(name) == other.evaluation.arm(name), name


class TestCommandLine:
    def run(self, *arguments: object):
        return CliRunner().invoke(cli.app, ["run", "--workers", "0", *map(str, arguments)])

    @pytest.fixture
    def file(self, tmp_path: Path, foundation: Foundation) -> Path:
        path = tmp_path / "tiny.toml"
        path.write_text(toml_text(tiny_scenario_values(foundation.path)))
        assert tomllib.loads(path.read_text()) == tiny_scenario_values(foundation.path)
        return path

    def test_json_is_the_report(self, finished: Path, file: Path, report: Report) -> None:
        done = self.run(file, "--out", finished, "--json")

        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["rounds"] == json.loads(report.model_dump_json())["rounds"]

    def test_the_result_is_two_lines(self, finished: Path, file: Path) -> None:
        done = self.run(file, "--out", finished)

        assert done.exit_code == 0
        assert done.stderr == ""
        assert len(done.stdout.splitlines()) == 2
        assert "report.html" in done.stdout

    @pytest.mark.parametrize(
        "words, asked",
        [
            ("", {"num_workers": 2, "num_trainers": 1, "ray": None}),
            ("--workers 0", {"num_workers": 0, "num_trainers": 1, "ray": None}),
            ("--workers 3", {"num_workers": 3, "num_trainers": 3, "ray": None}),
            ("--ray auto", {"num_workers": 2, "num_trainers": None, "ray": "auto"}),
            ("--ray h:1 --workers 4", {"num_workers": 4, "num_trainers": 4, "ray": "h:1"}),
        ],
    )
    def test_workers_read_and_train_and_unnamed_one_process_trains(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, asked: dict
    ) -> None:
        def run(*_: object, **given: object) -> Report:
            assert {name: given[name] for name in asked} == asked
            raise ScenarioError("seen")

        monkeypatch.setattr(simulation, "run_scenario", run)
        command = ["run", "quickstart", "--out", str(tmp_path / "out"), *words.split()]
        told = CliRunner().invoke(cli.app, command)
        assert told.stderr == "crafts-sim: seen\n"

    def test_a_failure_is_one_line_and_exit_1(self, tmp_path: Path) -> None:
        done = self.run("nonsense", "--out", tmp_path / "out")

        assert done.exit_code == 1
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("crafts-sim: no scenario nonsense")

    def test_a_full_disk_is_one_line_that_says_what_to_do(
        self, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Workspace, "claim", full)
        done = self.run(file, "--out", tmp_path / "out")

        assert done.exit_code == 1
        (line,) = done.stderr.splitlines()
        assert "No space left on device" in line
        assert "run the same command again" in line

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--epsilon", "1", "--no-privacy"],
            ["--epsilon", "0"],
            ["--sites", "0"],
            ["--tiles", "."],
            ["--unknown"],
        ],
    )
    def test_wrong_use_is_exit_2(self, tmp_path: Path, arguments: list[str]) -> None:
        done = self.run("quickstart", "--out", tmp_path / "out", *arguments)

        assert done.exit_code == 2
        assert not (tmp_path / "out").exists()


def _stop_at(stop_at: str):
    """Progress that presses Ctrl-C at the first news of one step."""

    def progress(what: str, done: int, total: int) -> None:
        if what == stop_at:
            raise KeyboardInterrupt

    return progress


def _sources(site: Path) -> list[dict]:
    return json.loads((site / "ingest.json").read_text())["sources"]


def _no_evaluation(*_: object) -> Evaluation:
    """The measurement is another test's subject."""

    def nowhere(name: ArmName) -> Arm:
        at = {"mmd2": 1.0, "colour": 1.0, "structure": 1.0, "frechet": 1.0}
        return Arm(name=name, n=1, **at, **{f"{key}_interval": (1.0, 1.0) for key in list(at)[:3]})

    return Evaluation(
        encoder="none",
        encoder_hash="",
        metric="mmd2",
        n=1,
        n_heldout=1,
        heldout_patients=1,
        floor=0.0,
        floor_interval=(0.0, 0.0),
        distance_foundation=1.0,
        distance_foundation_interval=(1.0, 1.0),
        distance_generator=1.0,
        distance_generator_interval=(1.0, 1.0),
        frechet_foundation=1.0,
        frechet_generator=1.0,
        drift_foundation=None,
        drift_generator=None,
        arms=(nowhere("foundation"), nowhere("generator")),
        judged_classes=(),
        training_tiles=None,
        gate=None,
        not_measured=(),
    )


@pytest.mark.network
@pytest.mark.exhaustive
def test_the_same_scenario_with_the_real_programs(values: dict, source, tmp_path: Path) -> None:
    """Coordinator and sites as processes with TLS; from the result on, everything is the same."""
    out = tmp_path / "out"
    scenario = parse_scenario(values, "t.toml")
    report = run_scenario(scenario, out, source=source, real_processes=True)
    assert [receipt.round for receipt in report.rounds] == [1]
    assert report.rounds[0].weights.keys() == {"site-1", "site-2", "site-3"}
    assert "site enrolled" in (out / "coordinator" / "audit.jsonl").read_text()
    assert "answered round=1" in (out / "logs" / "site-1.log").read_text()


SHARED_NOISE = {"trust": "distributed", "colluding_sites": 1, "sum_grid_bits": 20}


@pytest.mark.network
@pytest.mark.exhaustive
def test_a_study_of_sums_with_the_real_programs(values: dict, source, tmp_path: Path) -> None:
    """Keys, roster, words and masked vectors by TLS between processes; report as ever."""
    values["stage"] = [values["stage"][0] | {"rounds": 2, "local_steps": 1}]
    values["privacy"] |= SHARED_NOISE
    values["aggregation"] |= {"min_sites": 3, "secure_aggregation": True}
    out = tmp_path / "out"
    scenario = parse_scenario(values, "of sums")
    report = run_scenario(scenario, out, source=source, real_processes=True)
    everybody = {"site-1", "site-2", "site-3"}
    assert [receipt.weights.keys() for receipt in report.rounds] == [everybody] * 2
    for name in everybody:
        entries = ledger_of(out, name).entries()
        shares = [entry.share for entry in entries if entry.kind is EntryKind.COMMITTED]
        assert [share.members for share in shares if share is not None] == [3, 3]
    assert all(site.epsilon is not None and 0 < site.epsilon <= 8.0 for site in report.sites)


@pytest.mark.parametrize(
    "trust", ["distributed", pytest.param("site", marks=pytest.mark.exhaustive)]
)
def test_a_study_of_sums_runs_like_any_other(
    tmp_path: Path, foundation: Foundation, trust: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Homes, rosters, rounds, report: three hospitals whose noise is shared, or each its own."""
    monkeypatch.setattr(results, "evaluate", _no_evaluation)
    monkeypatch.setattr(results, "attack", lambda _study: None)
    values = tiny_scenario_values(foundation.path)
    values["site"].append(tiny_site("west", "BRCA", 3))
    if trust == "distributed":
        for stage in values["stage"]:
            stage["local_steps"] = 1
        values["privacy"] |= SHARED_NOISE
    values["aggregation"] |= {"min_sites": 3, "secure_aggregation": True}
    out = tmp_path / "out"
    report = run_scenario(parse_scenario(values, "of sums"), out)
    assert [len(each.weights) for each in report.rounds] == [3, 3, 3, 3]
    for site in report.sites:
        assert site.epsilon is not None
        assert 0 < site.epsilon <= 8.0
    for name in ("north", "south", "west"):
        entries = Ledger(SiteHome.open(Workspace(out).site(name)).ledger_path).entries()
        assert sum(entry.kind is EntryKind.COMMITTED for entry in entries) == 4
