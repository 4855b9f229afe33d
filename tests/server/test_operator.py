"""What an operator sees and is asked: status, reasons, plans that are checked before signing."""

import json
import re
import tomllib
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from crafts_core.durable import exclusive_lock
from crafts_core.foundation_manifest import read_manifest
from crafts_core.plan import Plan, PlanError
from crafts_core.plan_keys import SECTIONS, commented_toml, explained, keys_table
from crafts_privacy.plan_check import plan_problems
from crafts_privacy.signing import fingerprint
from crafts_server import pki, status
from crafts_server.audit_log import Event
from crafts_server.cli import app
from crafts_server.cohort_sizes import CohortSizes, size_row
from crafts_server.dashboard import make_app
from crafts_server.errors import HomeError
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.plan_queue import fail_plan, queue_plan, queued_plans
from crafts_server.registry import RunStatus
from crafts_server.registry_rows import EnrolmentRow
from crafts_server.rosters import Rosters
from support.certificates import identity_of
from support.open_tiles import open_table
from support.sites import plan_values, write_plan
from support.summing_sites import summed_plan

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def home(tmp_path: Path, foundation) -> CoordinatorHome:
    config = HomeConfig(foundation=str(foundation.path))
    return CoordinatorHome.create(tmp_path / "coordinator", config)


@pytest.fixture
def plan(foundation) -> Plan:
    return Plan.parse(plan_values(foundation.manifest.hash))


def run(home: CoordinatorHome, *arguments: object, code: int = 0, answer: str | None = None):
    words = [*map(str, arguments), "--home", str(home.path)]
    done = CliRunner().invoke(app, words, input=answer)
    assert done.exit_code == code, done.output
    return done


def test_status_shows_what_a_hospital_compares_by_telephone(home) -> None:
    shown = run(home, "status").stdout
    assert f"authority  {pki.fingerprint(home.pki.ca)}\n" in shown
    assert f"signer     {fingerprint(home.public_key)}\n" in shown
    assert shown.splitlines()[-1] == "next: crafts-server serve"
    told = json.loads(run(home, "status", "--json").stdout)
    assert (told["is_serving"], told["sites"], told["runs"]) == (False, [], [])


def test_why_a_plan_waits_or_has_stopped_is_told_until_it_goes_on(home, plan) -> None:
    queue_plan(home, plan)
    assert "nobody serves this home" in run(home, "status").stdout
    registry = home.registry()
    registry.start_run("run-1", plan.hash)
    registry.set_status("run-1", RunStatus.STOPPED)
    registry.close()
    home.audit_log.write(Event.SHORT, plan=plan.hash, why="1 of 2 sites answered")
    for command in (["runs", "list"], ["status"]):
        shown = run(home, *command).stdout
        assert "(1 of 2 sites answered)" in shown
        assert plan.hash[:16] in shown
    (told,) = json.loads(run(home, "runs", "list", "--json").stdout)
    assert (told["why"], told["plan_hash"]) == ("1 of 2 sites answered", plan.hash)
    home.audit_log.write(Event.COMMITTED, run="run-1", round=1)
    assert "1 of 2" not in run(home, "runs", "list").stdout
    home.audit_log.write(Event.FAILED, plan=plan.hash, why="it diverged")
    assert "(it diverged)" in run(home, "status").stdout
    queue_plan(home, plan)
    assert "diverged" not in run(home, "status").stdout


def test_a_plan_that_has_finished_is_not_said_to_wait(home, plan, tmp_path: Path) -> None:
    """Handed over again it would leave the queue at once, and nothing would be trained."""
    path = written(tmp_path / "plan.toml", plan)
    assert "waits to be trained" in run(home, "train", path).stdout
    (queued,) = queued_plans(home)
    queued.unlink()
    registry = home.registry()
    registry.start_run("run-1", plan.hash)
    registry.set_status("run-1", RunStatus.FINISHED)
    registry.close()
    assert "has finished as run run-1" in run(home, "train", path).stdout
    assert json.loads(run(home, "train", path, "--json").stdout)["finished_run"] == "run-1"
    assert queued_plans(home) == []


def test_a_run_that_was_interrupted_says_what_it_waits_for(home, plan) -> None:
    """A restart leaves it stopped, a kill running; its plan stays in the queue."""
    queue_plan(home, plan)
    registry = home.registry()
    registry.start_run("run-1", plan.hash)
    for left_as in (RunStatus.STOPPED, RunStatus.RUNNING):
        registry.set_status("run-1", left_as)
        assert "(nobody serves this home)" in run(home, "status").stdout
    with exclusive_lock(home.path / "serve.lock", held=HomeError("served")):
        shown = run(home, "status").stdout
        assert f"{RunStatus.RUNNING}  0 of " in shown
        assert "(it waits" not in shown
        registry.set_status("run-1", RunStatus.STOPPED)
        assert "(it waits for its turn)" in run(home, "status").stdout
    registry.close()


