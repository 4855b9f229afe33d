"""A coordinator on a real (tiny) foundation: run, resume, export, and its command line."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from typer.testing import CliRunner

from crafts_core.adapters import merged_denoiser
from crafts_core.exchange import RoundRequest
from crafts_core.foundation import Foundation
from crafts_core.generator import Generator
from crafts_core.plan import Plan
from crafts_core.starting_point import initial_state
from crafts_core.state import State
from crafts_privacy.signing import create_signing_key, load_signing_key, sign, verify
from crafts_server import home_backup
from crafts_server.checkpoints import Checkpoint, CheckpointStore
from crafts_server.cli import app
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_server.errors import CheckpointError, HomeError
from crafts_server.export import averaged, export_generator, privacy_statement
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.probe import ProbeSize
from crafts_server.receipts import RoundReceipt
from crafts_server.registry import PlanRecord
from crafts_server.server_app import app as installed_app
from crafts_server.server_app import make_server_app
from support.fake_grid import FakeGrid, SiteFunction
from support.studies import received, reply_with
from support.summing_sites import summed_plan

pytestmark = pytest.mark.slow

NOW = Patience(poll_s=0.001, join_wait_s=0.0)
SMALL = ProbeSize(margin_tiles=4, margin_draws=1, step_tiles=2, step_draws=1)
RUNNER = CliRunner()


def tiny_plan(foundation: Foundation) -> Plan:
    return Plan.parse(
        {
            "study": {"name": "tiny", "foundation": foundation.manifest.hash, "seed": 1},
            "adapter": {
                "kind": "lora",
                "rank": 1,
                "targets": ["to_q", "to_v"],
                "first_factor": "random",
            },
            "stage": [{"name": "pretraining", "rounds": 2, "local_steps": 3, "learning_rate": 0.1}],
            "privacy": {
                "mechanism": "none",
                "max_grad_norm": 1.0,
                "sample_rate": 0.5,
                "tiles_per_patient": 4,
                "draws_per_tile": 1,
            },
            "aggregation": {"rule": "alignment_regularized", "min_sites": 2},
        }
    )


def nudging_site(name: str, seed: int, like: State) -> SiteFunction:
    def answer(content: RecordDict) -> RecordDict:
        request = RoundRequest.from_scalars(dict(content["request"]))
        generator = torch.Generator().manual_seed(seed + request.round)
        delta = {
            key: 0.05 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in received(content["adapter"], like).items()
            if key.endswith(f".{request.factor}")
        }
        return reply_with(request, name, delta)

    return answer


def grid(foundation: Foundation) -> FakeGrid:
    like = initial_state(foundation, tiny_plan(foundation).adapter, 0)
    sites = (nudging_site("aachen", 10, like), nudging_site("bern", 20, like))
    return FakeGrid(dict(enumerate(sites, start=1)))


def make_home(path: Path, foundation: Foundation) -> CoordinatorHome:
    """With two sites that have agreed on what ``reply_with`` declares."""
    home = CoordinatorHome.create(path, HomeConfig(foundation=str(foundation.path)))
    registry = home.registry()
    for name in ("aachen", "bern"):
        CohortSizes(registry).agree(name, 100)
    registry.close()
    return home


@pytest.fixture
def home(tmp_path: Path, foundation: Foundation) -> CoordinatorHome:
    return make_home(tmp_path / "home", foundation)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """One run that several tests look at."""

    home: CoordinatorHome
    plan: Plan
    coordinator: Coordinator
    sites: FakeGrid
    last: Checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, foundation: Foundation) -> FinishedRun:
    home = make_home(tmp_path_factory.mktemp("coordinator") / "home", foundation)
    plan, sites = tiny_plan(foundation), grid(foundation)
    coordinator = Coordinator(home, plan, foundation, patience=NOW, probe_size=SMALL)
    last = coordinator.run(sites)
    return FinishedRun(home=home, plan=plan, coordinator=coordinator, sites=sites, last=last)


def test_a_run_moves_the_adapter(finished: FinishedRun, foundation: Foundation) -> None:
    start = initial_state(foundation, finished.plan.adapter, finished.plan.study.seed)
    state = finished.last.state()
    assert finished.last.round == 2
    assert any(not torch.equal(tensor, start[name]) for name, tensor in state.items())
    assert [checkpoint.round for checkpoint in finished.coordinator.chain()] == [0, 1, 2]


def test_the_plan_travels_signed_by_the_home(finished: FinishedRun) -> None:
    sent = dict(finished.sites.requests[0][1]["plan"])
    verify(finished.home.public_key, sent["json"].encode(), sent["signature"])
    assert Plan.parse(json.loads(sent["json"])).hash == finished.plan.hash


def test_half_precision_on_the_wire_keeps_a_float32_adapter_at_the_coordinator(
    finished: FinishedRun,
) -> None:
    """Rounding the global adapter each round would swallow small updates."""
    assert finished.plan.transport.wire_dtype == "float16"
    state = torch.cat([tensor.flatten() for tensor in finished.last.state().values()])
    assert not torch.equal(state, state.half().float())


def test_a_coordinator_goes_on_from_a_backup_that_was_made_between_rounds(
    finished: FinishedRun, tmp_path: Path, foundation: Foundation
) -> None:
    home, plan = make_home(tmp_path / "home", foundation), tiny_plan(foundation)

    def back_up_once(receipt: RoundReceipt) -> None:
        if receipt.round == 1:
            home_backup.back_up(home, tmp_path / "b.tar", keys=True)

    values = {"patience": NOW, "probe_size": SMALL}
    Coordinator(home, plan, foundation, on_round=back_up_once, **values).run(grid(foundation))
    home_backup.put_back(tmp_path / "b.tar", tmp_path / "new")
    back = Coordinator(CoordinatorHome.open(tmp_path / "new"), plan, foundation, **values)
    assert [checkpoint.round for checkpoint in back.chain()] == [0, 1]
    assert back.run(grid(foundation)).manifest.state_hash == finished.last.manifest.state_hash


def test_the_server_app_runs_the_coordinator_it_was_made_for(
    home: CoordinatorHome, foundation: Foundation
) -> None:
    seen: list[int] = []
    coordinator = Coordinator(
        home,
        tiny_plan(foundation),
        foundation,
        patience=NOW,
        probe_size=SMALL,
        on_round=lambda receipt: seen.append(receipt.round),
    )
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    make_server_app(coordinator)(grid(foundation), context)
    assert seen == [1, 2]


def test_the_installed_server_app_finds_home_and_plan_in_its_run_configuration(
    home: CoordinatorHome, foundation: Foundation
) -> None:
    plan = tiny_plan(foundation)
    home.sign_plan(plan)
    values = {"coordinator-home": str(home.path), "plan-hash": plan.hash[:12]}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=values)
    installed_app(grid(foundation), context)
    with pytest.raises(HomeError, match="coordinator-home"):
        installed_app(
            grid(foundation),
            Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}),
        )


def test_a_plan_for_another_foundation_is_refused(
    home: CoordinatorHome, foundation: Foundation
) -> None:
    plan = tiny_plan(foundation)
    study = plan.study.model_copy(update={"foundation": "f" * 64})
    with pytest.raises(HomeError, match="the plan wants foundation ffff"):
        Coordinator(home, plan.model_copy(update={"study": study}), foundation)


def test_a_plan_of_a_version_that_read_it_otherwise_is_not_started_over(
    home: CoordinatorHome, foundation: Foundation
) -> None:
    values = json.loads(tiny_plan(foundation).to_json())
    del values["adapter"]["control_targets"]  # as if signed before there was such a key
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    signature = sign(load_signing_key(home.path / "signing.key"), text.encode())
    registry = home.registry()
    registry.add_plan(
        PlanRecord(
            hash="a" * 64, study="tiny", json=text, signature=signature, public_key=home.public_key
        )
    )
    with pytest.raises(HomeError, match="signed by a version that reads it otherwise"):
        Coordinator.open(home.path, "aaaa")
    assert len(registry.plans()) == 1
    registry.close()


def test_one_coordinator_at_a_time(home: CoordinatorHome) -> None:
    with home.exclusive(), pytest.raises(HomeError, match="another coordinator"), home.exclusive():
        pass


def test_creating_a_home_twice_keeps_its_key(home: CoordinatorHome) -> None:
    again = CoordinatorHome.create(home.path, HomeConfig())
    assert again.public_key == home.public_key
    assert again.config == home.config


def test_a_wrong_key_in_the_configuration_is_named(home: CoordinatorHome) -> None:
    (home.path / "coordinator.toml").write_text('fundation = "embedded"\n')
    with pytest.raises(HomeError, match="fundation: unknown key"):
        CoordinatorHome.open(home.path)


def test_the_privacy_statement_says_what_the_plan_promised(foundation: Foundation) -> None:
    plan = tiny_plan(foundation)
    assert "without differential privacy" in privacy_statement(plan, num_sites=1)
    private = plan.privacy.model_copy(
        update={"mechanism": "patient_dp", "target_epsilon": 8.0, "delta": 1e-4}
    )
    statement = privacy_statement(plan.model_copy(update={"privacy": private}), num_sites=3)
    assert statement.startswith("3 sites; each promises every patient")
    assert "epsilon at most 8 at delta 0.0001" in statement
    assert "by noise added at the site" in statement


def test_the_privacy_statement_says_who_may_not_collude() -> None:
    """Noise in shares protects less than noise at the site, and the card says so."""
    statement = privacy_statement(summed_plan(colluding_sites=2, min_sites=5), num_sites=5)
    assert "added at the site" not in statement
    assert "up to 2 of the sites together" in statement
    assert "against the coordinator" in statement


def test_init_prints_the_key_that_sites_must_trust(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["init", "--home", str(tmp_path / "new"), "--json"])
    assert result.exit_code == 0
    assert (
        json.loads(result.stdout)["public_key"] == CoordinatorHome.open(tmp_path / "new").public_key
    )


def plan_toml(foundation: Foundation) -> str:
    return f"""
