import csv
import itertools
import json
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from crafts_client import site_audit
from crafts_client.cli import app
from crafts_client.home import SiteHome
from crafts_client.ingest.deidentify import Salt
from crafts_client.site import Site
from crafts_client.training_audit import TrainingAudit, TrainingCheck
from crafts_core.exchange import global_norm
from crafts_core.foundation import embedded_path, load
from crafts_core.plan import Plan
from crafts_core.plan_sections import AdapterConfig
from crafts_core.plan_targets import suggested_adapter
from crafts_core.public_update import PublicUpdateConfig
from crafts_core.starting_point import initial_state
from crafts_core.tiles import TileStore, TileStoreError
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.accounting import PrivacyEvent, epsilon
from crafts_privacy.audit import audit
from crafts_privacy.ledger import Ledger
from crafts_privacy.noise import ExactNoise, GridNoise
from crafts_simulations.small_study import write_random_store
from support.sites import make_site_home, plan_values, write_plan

pytestmark = pytest.mark.slow


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator) -> SiteHome:
    return make_site_home(tmp_path / "site", foundation, coordinator.public_key)


def options(command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


def test_a_new_site_takes_where_the_embedded_foundation_starts(tmp_path: Path) -> None:
    """Its limit once was under that of a plan that nobody had changed, and each round failed."""
    run("init", "--name", "north", "--patients", 100, "--home", tmp_path / "site")
    policy, foundation = SiteHome.open(tmp_path / "site").policy, load(embedded_path())
    little_work = PublicUpdateConfig(num_shifts=2, draws_per_tile=1, max_tiles=4)
    for values in ({"kind": "lora"}, suggested_adapter(embedded_path())):
        adapter = AdapterConfig.model_validate(values)
        start = initial_state(foundation, adapter, 0, public_work=little_work)
        policy.check_adapter_norm(3 * global_norm(start))


def test_the_surface_grows_only_on_purpose() -> None:
    commands = get_command(app).commands
    surface = {name: options(command) for name, command in commands.items()}
    surface |= {
        f"{group} {name}": options(command)
        for group in ("policy", "ledger", "plan", "foundation", "tiles", "roster")
        for name, command in commands[group].commands.items()
    }

    assert surface.keys() == {
        *("init", "ingest", "tiles", "policy", "budget", "ledger", "audit", "report"),
        *("attack", "withdraw", "enroll", "join", "doctor", "status", "leave"),
        "dashboard",
        *("plan", "plan list", "plan show", "plan approve", "plan roster", "declare"),
        *("foundation", "foundation fetch", "foundation list", "foundation approve"),
        *("tiles stats", "tiles check", "tiles show", "tiles join"),
        "tiles drop",
        "tiles forget",
        *(
            "policy show",
            "policy check",
            "policy trust",
            "ledger verify",
            "ledger show",
            "ledger export",
        ),
        *("ledger move", "ledger witness"),
        *("backup", "restore"),
        *("identity", "roster", "roster show", "roster approve"),
    }
    assert surface["init"] == {
        *("--name", "--patients", "--home", "--cohort", "--device", "--foundation"),
        *("--signer", "--max-epsilon", "--max-delta"),
    }
    assert surface["ingest"] == {
        *("table", "--home", "--ready-tiles", "--root", "--max-tiles", "--processes"),
        *("--tissue", "--keep", "--names"),
        *("--plan-table", "--images", "--shard", "--json"),
    }


def test_every_option_has_help() -> None:
    commands = get_command(app).commands
    nested = [commands[group].commands.values() for group in ("policy", "ledger", "roster")]
    for command in itertools.chain(commands.values(), *nested):
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, parameter.name


def test_init_then_ingest_of_ready_tiles_makes_a_site_that_can_train(
    tmp_path: Path, foundation
) -> None:
    home = tmp_path / "site"
    made = run(
        *("init", "--name", "north", "--patients", 4, "--home", home),
        *("--foundation", foundation.path),
    )
    assert made.exit_code == 0, made.output
    assert "4 patients are fewer than min_patients of policy.toml (20)" in made.stderr
    approved = run("foundation", "approve", foundation.manifest.hash, "--home", home)
    assert approved.exit_code == 0, approved.output
    rng = np.random.default_rng(0)
    lines = ["file,patient,label"]
    for number in range(8):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,patient{number // 2},LUAD")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")

    done = run("ingest", tmp_path / "table.csv", "--home", home, "--ready-tiles", "--json")

    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tiles"] == 8
    again = ("ingest", tmp_path / "table.csv", "--home", home, "--ready-tiles")
    assert run(*again).stdout.splitlines()[-1] == "next: crafts-client enroll HOST --token TOKEN"
    (home / "coordinator.json").touch()
    assert run(*again).stdout.splitlines()[-1] == "next: crafts-client doctor"
    (home / "coordinator.json").unlink()
    store = TileStore.open(home / "tiles")
    LatentCache.open(store, foundation.manifest.hash)
    Site.open(home)
    counted = json.loads(run("tiles", "stats", "--home", home, "--json").stdout)
    assert (counted["patients"], counted["most_tiles_of_a_patient"]) == (4, 2)


def test_init_trusts_nobody_until_told(tmp_path: Path) -> None:
    run("init", "--name", "north", "--patients", 40, "--home", tmp_path / "site")

    assert SiteHome.open(tmp_path / "site").policy.allowed_signers == ()
    assert not SiteHome.open(tmp_path / "site").policy.allow_non_private


@pytest.mark.parametrize(("patients", "delta"), [(40, 1e-3), (400, 1 / 4000)])
def test_init_takes_delta_from_the_number_of_patients(tmp_path, patients, delta) -> None:
    home = tmp_path / "site"
    run("init", "--name", "north", "--patients", patients, "--home", home)
    assert SiteHome.open(home).policy.max_delta == delta


def test_policy_check_says_yes_to_an_allowed_plan(tmp_path, home, foundation) -> None:
    plan = write_plan(tmp_path, plan_values(foundation.manifest.hash))

    done = run("policy", "check", plan, "--home", home.path, "--json")
    shown = tmp_path / "shown.json"  # as `plan show --json` prints it
    shown.write_text(json.dumps(Plan.load(plan).model_dump(mode="json"), indent=1))
    assert run("policy", "check", shown, "--home", home.path, "--json").stdout == done.stdout

    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["allowed"]
    assert result["noise_multiplier"] > 0.3


def test_noise_that_nobody_can_compute_is_one_line(tmp_path, home, foundation) -> None:
    values = plan_values(foundation.manifest.hash)
    values["privacy"] |= {"target_epsilon": 1e-9, "delta": 1e-10}
    plan = write_plan(tmp_path, values)
    for words in (("policy", "check", plan), ("budget", "--plan", plan)):
        done = run(*words, "--home", home.path)
        assert done.exit_code == 1
        assert "privacy: " in done.stderr
        assert "Traceback" not in done.output


def test_policy_check_names_every_rule_that_says_no(tmp_path, foundation, coordinator) -> None:
    home = make_site_home(
        *(tmp_path / "strict", foundation, coordinator.public_key),
        max_epsilon=1.0,
        max_rounds=1,
        min_noise_multiplier=50.0,
    )

    done = run(
        "policy",
        "check",
        write_plan(tmp_path, plan_values(foundation.manifest.hash)),
        "--home",
        home.path,
        "--json",
    )

    assert done.exit_code == 1
    refused = json.loads(done.stdout)["refused"]
    assert [text.split(":")[0] for text in refused] == [
        "policy rule epsilon",
        "policy rule rounds",
        "policy rule noise",
    ]


def test_policy_show_prints_every_limit(home) -> None:
    shown = json.loads(run("policy", "show", "--home", home.path, "--json").stdout)

    assert shown == home.policy.model_dump(mode="json")


def test_the_budget_falls_with_a_round(home, foundation, coordinator) -> None:
    def told() -> dict:
        return json.loads(run("budget", "--home", home.path, "--json").stdout)

    empty = told()
    assert (empty["plans"], empty["further_plans_fit"], empty["epsilon_spent"]) == ([], True, 0)
    assert empty["delta_times_declared_patients"] == 0.01
    plan, site = coordinator.plan(), Site(home, foundation)
    state = coordinator.start(plan)
    for number, steps in ((1, 2), (2, 4)):
        request = coordinator.request(plan, state, number=number)
        site.answer(coordinator.message(plan, state, request=request))
        (left,) = told()["plans"]
        assert left == {"plan": plan.hash, "steps_charged": steps, "steps_left": 8 - steps}
    (counted,) = told()["filters"]
    assert (counted["name"], counted["epsilon"], counted["delta"]) == ("sums", 8.0, 1e-3)
    assert not told()["further_plans_fit"], "the plan declared all of the delta"
    assert 0 < told()["epsilon_spent"] < 8
    shown = run("budget", "--home", home.path).stdout
    assert "filters: sums counts epsilon 8.000 of 20 at delta 0.001 of 0.001\n" in shown
    assert f"plans: {plan.hash[:16]} ran 4 steps, 4 more fit\n" in shown


def test_the_budget_is_told_in_steps_of_a_plan(tmp_path, home, foundation) -> None:
    plan = write_plan(tmp_path, plan_values(foundation.manifest.hash))
    wanted = json.loads(run("policy", "check", plan, "--home", home.path, "--json").stdout)

    told = json.loads(run("budget", "--home", home.path, "--plan", plan, "--json").stdout)

    privacy = plan_values(foundation.manifest.hash)["privacy"]
    kind = PrivacyEvent(
        noise_multiplier=wanted["noise_multiplier"],
        sample_rate=privacy["sample_rate"],
        steps=told["steps_left_of_this_plan"],
    )
    assert epsilon([kind], privacy["delta"]) <= privacy["target_epsilon"]
    more = replace(kind, steps=kind.steps + 1)
    assert epsilon([more], privacy["delta"]) > privacy["target_epsilon"]


def test_the_budget_is_told_in_further_plans(tmp_path, foundation, coordinator) -> None:
    home = make_site_home(
        *(tmp_path / "site", foundation, coordinator.public_key), max_epsilon=30.0, max_delta=4e-3
    )
    file = write_plan(tmp_path, plan_values(foundation.manifest.hash))

    def further() -> int:
        told = json.loads(run("budget", "--home", home.path, "--plan", file, "--json").stdout)
        return told["further_plans_like_this_one"]

    assert further() == 3
    plan = coordinator.plan()
    Site(home, foundation).answer(coordinator.message(plan, coordinator.start(plan)))
    assert further() == 2


def test_a_policy_with_other_filters_than_it_began_with_tells_no_budget(
    home, foundation, coordinator
) -> None:
    plan = coordinator.plan()
    Site(home, foundation).answer(coordinator.message(plan, coordinator.start(plan)))
    policy = home.path / "policy.toml"
    policy.write_text(policy.read_text().replace('["sums"]', '["renyi:3"]'))
    told = run("budget", "--home", home.path)
    assert told.exit_code == 1
    assert "first, policy.toml now declares ['renyi:3']; set it back" in told.stderr


def test_a_patient_at_two_sites_spends_both(tmp_path, home, foundation, coordinator) -> None:
    plan = coordinator.plan()
    Site(home, foundation).answer(coordinator.message(plan, coordinator.start(plan)))
    export = tmp_path / "other.csv"
    exported = run("ledger", "export", export, "--home", home.path, "--json")
    key = json.loads(exported.stdout)["key"]
    also = ("budget", "--home", home.path, "--also", export, "--also-key", key)
    told = json.loads(run(*also, "--json").stdout)
    events = Ledger(home.ledger_path).events("main")
    both = epsilon([*events, *events], home.policy.max_delta)
    assert told["epsilon_of_a_patient_at_all_sites"] == both > told["epsilon_spent"]
    assert told["counted_of_other_sites"][0].startswith("north: 3 entries, signed 20")
    unknown = run("budget", "--home", home.path, "--also", export)
    assert (unknown.exit_code, f"signed by key {key}" in unknown.stderr) == (1, True)
    alone = run("budget", "--home", home.path, "--also-key", key)
    assert (alone.exit_code, "no effect without --also" in alone.stderr) == (2, True)

    steps = events[0].steps
    export.write_text(export.read_text().replace(f",{steps},", f",{steps - 1},"))
    refused = run(*also)
    assert refused.exit_code == 1
    assert "is not what was exported; ask that site for a new one" in refused.stderr
    export.write_text("not,a,ledger\n1,2,3\n")
    assert "no exported ledger" in run(*also).stderr


def test_a_patient_who_withdraws_is_read_no_more(
    tmp_path, home, foundation, coordinator, monkeypatch
) -> None:
    """The name is the hospital's, the register holds its pseudonym; what was spent stays."""
    monkeypatch.setattr(Salt, "patient_id", lambda self, name: f"patient{name}")
    privacy = coordinator.plan().privacy.model_dump() | {"sample_rate": 1.0}
    plan = coordinator.plan(privacy=privacy)
    state, site, read = coordinator.start(plan), Site(home, foundation), []
    rows = TileStore.tile_rows_of
    monkeypatch.setattr(
        TileStore, "tile_rows_of", lambda self, index: read.append(index) or rows(self, index)
    )
    site.answer(coordinator.message(plan, state))
    assert set(read) == {0, 1, 2, 3, 4, 5}
    spent = Ledger(home.ledger_path).events("main")

    assert "no such patient" in run("withdraw", "9999", "--yes", "--home", home.path).stderr
    done = run("withdraw", "0003", "--yes", "--json", "--home", home.path)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["withdrawn"] in TileStore.open(home.tile_store_path).patients
    read.clear()
    request = coordinator.request(plan, state, number=2)
    site.answer(coordinator.message(plan, state, request=request))
    assert set(read) == {0, 1, 2, 4, 5}, "the running site reads the register before each round"
    assert Ledger(home.ledger_path).events("main")[:1] == spent


def test_an_attack_leaves_its_answer_at_the_site(tmp_path, home, foundation) -> None:
    write_random_store(home.tile_store_path.with_name("more"), foundation, num_patients=8, seed=2)
    write_random_store(home.tile_store_path.with_name("others"), foundation, num_patients=8, seed=3)
    few = run("attack", foundation.path, "--others", home.path / "others", "--home", home.path)
    assert few.exit_code == 1
    assert "at least 8 patients on each side, got 6" in few.stderr
    site = home.path / "site.toml"
    site.write_text(site.read_text().replace('tile_store = "tiles"', 'tile_store = "more"'))
    done = run("attack", foundation.path, "--others", home.path / "others", "--home", home.path)
    assert done.exit_code == 0, done.stderr
    assert "loss against the foundation: area 0.50" in done.stdout
    assert "updates: 0 of 0 that left are kept here" in done.stdout
    assert done.stdout.splitlines()[-2].startswith("No attack told who was in training")
    assert "(smallest of 4 p-values, times 4: " in done.stdout
    assert "0.5 is chance. An attack that fails proves nothing." in done.stdout
    assert json.loads(home.leakage_path.read_text())["patients"] == 8
    assert home.leakage_path.stat().st_mode & 0o077 == 0


def test_an_attack_looks_at_every_update_that_left(home, foundation, coordinator) -> None:
    write_random_store(home.tile_store_path.with_name("more"), foundation, num_patients=8, seed=2)
    write_random_store(home.tile_store_path.with_name("others"), foundation, num_patients=8, seed=3)
    site = home.path / "site.toml"
    site.write_text(site.read_text().replace('tile_store = "tiles"', 'tile_store = "more"'))
    home = SiteHome.open(home.path)
    plan = coordinator.plan()
    state, trained = coordinator.start(plan), Site(home, foundation)
    for number in (1, 2):
        request = coordinator.request(plan, state, number=number)
        trained.answer(coordinator.message(plan, state, request=request))
    next(home.seen_path.iterdir()).unlink()

    done = run("attack", foundation.path, "--others", home.path / "others", "--home", home.path)

    assert done.exit_code == 0, done.stderr
    assert "every update that left: area 0." in done.stdout
    assert "updates: 1 of 2 that left are kept here" in done.stdout
    record = json.loads(home.leakage_path.read_text())
    assert [each["name"] for each in record["attacks"]][-1] == "every update that left"
    assert (record["updates_seen"], record["updates_left"]) == (1, 2)


def test_the_ledger_is_shown_and_exported(tmp_path, home, foundation, coordinator) -> None:
    plan = coordinator.plan()
    Site(home, foundation).answer(coordinator.message(plan, coordinator.start(plan)))

    shown = run("ledger", "show", "--home", home.path)
    entries = json.loads(run("ledger", "show", "--home", home.path, "--json").stdout)
    exported = run("ledger", "export", tmp_path / "ledger.csv", "--home", home.path)

    assert [entry["kind"] for entry in entries] == ["placed", "reserved", "committed"]
    assert "bound to place" in shown.stdout.splitlines()[0]
    assert "reserved" in shown.stdout.splitlines()[1]
    assert exported.exit_code == 0, exported.stderr
    with (tmp_path / "ledger.csv").open(newline="") as file:
        assert file.readline().startswith("# crafts ledger export 2: {")
        rows = list(csv.DictReader(file))
    assert [row["hash"] for row in rows] == [entry["hash"] for entry in entries]


def test_the_audit_passes_engine_and_trainer_and_leaves_its_record(
    tmp_path, foundation, coordinator
) -> None:
    home = make_site_home(
        tmp_path / "site", foundation, coordinator.public_key, allowed_stages=("pretraining",)
    )

    done = run("audit", "--home", home.path)

    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    middle = lines.index("the trainer, on public patients, as site.toml says:")
    assert len([line for line in lines[:middle] if line.startswith("passed")]) == 29
    assert len([line for line in lines[middle:] if line.startswith("passed  pretraining")]) == 8
    assert "audited: GridNoise, flat and automatic clipping" in done.stdout
    record = json.loads(home.audit_path.read_text())
    assert record["passed"]
    assert record["subject"] | {"noise": "GridNoise", "device": "cpu"} == record["subject"]
    assert record["training"]["stages"] == ["pretraining"]
    assert record["libraries"]["torch"] == metadata.version("torch")
    assert record["settings"]["precision"] == "float32"
    assert datetime.fromisoformat(record["at"]) <= datetime.now(UTC)
    assert not home.ledger_path.exists(), "an audit spends nothing"


@pytest.fixture
def engine_only(monkeypatch) -> None:
    """The trainer's part finds nothing: for what is about the engine's."""
    nothing = TrainingAudit(stages=("pretraining", "alignment"), checks=(), one_runs=())
    monkeypatch.setattr(site_audit, "audit_training", lambda *_, **__: nothing)


@pytest.mark.usefixtures("engine_only")
def test_an_audit_that_fails_exits_one(home, monkeypatch) -> None:
    monkeypatch.setattr(GridNoise, "add_", lambda self, grid_sum_D, std: None)

    done = run("audit", "--home", home.path)

    assert done.exit_code == 1
    assert "FAILED  noise scale" in done.stdout
    assert "FAILED  one-run bound" in done.stdout


@pytest.mark.usefixtures("engine_only")
def test_the_audit_draws_its_noise_where_training_does(home, monkeypatch) -> None:
    """A site with exact noise whose exact noise is broken."""
    site = home.path / "site.toml"
    site.write_text(site.read_text().replace("exact_noise = false", "exact_noise = true"))
    monkeypatch.setattr(ExactNoise, "__init__", lambda self: None)
    monkeypatch.setattr(ExactNoise, "add_", lambda self, grid_sum_D, std: None)

    done = run("audit", "--home", home.path)

    assert done.exit_code == 1
    assert "FAILED  noise scale" in done.stdout
    assert json.loads(home.audit_path.read_text())["subject"]["noise"] == "ExactNoise"


def test_an_audit_whose_trainer_fails_exits_one(home, monkeypatch) -> None:
    """Though the engine passes, which it does with fewer canaries too."""
    broken = TrainingCheck(
        stage="alignment", name="noise is fresh", question="is it?", passed=False, found="p = 0"
    )
    found = TrainingAudit(stages=("alignment",), checks=(broken,), one_runs=())
    monkeypatch.setattr(site_audit, "audit_training", lambda *_, **__: found)
    monkeypatch.setattr(site_audit, "audit", partial(audit, num_canaries=300, seed=0))

    done = run("audit", "--home", home.path)

    assert done.exit_code == 1
    assert "FAILED  alignment, noise is fresh: is it? (p = 0)" in done.stdout
    assert done.stdout.count("FAILED") == 1
    assert not json.loads(home.audit_path.read_text())["passed"]


def test_ledger_verify_sees_an_edited_row(home, foundation, coordinator) -> None:
    plan = coordinator.plan()
    Site(home, foundation).answer(coordinator.message(plan, coordinator.start(plan)))
    assert run("ledger", "verify", "--home", home.path).exit_code == 0

    data = home.ledger_path.read_bytes()
    assert b"pretraining" in data
    home.ledger_path.write_bytes(data.replace(b"pretraining", b"pretraininG"))

    done = run("ledger", "verify", "--home", home.path)
    assert done.exit_code == 1
    assert done.stderr.startswith("crafts-client: ")


@pytest.mark.parametrize(
    "arguments",
    [
        *(("tiles", "stats"), ("budget",), ("policy", "show"), ("audit",), ("report",)),
        *(("ledger", "verify"), ("ledger", "show"), ("ledger", "export", "ledger.csv")),
        *(("ledger", "move"), ("ledger", "witness", ".")),
    ],
)
def test_without_a_home_it_is_one_line_and_exit_1(tmp_path, arguments) -> None:
    done = run(*arguments, "--home", tmp_path / "nowhere")

    assert done.exit_code == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "crafts-client init" in line


def test_a_bad_table_gives_one_line_per_problem(tmp_path, home) -> None:
    (tmp_path / "table.csv").write_text("file,patient,label\na.svs,p1,LUAD\nb.svs,,LUAD\n")

    done = run("ingest", tmp_path / "table.csv", "--home", home.path)

    assert done.exit_code == 1
    assert "a.svs does not exist" in done.stderr
    assert "no patient" in done.stderr


def test_a_key_that_is_none_is_one_line_and_makes_nothing(tmp_path) -> None:
    done = run("init", "--name", "n", "--patients", 4, "--signer", "abc", "--home", tmp_path / "s")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert not (tmp_path / "s").exists()


def test_a_device_that_is_not_here_stops_the_audit_with_one_line(home) -> None:
    site = home.path / "site.toml"
    site.write_text(site.read_text().replace('device = "cpu"', 'device = "cuda:77"'))
    done = run("audit", "--home", home.path)
    assert (done.exit_code, "device cuda:77 cannot be used here" in done.stderr) == (1, True)


def test_taking_back_what_was_not_approved_says_so(home) -> None:
    done = run("plan", "approve", "0" * 64, "--take-back", "--home", home.path)
    assert (done.exit_code, "is approved here" in done.stderr) == (1, True)


def test_a_home_in_place_of_its_tiles_is_pointed_to_them(home) -> None:
    with pytest.raises(TileStoreError, match=f"did you mean {home.path}/tiles"):
        TileStore.open(home.path)


def test_a_table_without_a_scale_is_not_added_to_tiles_that_have_one(
    tmp_path: Path, home: SiteHome
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "t.png")
    (tmp_path / "table.csv").write_text("file,patient,label\nt.png,p,LUAD\n")
    done = run("ingest", tmp_path / "table.csv", "--ready-tiles", "--home", home.path)
    assert (done.exit_code, "give it in column mpp" in done.stderr) == (1, True)


def test_a_bad_name_is_one_line_and_makes_nothing(tmp_path) -> None:
    done = run("init", "--name", "North Clinic", "--patients", 4, "--home", tmp_path / "site")

    assert done.exit_code == 1
    assert "name" in done.stderr
    assert not (tmp_path / "site").exists()
