"""The privacy officer's report says what the site's own files carry, and names what they do not."""

import html
import json
import math
import re
import shutil
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
from scipy import stats
from typer.testing import CliRunner

from crafts_client import site_audit
from crafts_client.cli import app
from crafts_client.doctor import Verdict, audit
from crafts_client.home import SiteHome
from crafts_client.privacy_report import privacy_report, write_privacy_report
from crafts_client.site import Site
from crafts_client.training_audit import TrainingAudit, TrainingCheck
from crafts_core.durable import write_file
from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.audit import audit as audit_engine
from crafts_privacy.ledger import Ledger, LedgerTamperedError, Lifetime, PlanLimit
from support import charges
from support.clocks import ManualClock
from support.sites import Coordinator, make_site_home, plan_values

pytestmark = pytest.mark.slow


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def home(tmp_path, foundation, coordinator) -> SiteHome:
    return make_site_home(
        tmp_path / "site", foundation, coordinator.public_key, answer_every_s="auto"
    )


@pytest.fixture(scope="module")
def one_round(tmp_path_factory: pytest.TempPathFactory, foundation) -> Path:
    """A home that has answered one round. It stays as it is; tests copy it."""
    folder = tmp_path_factory.mktemp("trained")
    coordinator = Coordinator(folder, foundation)
    home = make_site_home(
        folder / "site", foundation, coordinator.public_key, answer_every_s="auto"
    )
    plan = coordinator.plan()
    Site(home, foundation, clock=ManualClock().clock).answer(
        coordinator.message(plan, coordinator.start(plan))
    )
    return home.path


@pytest.fixture
def trained(one_round: Path, tmp_path: Path) -> SiteHome:
    shutil.copytree(one_round, tmp_path / "site")
    home = SiteHome.open(tmp_path / "site")
    Ledger(home.ledger_path).move()
    return home


@pytest.fixture(scope="module")
def audit_record(tmp_path_factory: pytest.TempPathFactory, one_round: Path) -> dict:
    """A record as `crafts-client audit` leaves it."""
    path = tmp_path_factory.mktemp("audited") / "site"
    shutil.copytree(one_round, path)
    check = TrainingCheck(
        stage="alignment", name="fresh", question="is it fresh?", passed=True, found="p = 0.42"
    )
    trained_as = TrainingAudit(stages=("pretraining", "alignment"), checks=(check,), one_runs=())
    with pytest.MonkeyPatch.context() as patched:  # their own tests run them whole
        patched.setattr(site_audit, "audit_training", lambda *_, **__: trained_as)
        patched.setattr(site_audit, "audit", partial(audit_engine, num_canaries=300))
        done = run("audit", "--home", path)
    assert done.exit_code == 0, done.output
    return json.loads(SiteHome.open(path).audit_path.read_text())


def test_a_round_is_reported_as_the_ledger_and_the_accountants_have_it(trained) -> None:
    report = privacy_report(trained)

    events = Ledger(trained.ledger_path).events("main")
    assert report.lifetime.epsilon == accounting.epsilon(events, report.delta)
    assert report.lifetime.epsilon_replace_one > report.lifetime.epsilon
    assert report.lifetime.second_accountant.startswith("opacus")
    (sent,) = report.transmissions
    (file,) = trained.outbox_path.glob("*.safetensors")
    assert 0 < sent.num_bytes < file.stat().st_size
    assert sent.num_tensors > 0
    (run_of_report,) = report.runs
    assert (run_of_report.rounds, run_of_report.spent) == (1, report.lifetime)
    assert report.charged_and_not_sent == 0


