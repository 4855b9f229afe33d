"""Who the other hospitals are is decided here, by ear: shown with its phrase, approved, held."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from crafts_client import agreed_patients, enrolment
from crafts_client.cli import app
from crafts_client.doctor import Verdict, sums
from crafts_client.home import POLICY_NAME, SiteHome, to_toml
from crafts_client.mechanism import mechanism_of
from crafts_client.policy import Policy, PolicyError
from crafts_client.rosters import shown_roster
from crafts_core.plan import Plan
from crafts_core.registrar import registrar_pb2 as messages
from crafts_core.roster import Roster, identity_words
from crafts_privacy import accounting, signing
from support.sites import Coordinator
from support.sum_study import STAGES, SumStudy, summing_home, telling_plan, values_of_updates
from support.sums import SumSite


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator: Coordinator) -> SiteHome:
    return summing_home(tmp_path / "site", foundation, coordinator)


@pytest.fixture
def study(coordinator, foundation, home) -> SumStudy:
    made = SumStudy(coordinator, foundation, home)
    home.roster_approvals.take_back(made.plan.hash)
    return made


@pytest.fixture
def far_side(study: SumStudy, coordinator: Coordinator, monkeypatch):
    """Puts a roster on the far side of the wire, signed by the coordinator."""
    told: list[tuple[str, dict[str, object]]] = []

    def offer(roster: Roster, key: object | None = None):
        text = roster.to_json()
        plan = messages.SignedPlan(**asdict(coordinator.message(study.plan, study.state).plan))

        class Registrar:
            def __init__(self, home: SiteHome) -> None:
                self.record = SimpleNamespace(signer=coordinator.public_key)

            def __enter__(self):
                return self

            def __exit__(self, *_: object) -> None: ...

            def call(self, name: str, **fields: object):
                told.append((name, fields))
                signature = signing.sign(key or coordinator._key, text.encode())
                return SimpleNamespace(plans=[plan], json=text, signature=signature)

        monkeypatch.setattr(enrolment, "Registrar", Registrar)
        monkeypatch.setattr(agreed_patients, "Registrar", Registrar)
        return told

    return offer


def run(*arguments: object, answer: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)


def test_a_roster_is_shown_with_keys_phrase_and_what_is_left_alone(home, study, far_side) -> None:
    roster = study.roster()
    far_side(roster)
    plan = study.plan.hash[:16]
    shown = json.loads(run("roster", "show", plan, "--home", home.path, "--json").stdout)
    assert shown["phrase"] == roster.phrase
    lines = {line["site"]: line for line in shown["lines"]}
    assert lines["south"]["fingerprint"] == signing.fingerprint(roster.identities["south"])
    assert (lines["north"]["known"], lines["south"]["known"]) == ("this site", "")
    event = mechanism_of(study.plan, declared_patients=20).event(study.plan.charged_steps)
    share = replace(event, noise_multiplier=event.noise_multiplier / 2**0.5)
    assert shown["epsilon_alone"] == pytest.approx(accounting.epsilon([share], 5e-3))
    text = run("roster", "show", plan, "--home", home.path).stdout
    assert roster.phrase in text
    assert "not approved here yet" in text


@pytest.mark.slow
def test_what_is_left_alone_counts_releases_as_often_as_they_may_be_asked_for(
    tmp_path, foundation, coordinator, study, far_side
) -> None:
    home = summing_home(tmp_path / "telling", foundation, coordinator, allowed_stages=STAGES)
    plan = telling_plan(foundation)
    telling = SumStudy(coordinator, foundation, home, plan)
    study.plan, study.state = plan, telling.state
    far_side(telling.roster())
    shown = json.loads(run("roster", "show", plan.hash[:16], "--home", home.path, "--json").stdout)
    training = mechanism_of(plan, declared_patients=20).event(plan.charged_steps)
    alone = [
        replace(training, noise_multiplier=training.noise_multiplier / 2**0.5),
        accounting.PrivacyEvent(noise_multiplier=16.0 / 2**0.5, sample_rate=1.0, steps=2),
    ]
    assert shown["epsilon_alone"] == pytest.approx(accounting.epsilon(alone, 5e-3))


def test_a_person_approves_and_takes_back(home, study, far_side) -> None:
    far_side(study.roster())
    plan = study.plan.hash
    refused = run("roster", "approve", plan, "--home", home.path, answer="n\n")
    assert refused.exit_code == 1
    assert home.roster_approvals.all() == {}
    done = run("roster", "approve", plan, "--home", home.path, answer="y\n")
    assert done.exit_code == 0, done.output
    assert home.roster_approvals.of_plan(study.plan.hash) == study.roster()
    assert "approved here" in run("roster", "show", plan, "--home", home.path).stdout
    run("roster", "approve", plan, "--home", home.path, "--take-back")
    with pytest.raises(PolicyError, match="nobody here approved"):
        home.roster_approvals.of_plan(study.plan.hash)


def test_without_a_terminal_the_phrase_that_was_read_aloud_is_given(home, study, far_side) -> None:
    """The coordinator may offer another roster by then, with the key of nobody."""
    read_aloud = study.roster()
    ghost = signing.public_key_of(SumSite("south", 70).identity)
    far_side(study.roster(south=ghost))
    approve = ("roster", "approve", study.plan.hash, "--home", home.path, "--phrase")
    refused = run(*approve, read_aloud.phrase)
    assert (refused.exit_code, "not the one of that phrase" in refused.stderr) == (1, True)
    assert home.roster_approvals.all() == {}
    far_side(read_aloud)
    done = run(*approve, read_aloud.phrase, "--json")
    assert json.loads(done.stdout) == {"plan": study.plan.hash, "approved": True}
    assert home.roster_approvals.of_plan(study.plan.hash) == read_aloud


def test_nobody_is_asked_where_the_policy_knows_them_all(home, study, far_side) -> None:
    roster = study.roster()
    pins = {
        name: signing.fingerprint(key) for name, key in roster.identities.items() if name != "north"
    }
    policy = home.policy.model_copy(update={"peers": pins})
    (home.path / POLICY_NAME).write_text(to_toml(policy))
    assert Policy.load(home.path / POLICY_NAME).peers == pins
    far_side(roster)
    done = run("roster", "approve", study.plan.hash, "--home", home.path)
    assert done.exit_code == 0, done.output


def test_a_roster_that_is_not_one_to_take_part_in_is_not_shown(home, study, far_side) -> None:
    stranger = signing.public_key_of(SumSite("x", 70).identity)
    far_side(study.roster(north=stranger))
    with pytest.raises(PolicyError, match="another key for north"):
        shown_roster(home, study.plan)
    far_side(study.roster(), key=SumSite("x", 70).identity)
    with pytest.raises(signing.SignatureError):
        shown_roster(home, study.plan)


def test_a_plan_without_sums_has_no_roster_to_approve(home, coordinator) -> None:
    with pytest.raises(PolicyError, match="needs no roster"):
        shown_roster(home, coordinator.plan())


def test_the_key_that_signs_for_a_site_is_told(home, study, far_side) -> None:
    told = far_side(study.roster())
    done = run("identity", "--home", home.path, "--json")
    assert done.exit_code == 0, done.output
    own = signing.public_key_of(study.identity)
    call, claim = told[-1]
    assert (call, claim["identity_public_key"]) == ("PublishIdentity", own)
    name = home.config.name
    signing.verify(own, identity_words(name), claim["identity_signature"])
    assert json.loads(done.stdout) == {"fingerprint": signing.fingerprint(own)}


def test_a_policy_of_distributed_trust_needs_a_limit_alone(home) -> None:
    with pytest.raises(ValueError, match="max_epsilon_alone"):
        Policy.model_validate(home.policy.model_dump() | {"max_epsilon_alone": None})


def test_a_roster_in_which_this_site_is_most_of_a_sum_is_not_shown(
    home, study, far_side, foundation
) -> None:
    """One large hospital and two tiny ones, weighted by patients."""
    study.plan = Plan.parse(values_of_updates(foundation.manifest.hash))
    roster = study.roster()
    far_side(roster)
    shown_roster(home, study.plan)
    sizes = roster.patients | {"east": 1, "south": 2}
    far_side(Roster.of(study.plan.hash, sizes, roster.identities))
    with pytest.raises(PolicyError, match=r"this site would be 0\.77"):
        shown_roster(home, study.plan)


def test_a_roster_that_fits_no_more_is_told_with_the_way_out(home, study) -> None:
    """Also of a plan that is over, once the cohort has grown: else no later one finds it ready."""
    home.roster_approvals.approve(study.roster())
    assert [each.verdict for each in sums(home)][:1] == [Verdict.OK]
    patients = home.config.declared_patients + 1
    grown = replace(home, config=home.config.model_copy(update={"declared_patients": patients}))
    finding, *_ = sums(grown)
    assert finding.verdict is Verdict.PROBLEM
    assert finding.found.startswith(f"plan {study.plan.hash[:16]}: ")
    assert f"roster approve {study.plan.hash[:16]} --take-back" in finding.advice