def test_a_plan_is_not_the_next_step_while_somebody_is_still_invited(home) -> None:
    with exclusive_lock(home.path / "serve.lock", held=HomeError("served")):
        enrolled(home, "north", datetime.now(UTC))
        assert "go on without" not in run(home, "status").stdout
        run(home, "sites", "invite", "south", "--patients", 10)
        assert run(home, "status").stdout.splitlines()[-2:] == [
            "next: wait for who is invited, or go on without them:",
            "next: crafts-server plan new plan.toml, plan check, and train",
        ]


def test_a_plan_without_a_run_is_listed_with_its_reason(home, plan, monkeypatch) -> None:
    """However many lines the log has had since, and until it is handed over again."""
    queue_plan(home, plan)
    fail_plan(home, plan.hash, "this home has another foundation")
    home.audit_log.write(Event.STARTED)
    monkeypatch.setattr(status, "_RECENT_LINES", 1)
    for command in (["runs", "list"], ["status"]):
        shown = run(home, *command).stdout
        assert "failed" in shown
        assert f"{plan.study.name}  plan {plan.hash[:16]}" in shown
        assert "(this home has another foundation)" in shown
    (told,) = json.loads(run(home, "runs", "list", "--json").stdout)
    assert (told["plan_hash"], told["run_id"], told["status"]) == (plan.hash, None, "failed")
    queue_plan(home, plan)
    assert "failed" not in run(home, "runs", "list").stdout


def test_a_stop_of_long_ago_says_where_its_reason_is(home, plan) -> None:
    home.sign_plan(plan)
    registry = home.registry()
    registry.start_run("run-1", plan.hash)
    registry.set_status("run-1", RunStatus.STOPPED)
    registry.close()
    assert "(why is further back in crafts-server log show)" in run(home, "status").stdout


def enrolled(home: CoordinatorHome, name: str, at: datetime) -> None:
    registry = home.registry()
    with registry.session() as session:
        session.add(
            EnrolmentRow(
                site=name,
                fingerprint="f" * 64,
                node_public_key=name,
                enrolled_at=at.replace(tzinfo=None),
                revoked_at=None,
            )
        )
    registry.close()


def test_a_site_that_never_came_was_not_seen(home) -> None:
    """Its enrolment was shown as its last contact."""
    enrolled(home, "north", datetime.now(UTC))
    assert "north  enrolled  no patients  not seen" in run(home, "status").stdout
    home.contacts.note("north")
    assert "last contact" in run(home, "status").stdout


def test_what_a_name_did_before_it_enrolled_again_is_no_contact(home) -> None:
    home.contacts.note("north")
    enrolled(home, "north", datetime.now(UTC) + timedelta(seconds=1))
    assert "not seen" in run(home, "status").stdout


@pytest.mark.parametrize(
    ("days", "told"), [(334, ""), (336, "certificate ends "), (366, "certificate ended ")]
)
def test_the_end_of_a_sites_certificate_is_told_a_month_before(home, days: int, told: str) -> None:
    """A site comes no more after it, and its coordinator saw nothing."""
    enrolled(home, "north", datetime.now(UTC) - timedelta(days=days))
    for shown in (
        run(home, "status").stdout,
        TestClient(make_app(home.path, "t")).get("/t/").text,
    ):
        assert ("certificate" in shown) == bool(told)
        assert told in shown
        assert ("crafts-server sites invite north --patients N" in shown) == bool(told)


def test_an_invitation_says_that_it_voids_an_older_one(home) -> None:
    first = run(home, "sites", "invite", "north", "--patients", 7).stdout
    again = run(home, "sites", "invite", "north", "--patients", 7).stdout
    assert "an older token of this site counts no more" not in first
    assert again.splitlines()[0] == "an older token of this site counts no more"


def test_stop_and_revoke_ask_first(home, plan) -> None:
    queue_plan(home, plan)
    assert "--yes" in run(home, "stop", plan.hash[:16], code=1, answer="n\n").stderr
    assert len(queued_plans(home)) == 1
    refused = run(home, "stop", "0123456789abcdef", code=1)  # before anything is asked
    assert f"by its hash, not by its run ({plan.hash[:16]})" in refused.stderr
    stopped = run(home, "stop", plan.hash[:16], "--yes", "--json")
    assert json.loads(stopped.stdout) == {"stopped": plan.hash}
    assert queued_plans(home) == []
    run(home, "sites", "invite", "north", "--patients", 7)
    run(home, "sites", "revoke", "north", code=1, answer="n\n")
    for words in (["sites", "list"], ["status"]):
        assert re.search("north +invited.*7 patients", run(home, *words).stdout)
    run(home, "sites", "revoke", "north", answer="y\n")
    assert "north  invited" not in run(home, "sites", "list").stdout