def test_the_command_writes_both_files_and_exits_zero_once_audited(
    trained, audit_record, tmp_path
) -> None:
    write_file(trained.audit_path, json.dumps(audit_record))

    done = run("report", "--home", trained.path, "--out", tmp_path / "out")

    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "privacy-report.json").read_text())
    page = (tmp_path / "out" / "privacy-report.html").read_text()
    assert record["unsubstantiated"] == []
    assert f"{record['lifetime']['epsilon']:.3f}" in page
    assert record["transmissions"][0]["hash"][:16] in page
    assert record["ledger_head"] in page
    assert "is it fresh?" in page
    assert "p = 0.42" in page
    assert "<td>privacy officer</td>" in page
    counted = next(each for each in record["filters"] if each["epsilon"] is not None)
    assert f"<title>{counted['name']}: {counted['epsilon']:.4g}</title>" in page
    for curve in record["over_time"]:
        assert f"{curve['name']}, {curve['points'][-1][0][:10]}" in page
    assert "http" not in page, "the page needs nothing from elsewhere"


def test_an_engine_that_was_never_audited_is_not_claimed(trained, tmp_path) -> None:
    done = run("report", "--home", trained.path, "--out", tmp_path)

    assert done.exit_code == 1
    assert "NOT SUBSTANTIATED  engine: it was never audited" in done.stdout
    page = (tmp_path / "privacy-report.html").read_text()
    assert "Do not sign" in page
    assert "Not to be signed" in page
    assert "<td>privacy officer</td>" not in page


@pytest.mark.parametrize(
    ("changes", "reason"), [({"passed": False}, "failed"), ({"code_sha256": "0"}, "other code")]
)
def test_an_audit_that_failed_or_is_old_carries_nothing(
    trained, audit_record, changes, reason
) -> None:
    write_file(trained.audit_path, json.dumps(audit_record | changes))

    (line,) = privacy_report(trained).unsubstantiated

    assert reason in line


def set_site(home: SiteHome, key: str, value: str) -> SiteHome:
    """The home, with another line in its site.toml."""
    file = home.path / "site.toml"
    file.write_text(re.sub(rf"^{key} = .*$", f"{key} = {value}", file.read_text(), flags=re.M))
    return SiteHome.open(home.path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("exact_noise", "true", "exact_noise false, site.toml says true"),
        ("device", '"cuda:3"', "device cpu, site.toml says cuda:3"),
        ("precision", '"bfloat16"', "precision float32, site.toml says bfloat16"),
        ("more_devices", '["cpu"]', "more_devices none, site.toml says cpu"),
        ("microbatch_tiles", "8", "microbatch_tiles 64, site.toml says 8"),
    ],
)
def test_an_audit_of_other_settings_carries_nothing(
    trained, audit_record, key: str, value: str, says: str
) -> None:
    write_file(trained.audit_path, json.dumps(audit_record))

    (line,) = privacy_report(set_site(trained, key, value)).unsubstantiated

    assert line == f"engine: the newest audit is of {says}; run crafts-client audit"


@pytest.mark.parametrize("library", ["torch", "cryptography", "opacus", "dp-accounting"])
def test_an_upgraded_library_makes_the_audit_stale(
    trained, audit_record, monkeypatch, library: str
) -> None:
    """For the report and for doctor."""
    write_file(trained.audit_path, json.dumps(audit_record))
    assert [finding.verdict for finding in audit(trained)] == [Verdict.OK]
    right = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "99.1" if name == library else right(name)
    )

    (line,) = privacy_report(trained).unsubstantiated
    (finding,) = audit(trained)

    says = f"the newest audit is of {library} {right(library)}, installed is 99.1"
    assert line == f"engine: {says}; run crafts-client audit"
    assert (finding.verdict, finding.found) == (Verdict.WARNING, says)
    assert finding.advice == "run crafts-client audit"


def test_an_audit_of_fewer_stages_or_of_the_engine_alone_carries_nothing(
    trained, audit_record
) -> None:
    for training, says in (
        ({"stages": ["pretraining"]}, "stages pretraining, the policy allows alignment too"),
        (None, "stages none, the policy allows alignment, pretraining too"),
    ):
        write_file(trained.audit_path, json.dumps(audit_record | {"training": training}))
        (line,) = privacy_report(trained).unsubstantiated
        assert says in line


