"""Who has the link sees the study as it is; others see nothing, and nobody can do anything."""

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from crafts_core.page_token import TokenError, token_of
from crafts_core.plan import Plan
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.dashboard import make_app
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.receipts import Refusal, RoundReceipt
from crafts_server.registry import CheckpointRecord
from crafts_server.status import SiteStatus
from crafts_server.study_view import site_line
from support.hostile import TEXT
from support.receipts import receipt
from support.served import served
from support.sites import plan_values

CHROMIUM = shutil.which("chromium")
STATE = {"a": torch.ones(2)}
MARKUP = "<img src=x onerror=alert(1)>"


def first_round() -> RoundReceipt:
    refusal = Refusal(site="dresden", reason=f"code 101: {MARKUP} {TEXT}".replace("\ud800", ""))
    changes = {"refused": (refusal,), "missing": ("essen",), "step_scale": 0.5, "seconds": 42.0}
    return receipt(aachen=0.6, bern=0.4).model_copy(update=changes)


@pytest.fixture
def home(tmp_path: Path, foundation) -> CoordinatorHome:
    """With one run of one round, over two of four sites."""
    config = HomeConfig(foundation=str(foundation.path))
    home = CoordinatorHome.create(tmp_path / "coordinator", config)
    plan = Plan.parse(plan_values(foundation.manifest.hash))
    home.sign_plan(plan)
    registry = home.registry()
    CohortSizes(registry).agree("aachen", 120)
    registry.start_run("run", plan.hash)
    parent = None
    for told in (None, first_round()):
        parent = home.checkpoints("run").write(
            run_id="run",
            plan_hash=plan.hash,
            parent=parent,
            state=STATE,
            server_state=STATE,
            receipt=told,
        )
        record = CheckpointRecord(
            round=parent.round, manifest_hash=parent.hash, state_hash=parent.manifest.state_hash
        )
        registry.record("run", record, told)
    registry.close()
    return home


@pytest.fixture
def token(home: CoordinatorHome) -> str:
    return token_of(home.path)


@pytest.fixture
def browser(home: CoordinatorHome, token: str) -> TestClient:
    return TestClient(make_app(home.path, token), follow_redirects=False)


def test_who_has_the_link_sees_runs_and_rounds(browser: TestClient, token: str) -> None:
    study = browser.get(f"/{token}/").text
    assert 'href="runs/run"' in study
    assert "does not serve" in study
    run = browser.get(f"/{token}/runs/run").text
    told = ["halved to 0.5", "42.0 s", "aachen", "0.60", "dresden", "essen", "adapter <code>aaaa"]
    assert [words for words in told if words not in run] == []


def test_who_has_not_sees_the_same_as_where_nothing_is(browser: TestClient, token: str) -> None:
    nothing = browser.get("/nothing/here/at/all")
    for path in ("/", "/x/", f"/{token[:-1]}/", f"/{token}x/", "/x/runs/run", "/docs", "/é/"):
        answer = browser.get(path)
        assert (answer.status_code, answer.content) == (404, nothing.content), path
    assert b"run" not in nothing.content


def test_every_answer_is_closed(browser: TestClient, token: str) -> None:
    nonces = set()
    for path in (f"/{token}/", f"/{token}/runs/run", "/x/", f"/{token}/runs/none"):
        headers = browser.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'; style-src 'nonce-" in policy
        assert "script-src" not in policy
        assert (headers["cache-control"], headers["referrer-policy"]) == ("no-store", "no-referrer")
        assert (headers["x-frame-options"], headers["x-content-type-options"]) == (
            "DENY",
            "nosniff",
        )
        nonces.add(policy)
    assert len(nonces) == 4


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
def test_nothing_can_be_done(browser: TestClient, token: str, method: str) -> None:
    assert getattr(browser, method)(f"/{token}/").status_code == 405


def test_text_of_a_site_acts_on_no_page(browser: TestClient, token: str) -> None:
    run = browser.get(f"/{token}/runs/run").text
    assert "<img" not in run
    assert "&lt;img src=x" in run
    assert "<script" not in run
    assert all(line.isprintable() for line in run.split("\n"))


def test_what_cannot_be_read_is_one_line(
    browser: TestClient, home: CoordinatorHome, token: str
) -> None:
    answer = browser.get(f"/{token}/runs/none")
    assert (answer.status_code, "no run none" in answer.text) == (404, True)
    shutil.rmtree(home.path / "checkpoints" / "run" / "round-0000")
    answer = browser.get(f"/{token}/runs/run")
    assert (answer.status_code, "\n" in answer.text) == (503, False)


def test_the_token_is_the_owners_and_stays(home: CoordinatorHome, token: str) -> None:
    file = home.path / "dashboard.token"
    assert file.stat().st_mode & 0o777 == 0o600
    assert token_of(home.path) == token
    file.unlink()
    assert token_of(home.path) != token
    file.write_text("short")
    with pytest.raises(TokenError, match="holds no token"):
        token_of(home.path)


@pytest.mark.parametrize(
    ("name", "standing", "why"),
    [
        ("aachen", "up", "round 1, weight 0.60"),
        ("dresden", "refused", "round 1: code 101"),
        ("essen", "late", "had not answered when round 1 closed"),
        ("fulda", "waiting", "was not there in round 1"),
    ],
)
def test_a_site_stands_as_in_the_newest_round(name: str, standing: str, why: str) -> None:
    site = SiteStatus(name=name, state="enrolled", patients=9, last_contact=datetime.now(UTC))
    line = site_line(site, first_round())
    assert line.standing == standing
    assert line.why.startswith(why)
    revoked = SiteStatus(name=name, state="revoked", patients=9, last_contact=None)
    assert site_line(revoked, first_round()).standing == "revoked"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it(home: CoordinatorHome, token: str, tmp_path: Path) -> None:
    """Its style is let in by the policy: the bars of weights have their colour."""
    with served(make_app(home.path, token)) as address:
        command = [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,1400"),
            *(
                "--timeout=8000",
                f"--screenshot={tmp_path / 'page.png'}",
                f"{address}{token}/runs/run",
            ),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert (0x3B, 0x7E, 0xA1) in colours or (0x6F, 0xB1, 0xD4) in colours, done.stderr
