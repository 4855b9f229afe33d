"""The report says in which steps a site relied on others, and what is left without them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_client.budget import epsilon_at_all_sites
from crafts_client.cli import app
from crafts_client.doctor import Verdict, sums
from crafts_client.home import POLICY_NAME, SiteHome, to_toml
from crafts_client.privacy_report import PrivacyReport, privacy_report, write_privacy_report
from crafts_client.site import Site
from crafts_client.site_key import signed_head
from crafts_client.sum_report import doubts_about_sums, sum_report
from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.charges import SumCharge
from crafts_privacy.ledger import Ledger, LedgerError
from crafts_privacy.ledger_export import LedgerExport, read_export, write_export
from support.clocks import ManualClock
from support.sites import Coordinator, make_site_home
from support.sum_study import SumStudy, summing_home

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reported(
    tmp_path_factory: pytest.TempPathFactory, foundation
) -> tuple[SumStudy, PrivacyReport]:
    """A round whose first attempt gave no result, and one that this site is ready for."""
    folder = tmp_path_factory.mktemp("summed")
    coordinator = Coordinator(folder, foundation)
    home = summing_home(folder / "site", foundation, coordinator, max_delta=1e-3)
    study = SumStudy(coordinator, foundation, home)
    site = Site(home, foundation)
    study.add(site)
    study.add(site, attempt=2)
    study.ready(site, 2)
    return study, privacy_report(home)


@pytest.fixture
def study(reported: tuple[SumStudy, PrivacyReport]) -> SumStudy:
    return reported[0]


@pytest.fixture
def report(reported: tuple[SumStudy, PrivacyReport]) -> PrivacyReport:
    return reported[1]


@pytest.fixture
def home(study: SumStudy, tmp_path: Path) -> SiteHome:
    """A copy, which a test may change."""
    shutil.copytree(study.home.path, tmp_path / "site")
    home = SiteHome.open(tmp_path / "site")
    Ledger(home.ledger_path).move()
    return home


def told(home: SiteHome) -> list[str]:
    entries = Ledger(home.ledger_path).entries()
    return list(doubts_about_sums(home, sum_report(home, entries), entries))


def set_policy(home: SiteHome, **changes: object) -> SiteHome:
    policy = home.policy.model_copy(update=changes)
    (home.path / POLICY_NAME).write_text(to_toml(policy))
    return SiteHome.open(home.path)


def test_both_guarantees_are_reported(study, report, tmp_path: Path) -> None:
    assert report.sums is not None
    assert (report.sums.steps, report.sums.vectors) == (3, 2)
    assert report.sums.attempts_without_result == 2
    assert (report.sums.fewest_members, report.sums.fewest_honest) == (3, 2)
    assert report.sums.most_colluding == 1
    alone = accounting.epsilon(Ledger(study.home.ledger_path).events_alone("main"), 1e-3)
    assert report.sums.epsilon_alone == pytest.approx(alone)
    assert report.lifetime.epsilon is not None
    assert alone > report.lifetime.epsilon
    (roster,) = report.sums.rosters
    assert (roster.phrase, roster.sites) == (study.roster().phrase, ("east", "north", "south"))
    assert not [line for line in report.unsubstantiated if line.startswith("sums")]
    page, _ = write_privacy_report(report, tmp_path / "report")
    text = page.read_text()
    assert roster.phrase in text
    assert "added only a share of the noise" in text
    assert "All noise is added here" not in text


def test_a_patient_at_two_members_of_one_sum_is_not_told_too_little(study, report) -> None:
    events = Ledger(study.home.ledger_path).events("main")
    assert report.lifetime.epsilon_seen_twice is not None
    assert report.lifetime.epsilon_seen_twice > 1.05 * accounting.epsilon([*events, *events], 1e-3)


def test_what_the_files_do_not_carry_is_not_to_be_signed(home, study) -> None:
    assert told(home) == []
    home.roster_approvals.take_back(study.plan.hash)
    lines = told(set_policy(home, min_members=4, max_epsilon_alone=0.01))
    for word, line in zip(("approved", "over 3", "0.01"), lines, strict=True):
        assert word in line


def test_doctor_looks_at_rosters_and_at_the_limit_alone(home, study) -> None:
    assert {finding.verdict for finding in sums(home)} == {Verdict.OK}
    tight = set_policy(home, max_epsilon_alone=0.01)
    assert [finding.verdict for finding in sums(tight)] == [Verdict.OK, Verdict.PROBLEM]
    assert [each.verdict for each in sums(set_policy(home, allowed_trust=("site",)))] == [
        Verdict.OK
    ]


def test_a_study_without_sums_has_no_such_section(tmp_path, foundation, coordinator) -> None:
    home = make_site_home(tmp_path / "plain", foundation, coordinator.public_key)
    plan = coordinator.plan()
    Site(home, foundation).answer(coordinator.message(plan, coordinator.start(plan)))
    entries = Ledger(home.ledger_path).entries()
    assert sum_report(home, entries) is None
    assert told(home) == []


def exported(home: SiteHome, path: Path) -> LedgerExport:
    ledger = Ledger(home.ledger_path)
    head = signed_head(home, ledger)
    write_export(ledger.entries(), head, path)
    return read_export(path, trusted=[head.fingerprint])


def test_another_hospitals_ledger_of_the_same_sums_counts_as_one_sum(
    home, study, tmp_path: Path
) -> None:
    """The other member's charges are these very ones here: as if it had been asked as often."""
    ledger = Ledger(home.ledger_path)
    export = exported(home, tmp_path / "theirs.csv")
    found = epsilon_at_all_sites(home, ledger, [export])
    events = ledger.events("main")
    assert found == accounting.epsilon_at_two_hospitals([], events, 1e-3)
    with pytest.raises(LedgerError, match="three members"):
        epsilon_at_all_sites(home, ledger, [export, export])
    run = CliRunner().invoke(
        app,
        [
            *("budget", "--home", str(home.path), "--also", str(tmp_path / "theirs.csv")),
            *("--also-key", export.head.fingerprint, "--json"),
        ],
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["epsilon_of_a_patient_at_all_sites"] == pytest.approx(found)


def export_of(home: SiteHome, *charges: SumCharge, others: int = 0) -> LedgerExport:
    """Another hospital's, with so many charges besides that are of no sum."""
    head = signed_head(home, Ledger(home.ledger_path))
    plain = PrivacyEvent(noise_multiplier=9.0, sample_rate=0.1, steps=2)
    events = (*(charge.event for charge in charges), *[plain] * others)
    return LedgerExport(head=head, charged=events, of_sums=charges)


def test_a_charge_that_was_carried_counts_for_the_sum_that_it_paid_for(
    tmp_path: Path, foundation, coordinator
) -> None:
    """Here charged for round 1 and carried to round 2; there for round 2 alone: one sum."""
    home = summing_home(
        tmp_path / "site", foundation, coordinator, max_delta=1e-3, answer_every_s=60.0
    )
    study = SumStudy(coordinator, foundation, home)
    site = Site(home, foundation, clock=ManualClock().clock)
    study.ready(site, 1)
    study.add(site, 2)
    ledger = Ledger(home.ledger_path)
    (event,) = ledger.events("main")
    theirs = SumCharge(request_hash=study.request(2).hash, event=event)
    found = epsilon_at_all_sites(home, ledger, [export_of(home, theirs)])
    assert found == accounting.epsilon_at_two_hospitals([], [event], 1e-3)
    assert found > 1.05 * accounting.epsilon([event, event], 1e-3)
    left_out = SumCharge(request_hash=study.request(1).hash, event=event)
    assert epsilon_at_all_sites(
        home, ledger, [export_of(home, left_out)]
    ) == accounting.epsilon_at_two_hospitals([event, event], [], 1e-3)
    exported_here = exported(home, tmp_path / "ours.csv")
    assert exported_here.of_sums == (theirs,), "and the other hospital is told so too"


def test_members_that_calibrated_apart_share_the_weaker_noise(home, study) -> None:
    ledger = Ledger(home.ledger_path)
    event, *_ = ledger.events("main")
    weaker = replace(event, noise_multiplier=0.99 * event.noise_multiplier)
    theirs = SumCharge(request_hash=study.request(1).hash, event=weaker)
    found = epsilon_at_all_sites(home, ledger, [export_of(home, theirs, others=1)])
    *apart, plain = [*ledger.events("main")[1:], export_of(home, others=1).charged[0]]
    assert found == accounting.epsilon_at_two_hospitals([*apart, plain], [weaker], 1e-3)


def test_a_sum_of_two_other_hospitals_counts_as_one_too(home, study) -> None:
    """This site was no member of it: both of their charges are under one noise all the same."""
    ledger = Ledger(home.ledger_path)
    ours = ledger.events("main")
    charge = SumCharge(request_hash="7" * 64, event=ours[0])
    found = epsilon_at_all_sites(home, ledger, [export_of(home, charge), export_of(home, charge)])
    assert found == accounting.epsilon_at_two_hospitals(ours, [ours[0]], 1e-3)