def test_training_that_no_audit_covers_is_said_plainly(home, tmp_path) -> None:
    report = privacy_report(set_site(home, "more_devices", '["cpu"]'))

    (line,) = report.not_audited
    assert line.startswith("several devices together (cpu, cpu)")
    page, _ = write_privacy_report(report, tmp_path)
    assert "several devices together" in page.read_text()
    assert privacy_report(set_site(home, "name", '"other"')).code_sha256 == report.code_sha256


def test_answers_whose_times_count_patients_are_named(home) -> None:
    assert not any("answers" in line for line in privacy_report(home).unsubstantiated)
    lines = privacy_report(set_site(home, "answer_every_s", "0")).unsubstantiated
    assert any('set answer_every_s = "auto"' in line for line in lines)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('"auto"', 'answer_every_s = "auto"), an answer waits, sealed'),
        ("7200", "answer_every_s = 7200), an answer waits, sealed"),
        ("0", "(answer_every_s = 0), answers leave as soon as they are ready"),
    ],
)
def test_what_a_clock_tells_is_said_as_the_site_is_set(home, tmp_path, value, says) -> None:
    report = privacy_report(set_site(home, "answer_every_s", value))
    page = html.unescape(write_privacy_report(report, tmp_path)[0].read_text())
    assert says in page
    assert ("roughly how many patients a round drew, which shows" in page) == (value == "0")
    assert "nothing here closes" not in page


def test_many_updates_are_one_row_for_each_plan_and_a_list_behind_it(
    home, coordinator, tmp_path
) -> None:
    """What an officer signs has a row that can be read; no update is left out of the list."""
    values = plan_values(coordinator.foundation.manifest.hash)
    first, second = (
        coordinator.plan(
            study=values["study"] | {"name": name},
            stage=[values["stage"][0] | {"rounds": 6}],
            privacy=values["privacy"] | {"delta": 4e-4},
        )
        for name in ("first", "second")
    )
    releases = [64 * str(number) for number in range(1, 8)]
    for number, release in enumerate(releases[:5], start=1):
        charges.commit(home, charges.charge(home, first, number=number), release)
    charges.charge(home, first, number=6)
    for number, release in enumerate(releases[5:], start=1):
        charges.commit(home, charges.charge(home, second, number=number), release)

    report = privacy_report(home)
    page = write_privacy_report(report, tmp_path)[0].read_text()

    assert [(sent.plan_hash, sent.updates) for sent in report.sent] == [
        (first.hash, 5), (second.hash, 2),
    ]  # fmt: skip
    events = next(
        plan.events for plan in Ledger(home.ledger_path).plans("main")
        if plan.plan_hash == first.hash
    )  # fmt: skip
    assert report.sent[0].steps == sum(event.steps for event in events)
    assert report.sent[0].epsilon == accounting.epsilon(events, report.delta)
    assert report.sent[0].first == report.transmissions[0].committed_at
    assert report.sent[0].last == report.transmissions[4].committed_at
    section = page.partition("<h2>Everything that left</h2>")[2].partition("<h2>")[0]
    shown, _, folded = section.partition("<details>")
    assert shown.count("<tr>") == 3
    assert all(release[:16] not in shown for release in releases)
    assert folded.count("<tr>") == 1 + len(releases)


def test_every_group_of_the_audits_checks_is_named(home, tmp_path) -> None:
    """The engine is asked the same in each; without its name a row cannot be told from another."""
    fast = audit_engine(num_canaries=50, seed=0)
    write_file(home.audit_path, json.dumps(asdict(fast) | {"passed": True, "training": None}))
    page = write_privacy_report(privacy_report(home), tmp_path)[0].read_text()
    heads = re.findall(r'<tr><th colspan="2">(.+?)</th></tr>', page)
    assert heads == [
        "patients one by one, clipping to a fixed bound",
        "several patients to a pass, clipping to a fixed bound",
        "patients one by one, automatic clipping",
        "the noise source by itself",
    ]
    groups = page.partition(heads[0])[2].partition("</table>")[0].split("<th colspan")
    assert [group.count("is the noise Gaussian around zero?") for group in groups] == [1, 1, 1, 0]