[study]
name = "tiny"
foundation = "{foundation.manifest.hash}"
seed = 1
[adapter]
kind = "lora"
[[stage]]
name = "pretraining"
rounds = 2
local_steps = 3
learning_rate = 0.1
[privacy]
mechanism = "patient_dp"
target_epsilon = 8.0
delta = 1e-4
max_grad_norm = 1.0
sample_rate = 0.5
tiles_per_patient = 4
draws_per_tile = 1
[aggregation]
rule = "uniform"
min_sites = 2
"""


def test_plans_are_checked_and_signed(
    home: CoordinatorHome, foundation: Foundation, tmp_path: Path
) -> None:
    path, signed = tmp_path / "plan.toml", tmp_path / "signed.json"
    path.write_text(plan_toml(foundation))
    checked = RUNNER.invoke(app, ["plan", "check", str(path), "--json"])
    assert json.loads(checked.stdout)["target_epsilon"] == 8.0
    arguments = ["plan", "sign", str(path), "--home", str(home.path), "--out", str(signed)]
    assert RUNNER.invoke(app, arguments).exit_code == 0
    values = json.loads(signed.read_text())
    verify(home.public_key, values["json"].encode(), values["signature"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "check", "nowhere.toml"],
        ["runs", "list", "--home", "nowhere"],
        ["export", "some-run", "--out", "x", "--home", "nowhere"],
        ["foundation", "verify", "nowhere"],
    ],
)
def test_failures_are_one_line_and_exit_one(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("crafts-server: ")
    assert result.stderr.count("\n") == 1


def test_wrong_use_exits_two() -> None:
    assert RUNNER.invoke(app, ["plan", "sign"]).exit_code == 2


def test_the_moving_average_weighs_rounds_by_their_age(finished: FinishedRun) -> None:
    chain = finished.coordinator.chain()
    first, second = chain[1].state(), chain[2].state()

    average = averaged(chain, decay=0.25)

    for name in first:
        torch.testing.assert_close(average[name], 0.2 * first[name] + 0.8 * second[name])
    assert all(torch.equal(averaged(chain, decay=0.0)[name], second[name]) for name in second)
    with pytest.raises(CheckpointError, match="no committed round"):
        averaged(chain[:1], decay=0.25)


def test_rounds_before_its_stage_have_no_share_in_a_control_net(tmp_path: Path) -> None:
    create_signing_key(tmp_path / "key")
    store = CheckpointStore(tmp_path / "run", load_signing_key(tmp_path / "key"))
    # Two rounds of the denoiser, then two of the ControlNet, whose first factors never train.
    values = [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (2.0, 3.0), (2.0, 5.0)]
    parent = None
    for denoiser, control in values:
        state = {
            "layer.second": torch.tensor([denoiser]),
            "control.nuclei.layer.second": torch.tensor([control]),
            "control.nuclei.layer.first": torch.tensor([7.0]),
        }
        parent = store.write(
            run_id="run",
            plan_hash="0" * 64,
            parent=parent,
            state=state,
            server_state={},
            receipt=None,
        )

    average = averaged(store.chain(), decay=0.5)

    assert float(average["layer.second"]) == pytest.approx((1 / 8 + 2 / 4 + 2 / 2 + 2) / (15 / 8))
    assert float(average["control.nuclei.layer.second"]) == pytest.approx((3 / 2 + 5) / (3 / 2))
    assert float(average["control.nuclei.layer.first"]) == 7.0


def test_the_exported_generator_is_the_average_that_the_plan_asks_for(
    finished: FinishedRun, foundation: Foundation, tmp_path: Path
) -> None:
    chain = finished.coordinator.chain()
    aggregation = finished.plan.aggregation.model_copy(update={"ema_decay": 0.5})
    plan = finished.plan.model_copy(update={"aggregation": aggregation})

    export_generator(
        chain, plan=plan, foundation=foundation, directory=tmp_path / "out", lora=None, num_sites=2
    )

    unet = foundation.generator.denoiser
    expected = merged_denoiser(unet, plan.adapter, averaged(chain, decay=0.5)).state_dict()
    exported = Generator.from_directory(tmp_path / "out").denoiser.state_dict()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    last = merged_denoiser(unet, plan.adapter, chain[-1].state()).state_dict()
    assert any(not torch.equal(exported[name], last[name]) for name in last)


def test_a_run_is_listed_shown_and_exported_for_stock_diffusers(
    finished: FinishedRun, tmp_path: Path
) -> None:
    at_home = ["--home", str(finished.home.path)]
    (run,) = json.loads(RUNNER.invoke(app, ["runs", "list", "--json", *at_home]).stdout)
    assert (run["study"], run["status"], run["rounds"]) == ("tiny", "finished", 2)
    assert "  finished  2 of 2 rounds  " in RUNNER.invoke(app, ["runs", "list", *at_home]).stdout
    shown = RUNNER.invoke(app, ["runs", "show", run["run_id"], *at_home])
    assert "round 2 pretraining: margin" in shown.stdout
    out = tmp_path / "out"
    typo = ["export", run["run_id"], "--out", str(out), "--name-site", "brn", *at_home]
    assert "brn took no part in run" in RUNNER.invoke(app, typo).stderr
    assert not out.exists()
    exported = RUNNER.invoke(
        app, ["export", run["run_id"], "--out", str(out), "--name-site", "bern", *at_home]
    )
    assert exported.exit_code == 0, exported.stderr
    assert (out / "adapter.safetensors").is_file()
    assert (out / "generator" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    card = (out / "generator" / "README.md").read_text()
    assert "| sites | bern |" in card
    assert "2 sites; trained without differential privacy" in card
    record = json.loads((out / "generator" / "generator.json").read_text())
    assert (record["study"], record["rounds"]) == ("tiny", 2)
    assert record["privacy"].startswith("2 sites; trained without differential privacy")
    assert record["colours"] is None


def test_the_surface_grows_only_on_purpose() -> None:
    import typer

    commands = typer.main.get_command(app).commands
    surface = {
        f"{name} {sub}".strip()
        for name, command in commands.items()
        for sub in getattr(command, "commands", {"": None})
    }
    assert surface == {
        *("init", "serve", "train", "stop", "status", "export", "log show", "log verify"),
        "dashboard",
        *("plan new", "plan keys", "backup", "restore"),
        *("sites invite", "sites list", "sites resize", "sites revoke", "plan check", "plan sign"),
        *("plan roster", "runs list", "runs show", "runs draw", "pool add"),
        *("foundation build", "foundation import", "foundation verify"),
    }