def written(path: Path, plan: Plan, **changes: object) -> Path:
    path.write_text(commented_toml(plan.model_copy(update=changes)))
    return path


def test_a_plan_of_brackets_in_brackets_is_one_line(home, tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    assert "cannot read plan" in run(home, "plan", "check", tmp_path / "deep.json", code=1).stderr


@pytest.mark.slow
def test_the_roster_of_a_plan_is_shown_in_columns(home) -> None:
    """Tabs were shown as backslashes."""
    plan, key = summed_plan(), identity_of(1)
    with home.registry() as registry:
        for place, name in enumerate(("north", "south", "west"), start=1):
            CohortSizes(registry).agree(name, 40)
            Rosters(registry).publish(name, identity_of(place))
    home.sign_plan(plan)
    path = written(home.path / "plan.toml", plan)
    shown = run(home, "plan", "roster", path).stdout
    assert re.search(rf"^north +40 patients +{re.escape(key)}$", shown, re.M)


def test_a_plan_that_no_site_could_train_is_not_signed(home, plan, tmp_path: Path) -> None:
    """It was signed and offered, and failed in every site's log."""
    adapter = plan.adapter.model_copy(update={"targets": ("to_q", "nowhere"), "rank": 200})
    path = written(tmp_path / "plan.toml", plan, adapter=adapter)
    told = run(home, "plan", "check", path, code=1).stderr
    assert "adapter.targets: 'nowhere' matches no Linear or Conv2d" in told
    assert "adapter.rank: 200 is more than" in told
    for command in (["plan", "sign"], ["train"]):
        refused = run(home, *command, path, code=1).stderr
        assert refused.count("\n") == 1
        assert "not signed: " in refused
    assert home.registry().plans() == []


def test_check_names_what_signing_a_plan_of_sums_would_refuse(home, plan, tmp_path: Path) -> None:
    values = summed_plan(min_sites=4).model_dump(mode="json")
    values["study"]["foundation"] = plan.study.foundation
    registry = home.registry()
    for name in ("north", "south", "west"):
        CohortSizes(registry).agree(name, 28)
    registry.close()
    path = written(tmp_path / "plan.toml", Plan.parse(values))
    told = run(home, "plan", "check", path, code=1).stderr
    assert "no identity key of north, south, west" in told
    assert "the plan needs 4 sites, 3 are enrolled" in told
    for command in (["plan", "sign"], ["train"]):
        refused = run(home, *command, path, code=1).stderr
        assert "not signed: roster: no identity key" in refused
    assert home.registry().plans() == []


@pytest.mark.slow
def test_a_plan_picks_from_a_pool_of_this_home(home, foundation, tmp_path: Path) -> None:
    made = json.loads(run(home, "pool", "add", open_table(tmp_path / "open"), "--json").stdout)
    again = json.loads(run(home, "pool", "add", tmp_path / "open" / "open.tsv", "--json").stdout)
    assert again == made
    assert (made["tiles"], made["cases"]) == (16, 4)
    assert home.audit_log.verify()[-1].facts == made
    values = plan_values(foundation.manifest.hash)
    values["study"] |= {"captions": ["tissue with glands", "tissue with sheets"]}
    told = [{"name": name, "noise_multiplier": 8.0} for name in ("anchors", "colour")]
    values["stage"] = [*told, {"name": "retrieval", "learning_rate": 0.1}, *values["stage"]]
    for pool, code in ((made["pool"], 0), ("c" * 64, 1)):
        values["study"]["pool"] = pool
        checked = run(home, "plan", "check", write_plan(tmp_path, values), code=code)
        assert ("crafts-server pool add TABLE" in checked.stderr) == bool(code)
    table = run(home, "pool", "add", tmp_path / "none.tsv", code=1)
    assert "no table of open tiles" in table.stderr


def test_check_names_all_that_is_wrong_at_once(home, plan, tmp_path: Path) -> None:
    text = commented_toml(plan).replace("rank = 2", "rank = 0").replace("seed = 3", "seed = -1")
    path = tmp_path / "plan.toml"
    path.write_text(text + "surprise = 1\n")
    told = run(home, "plan", "check", path, code=1).stderr
    for key in ("study.seed", "adapter.rank", "transport.surprise: unknown key"):
        assert key in told
    problems = json.loads(run(home, "plan", "check", path, "--json", code=1).stdout)["problems"]
    assert len(problems) == 3


@pytest.mark.slow
def test_a_noise_that_nobody_can_compute_is_a_sentence(home, plan, foundation) -> None:
    rare = plan.privacy.model_copy(update={"sample_rate": 1e-9})
    problems = list(plan_problems(plan.model_copy(update={"privacy": rare}), foundation.path))
    assert all("privacy: " in problem for problem in problems)
    impossible = plan.privacy.model_copy(update={"target_epsilon": 1e-9, "delta": 1e-10})
    (problem,) = plan_problems(plan.model_copy(update={"privacy": impossible}), foundation.path)
    assert problem.startswith("privacy: ")


def test_a_plan_for_another_foundation_is_named(home, plan, foundation) -> None:
    other = plan.study.model_copy(update={"foundation": "0" * 64})
    (problem,) = plan_problems(plan.model_copy(update={"study": other}), foundation.path)
    assert problem.startswith("study.foundation: 0000000000000000 is not the foundation here")


@pytest.mark.slow
def test_a_rule_that_nobody_knows_is_named_before_a_plan_is_signed(home, plan, tmp_path) -> None:
    values = plan.model_dump(mode="json")
    values["aggregation"]["rule"] = "uniforn"
    path = tmp_path / "plan.toml"
    path.write_text(commented_toml(Plan.parse(values)))
    told = "aggregation.rule: expected one of alignment_regularized, uniform, by_patients"
    assert told in run(home, "plan", "check", path, code=1).stderr
    assert told in run(home, "plan", "sign", path, code=1).stderr


@pytest.mark.slow
def test_a_plan_is_not_sized_for_who_was_only_invited(home, tmp_path: Path) -> None:
    enrolled(home, "north", datetime.now(UTC))
    with closing(home.registry()) as registry, registry.session() as session:
        size_row(session, "north").agreed = 400
    run(home, "sites", "invite", "south", "--patients", 300)
    words = ["plan", "new", tmp_path / "p.toml", "--name", "lung", "--epsilon", 8, "--rounds", 2]
    shown = run(home, *words).stdout
    assert "Sized for 1 sites" in shown
    assert "Not counted, as they have not enrolled: south;" in shown


@pytest.mark.slow
def test_a_new_plan_explains_each_key_and_fits_the_sites(home, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    words = ["plan", "new", path, "--name", "lung", "--epsilon", 8, "--rounds", 2]
    assert "no site has enrolled yet" in run(home, *words, code=1).stderr
    shown = run(home, *words, "--patients", 400, "--patients", 60).stdout
    assert "Noise by calibration: " in shown
    assert "Not counted" not in shown
    assert "the life of a cohort of 400 has room for 2 of such plans" in shown
    text = path.read_text()
    plan = Plan.parse(tomllib.loads(text))
    assert plan.study.foundation == read_manifest(home.foundation_path).hash
    assert (plan.privacy.delta, plan.aggregation.min_sites) == (1e-4, 2)
    assert plan.privacy.sample_rate == pytest.approx(16 / 60, rel=0.05)
    for section in SECTIONS:
        for key, _, meaning in explained(section):
            assert f"\n{key} = " not in text or f"# {meaning[:40]}" in text
    checked = run(home, "plan", "check", path)
    assert "A round needs 2 sites, and 0 are enrolled" in checked.stdout
    impossible = [*words[:6], 1e9, *words[7:], "--patients", 60]
    assert "its noise cannot be computed" in run(home, *impossible, code=1).stderr
    assert "is there already" in run(home, *words, "--patients", 60, code=1).stderr


def test_every_key_is_explained_and_the_docs_are_the_schema() -> None:
    assert [
        f"{section}.{key}"
        for section in SECTIONS
        for key, _, told in explained(section)
        if not told
    ] == []
    assert (DOCS / "plan-keys.md").read_text().endswith(keys_table())


def test_a_commented_plan_is_the_same_plan(plan) -> None:
    assert Plan.parse(tomllib.loads(commented_toml(plan))) == plan


def test_a_plan_error_holds_every_problem(foundation) -> None:
    with pytest.raises(PlanError) as refused:
        Plan.parse(plan_values(foundation.manifest.hash) | {"a": 1, "b": 2})
    assert refused.value.problems == ("a: unknown key; remove it", "b: unknown key; remove it")


def test_a_name_is_refused_in_words(foundation) -> None:
    values = plan_values(foundation.manifest.hash)
    with pytest.raises(PlanError) as refused:
        Plan.parse(values | {"study": {**values["study"], "name": "North Wing", "pool": "ab"}})
    assert refused.value.problems == (
        "study.name: expected small letters, digits and dashes, 63 at most, and no dash in front",
        "study.pool: expected 64 digits, each of 0 to 9 or a to f",
    )