def test_an_update_without_a_record_is_named(trained) -> None:
    (trained.outbox_path / "releases.jsonl").unlink()

    report = privacy_report(trained)

    assert report.transmissions[0].num_bytes is None
    assert report.sent[0].num_bytes is None
    assert any("no record of 1 committed" in line for line in report.unsubstantiated)


def test_a_torn_record_does_not_hide_the_next_one(trained) -> None:
    records = trained.outbox_path / "releases.jsonl"
    whole = records.read_text()
    records.write_text('{"hash": "to' + "\n" + whole)

    assert privacy_report(trained).transmissions[0].num_bytes is not None


def charge(home: SiteHome, life: Lifetime, target: float, *, noise_multiplier: float) -> None:
    """One step of another plan."""
    Ledger(home.ledger_path).reserve(
        cohort="main",
        plan_hash="0" * 64,
        run_id="next",
        round=1,
        stage="pretraining",
        event=PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=0.5, steps=1),
        request_hash="0" * 64,
        lifetime=life,
        plan_limit=PlanLimit(max_epsilon=target, delta=1e-3),
    )


def test_training_without_noise_has_no_bound_and_says_so(trained) -> None:
    unlimited = Lifetime(max_epsilon=math.inf, delta=1e-3, filters=("sums",))
    charge(trained, unlimited, math.inf, noise_multiplier=0.0)

    report = privacy_report(trained)

    assert report.lifetime.epsilon is None
    assert report.lifetime.max_true_positive_rate == 1.0
    assert report.charged_and_not_sent == 1
    assert any("without noise" in line for line in report.unsubstantiated)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_accountants_that_disagree_are_named(trained, monkeypatch, factor: float) -> None:
    """An accountant of record that is off by a tenth, too high or too low."""
    right = accounting.epsilon
    monkeypatch.setattr(accounting, "epsilon", lambda *a, **k: factor * right(*a, **k))

    assert any("accountants disagree" in line for line in privacy_report(trained).unsubstantiated)


def test_more_than_the_policy_allows_is_named(trained) -> None:
    policy = (trained.path / "policy.toml").read_text()
    (trained.path / "policy.toml").write_text(
        policy.replace("max_epsilon = 20.0", "max_epsilon = 0.5")
    )

    report = privacy_report(SiteHome.open(trained.path))

    assert any("lifetime budget" in line for line in report.unsubstantiated)


def test_a_delta_above_one_patients_share_is_named(trained) -> None:
    for patients, is_named in ((1000, False), (1001, True)):
        site = set_site(trained, "declared_patients", str(patients))
        lines = privacy_report(site).unsubstantiated
        assert any(line.startswith("delta:") for line in lines) is is_named


def test_a_site_that_trained_nothing_spent_nothing(home, tmp_path) -> None:
    report = privacy_report(home)

    assert (report.lifetime.epsilon, report.transmissions) == (0.0, ())
    assert report.lifetime.max_true_positive_rate == pytest.approx(0.01)
    page, _ = write_privacy_report(report, tmp_path)
    assert "nothing left this site" in page.read_text()
    assert not home.ledger_path.exists()


def test_a_tampered_ledger_gives_no_report(trained) -> None:
    data = trained.ledger_path.read_bytes()
    trained.ledger_path.write_bytes(data.replace(b"pretraining", b"pretraininG"))

    with pytest.raises(LedgerTamperedError):
        privacy_report(trained)


@pytest.mark.parametrize("noise", [0.7, 1.0, 3.0])
def test_attack_odds_of_one_gaussian_are_the_closed_form(noise: float) -> None:
    """Neyman-Pearson: TPR = Phi(Phi^-1(FPR) + 1 / sigma)."""
    event = PrivacyEvent(noise_multiplier=noise, sample_rate=1.0, steps=1)
    expected = stats.norm.cdf(stats.norm.ppf(0.01) + 1 / noise)

    odds = accounting.max_true_positive_rate([event], 0.01)

    assert expected <= odds == pytest.approx(expected, rel=0.03)


