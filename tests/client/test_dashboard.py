"""The owner sees the site as it is; others see nothing, and nobody can do anything."""

import json
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from crafts_client import offered_now
from crafts_client.dashboard import make_app
from crafts_client.errors import EnrolmentError
from crafts_client.home import SiteHome
from crafts_client.offered_now import OfferedNow
from crafts_client.offered_plans import OfferedPlan
from crafts_client.register import PatientRegister
from crafts_client.running import _held, is_running, the_only_one
from crafts_client.site_view import site_view
from crafts_core.page_token import token_of
from crafts_core.plan import Plan
from crafts_core.tiles import TileStore
from crafts_privacy import accounting
from crafts_privacy.ledger import Ledger
from support.browsers import chromium
from support.certificates import write_certificate
from support.charges import charge, commit
from support.hostile import TEXT
from support.served import served
from support.sites import Coordinator, make_site_home

pytestmark = pytest.mark.slow

MARKUP = "<img src=x onerror=alert(1)>"
HOSTILE = f"{MARKUP} {TEXT}".replace("\ud800", "")
RELEASE = "ab" * 32


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator: Coordinator) -> SiteHome:
    """Charged for two rounds of a plan; the first left, and one patient withdrew."""
    home = make_site_home(
        tmp_path / "site", foundation, coordinator.public_key, require_approval=True
    )
    patients = TileStore.open(home.tile_store_path).patients
    register = PatientRegister(home.register_path)
    register.enrol(patients, "main")
    register.withdraw(patients[0])
    plan = coordinator.plan()
    commit(home, charge(home, plan, number=1), RELEASE)
    charge(home, plan, number=2)
    return home


def offers(*plans: Plan) -> tuple[OfferedPlan, ...]:
    """What the site might say to plans that it takes."""
    return tuple(OfferedPlan(plan=plan, refused=(), epsilon_after=12.5) for plan in plans)


def browser(home: SiteHome, *offered: OfferedPlan) -> tuple[TestClient, str]:
    token = token_of(home.path)
    now = OfferedNow(lambda: home, lambda _: offered)
    return TestClient(make_app(home.path, token, now), follow_redirects=False), f"/{token}/"


def test_the_owner_sees_cohort_ledger_and_what_left(home: SiteHome, coordinator) -> None:
    plan = coordinator.plan()
    client, link = browser(home, *offers(plan))
    page = client.get(link).text

    state = home.policy.lifetime.state(Ledger(home.ledger_path).plans("main"))
    told = [str(state), "4 steps", RELEASE[:16], "1 withdrew", "never audited", "does not run"]
    told += [f"crafts-client plan approve {plan.hash}", "12.50", "not enrolled"]
    assert [words for words in told if words not in page] == []
    assert RELEASE[:16] in client.get(f"{link}left").text


def test_the_curve_ends_where_the_filter_counts(home: SiteHome) -> None:
    view = site_view(home, OfferedNow(lambda: home, lambda _: ()).look())
    state = home.policy.lifetime.state(Ledger(home.ledger_path).plans("main"))
    events = Ledger(home.ledger_path).events("main")
    steps = accounting.epsilon(events, home.policy.max_delta, discretization=accounting.COARSE)
    assert f": {state.epsilon:.4g}</title>" in view.curve
    assert f": {steps:.4g}</title>" in view.curve
    assert f"limit for life {home.policy.max_epsilon:g}</title>" in view.curve


def test_who_has_no_token_sees_the_same_as_where_nothing_is(home: SiteHome) -> None:
    client, link = browser(home)
    nothing = client.get("/nothing/here").content
    for path in ("/", "/x/", link[:-2] + "/", "/x/left", "/docs"):
        answer = client.get(path)
        assert (answer.status_code, answer.content) == (404, nothing), path
    assert client.post(link).status_code == 405
    assert "script-src" not in client.get(link).headers["content-security-policy"]
    assert (home.path / "dashboard.token").stat().st_mode & 0o777 == 0o600


def test_text_of_others_acts_on_no_page(home: SiteHome) -> None:
    """Why a plan cannot be read, why the coordinator cannot be asked; and a record of the home."""
    bad = OfferedPlan(plan=None, refused=(HOSTILE,))
    record = {"name": HOSTILE, "auc": 0.5, "auc_interval": [0.4, 0.6], "p_value": 0.5}
    copies = {"share_nearer_members": 0.5, "interval": [0.4, 0.6], "p_value": 0.5}
    home.leakage_path.write_text(json.dumps({"attacks": [record], "memorisation": copies}))

    def fails(_: SiteHome) -> tuple[OfferedPlan, ...]:
        raise EnrolmentError(HOSTILE)

    client, link = browser(home, bad)
    asked = client.get(link).text
    token = token_of(home.path)
    failed = TestClient(make_app(home.path, token, OfferedNow(lambda: home, fails))).get(link).text
    for page in (asked, failed):
        assert "&lt;img src=x" in page
        assert "<img" not in page
        assert "<script" not in page
        assert all(line.isprintable() for line in page.split("\n"))