def test_attack_odds_are_never_above_what_one_epsilon_and_delta_give() -> None:
    event = PrivacyEvent(noise_multiplier=1.5, sample_rate=0.3, steps=20)
    bound = math.exp(accounting.epsilon([event], 1e-4)) * 0.01 + 1e-4

    assert 0.01 < accounting.max_true_positive_rate([event], 0.01) <= bound


ATTACK = {
    "patients": 8,
    "attacks": [{"name": "loss", "auc": 0.731, "auc_interval": [0.6, 0.8]}],
    "memorisation": {"share_nearer_members": 0.5},
}


def test_an_attack_is_reported_only_if_asked_and_to_the_owner_alone(
    home, tmp_path, monkeypatch
) -> None:
    """It is computed from patients without noise."""
    monkeypatch.chdir(tmp_path)
    asked = run("report", "--home", home.path, "--with-attack")
    assert "no attack at" in asked.stderr
    write_file(home.leakage_path, json.dumps(ATTACK), mode=0o600)

    run("report", "--home", home.path)
    assert '"leakage":null' in run("report", "--home", home.path, "--json").stdout
    assert '"leakage":{' in run("report", "--home", home.path, "--with-attack", "--json").stdout

    written = {path.name: path for path in tmp_path.glob("privacy-report*")}
    assert written.keys() == {"privacy-report.html", "privacy-report.json"}
    assert all("0.73" not in path.read_text() for path in written.values())
    for name in ("privacy-report-with-attack.html", "privacy-report-with-attack.json"):
        assert "0.73" in (home.path / name).read_text()
        assert (home.path / name).stat().st_mode & 0o777 == 0o600
        run("report", "--home", home.path, "--with-attack", "--out", tmp_path / "out")
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o600


def test_the_page_shows_delta_rounded_up_and_times_the_declared_patients(
    tmp_path, foundation, coordinator
) -> None:
    home = make_site_home(
        *(tmp_path / "site", foundation, coordinator.public_key),
        declared_patients=7,
        max_delta=1.491e-4,
    )
    page, _ = write_privacy_report(privacy_report(home), tmp_path)
    assert "at delta 0.00015, whatever plans" in page.read_text()
    assert "Delta times the 7 declared patients is 0.00105" in page.read_text()


def test_with_several_plans_the_odds_are_those_of_the_limit(trained, tmp_path) -> None:
    """The curve of all steps together bounds nothing once plans were chosen along the way."""
    by_curve = privacy_report(trained).lifetime.max_true_positive_rate
    file = trained.path / "policy.toml"
    file.write_text(file.read_text().replace("max_delta = 0.001", "max_delta = 0.005"))
    site = SiteHome.open(trained.path)
    charge(site, site.policy.lifetime, 0.5, noise_multiplier=50.0)

    report = privacy_report(site)

    assert (report.plans, report.filters[0].epsilon) == (2, 8.5)
    odds = accounting.true_positive_rate(0.01, 20.0, 0.005)
    assert report.lifetime.max_true_positive_rate == odds > by_curve
    page, _ = write_privacy_report(report, tmp_path)
    assert "had all these plans been fixed beforehand" in page.read_text()


def test_no_bound_is_promised_where_no_filter_holds(trained, tmp_path) -> None:
    file = trained.path / "policy.toml"
    file.write_text(file.read_text().replace("max_epsilon = 20.0", "max_epsilon = 0.5"))
    page, _ = write_privacy_report(privacy_report(SiteHome.open(trained.path)), tmp_path)
    assert "is bounded for life by" not in page.read_text()
    assert "No filter of this site" in page.read_text()
    file.write_text(file.read_text().replace("max_epsilon = 0.5", "max_epsilon = 20.0"))
    file.write_text(file.read_text().replace('["sums"]', '["renyi:3"]'))
    lines = privacy_report(SiteHome.open(trained.path)).unsubstantiated
    assert any("set it back" in line for line in lines)