def test_a_damaged_ledger_is_one_line(home: SiteHome) -> None:
    client, link = browser(home)
    home.ledger_path.unlink()
    answer = client.get(link)
    assert (answer.status_code, "\n" in answer.text) == (503, False)


def test_a_lost_foundation_leaves_the_rest_of_the_page(home: SiteHome) -> None:
    file = home.path / "site.toml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("foundation")]
    file.write_text("\n".join(['foundation = "gone"', *lines]))
    client, link = browser(home)
    page = client.get(link)
    assert page.status_code == 200
    assert "no foundation at" in page.text


def test_a_defect_is_one_line_that_tells_no_more(home: SiteHome, monkeypatch, caplog) -> None:
    def overflow(_: SiteHome) -> None:
        raise OverflowError("patient0017")

    monkeypatch.setattr("crafts_client.site_view.budget_of", overflow)
    client, link = browser(home)
    answer = client.get(link)
    assert (answer.status_code, answer.text) == (
        503,
        "OverflowError: the program's log has more",
    )
    assert answer.headers["Cache-Control"] == "no-store"
    assert "patient0017" in caplog.text


def test_a_certificate_that_ends_is_on_the_page(home: SiteHome) -> None:
    client, link = browser(home)
    assert "certificate" not in client.get(link).text
    write_certificate(home.path, ends_in=timedelta(days=7, hours=1))
    assert "The site&#39;s certificate ends in 7 days; ask the coordinator" in client.get(link).text


@pytest.mark.parametrize(
    ("p_value", "told"),
    [
        (0.004, "Who was in training shows (smallest of 2 p-values, times 2: 0.008)"),
        (0.006, "No attack told who was in training (smallest of 2 p-values, times 2: 0.012;"),
    ],
)
def test_an_attacks_figures_come_with_a_verdict(home: SiteHome, p_value: float, told: str) -> None:
    """At 0.006 one attack alone would have shown something; of two it is what chance gives."""
    record = {"name": "loss", "auc": 0.7, "auc_interval": [0.6, 0.8], "p_value": p_value}
    copies = {"share_nearer_members": 0.5, "interval": [0.4, 0.6], "p_value": 0.5}
    home.leakage_path.write_text(json.dumps({"attacks": [record], "memorisation": copies}))
    client, link = browser(home)
    page = client.get(link).text
    assert told in page
    assert "0.5 is chance. An attack that fails proves nothing." in page


def test_an_attack_of_another_version_is_left_out(home: SiteHome) -> None:
    home.leakage_path.write_text('{"attacks": "none"}')
    client, link = browser(home)
    assert "No attack was made" in client.get(link).text


def test_what_breaks_while_the_coordinator_is_asked_is_said(home: SiteHome, coordinator) -> None:
    """Else plans of long ago would stand there as if they were of now."""
    plans = offers(coordinator.plan())
    offered = OfferedNow(lambda: home, lambda _: plans)
    first = offered.look()
    offered._ask = lambda _: {}["unforeseen"]
    offered._refresh()
    assert (offered._newest.at, offered._newest.plans) == (first.at, plans)
    assert "KeyError" in offered._newest.why


def test_a_look_keeps_nobody_from_taking_part(home: SiteHome) -> None:
    """A page holds the lock of ``join`` for a moment, again and again."""
    looks = _held(home, timeout_s=0.0)
    looks.__enter__()
    threading.Timer(0.1, looks.__exit__, (None, None, None)).start()
    with the_only_one(home):
        assert is_running(home)


def test_no_page_waits_for_a_coordinator_that_hangs(home: SiteHome, monkeypatch) -> None:
    answers = threading.Event()

    def hangs(_: SiteHome) -> tuple[OfferedPlan, ...]:
        answers.wait(60)
        return ()

    assert offered_now._PATIENCE_S <= 1
    monkeypatch.setattr(offered_now, "_PATIENCE_S", 0.05)
    offered = OfferedNow(lambda: home, hangs)
    began = time.monotonic()
    assert offered.look().at is None
    assert time.monotonic() - began < 30
    asking = offered._asking
    offered.look()
    assert offered._asking is asking, "it is asked once"
    answers.set()
    asking.join()
    assert offered.look().at is not None


@pytest.mark.network
def test_a_browser_shows_it_on_a_telephone(home: SiteHome, coordinator, tmp_path: Path) -> None:
    """Nothing is wider than the window, the curve has its colour, and nothing was refused."""
    token = token_of(home.path)
    plan = coordinator.plan()
    app = make_app(home.path, token, OfferedNow(lambda: home, lambda _: offers(plan)))
    with served(app) as address, chromium(tmp_path / "profile", width=500) as window:
        window.get(f"{address}{token}/")
        width = window.execute_script("return document.documentElement.scrollWidth")
        stroke = window.execute_script(
            "return getComputedStyle(document.querySelector('figure path[stroke-width]')).stroke"
        )
        assert width <= window.execute_script("return window.innerWidth")
        assert stroke.startswith("rgb(")
        assert [entry for entry in window.get_log("browser") if "favicon" not in str(entry)] == []
