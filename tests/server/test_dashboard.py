"""Who has the link sees the study as it is; others see nothing, and nobody can do anything."""

import itertools
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from crafts_core.page_token import TokenError, token_of
from crafts_core.plan import Plan
from crafts_core.provenance import read_provenance
from crafts_core.starting_point import initial_state
from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.signing import fingerprint
from crafts_server import study_view
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.dashboard import make_app
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.plan_queue import fail_plan, queue_plan
from crafts_server.receipts import Refusal, RoundReceipt, SumReceipt
from crafts_server.registry import CheckpointRecord
from crafts_server.round_costs import round_costs
from crafts_server.samples import draw_samples, samples_of
from crafts_server.status import SiteStatus
from crafts_server.study_view import site_line
from support.browsers import chromium
from support.hostile import TEXT
from support.receipts import receipt
from support.served import served
from support.sites import plan_values

MARKUP = "<img src=x onerror=alert(1)>"
NOW = datetime.now(UTC)


def site(name: str, *, state: str = "enrolled", last_contact: datetime | None = NOW) -> SiteStatus:
    return SiteStatus(
        name=name, state=state, patients=9, last_contact=last_contact, certificate_ends=None
    )


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
    start = initial_state(foundation, plan.adapter, plan.study.seed, plan.parts)
    moved = {name: tensor + 0.3 for name, tensor in start.items()}
    for told, state in ((None, start), (first_round(), moved)):
        parent = home.checkpoints("run").write(
            run_id="run",
            plan_hash=plan.hash,
            parent=parent,
            state=state,
            server_state={"momentum": torch.zeros(2)},
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


def test_the_newest_rounds_are_shown_with_a_link_to_all(
    browser: TestClient, home: CoordinatorHome, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks on makes the page anew every few seconds; of all rounds nobody does."""
    store = home.checkpoints("run")
    parent = store.chain()[-1]
    store.write(
        run_id="run",
        plan_hash=parent.manifest.plan_hash,
        parent=parent,
        state=parent.state(),
        server_state={},
        receipt=first_round().model_copy(update={"round": 2}),
    )
    monkeypatch.setattr(study_view, "NEWEST", 1)
    newest = browser.get(f"/{token}/runs/run").text
    assert "Round 2," in newest
    assert "Round 1," not in newest
    assert 'href="run/all">all 2 rounds<' in newest
    whole = browser.get(f"/{token}/runs/run/all").text
    assert "Round 2," in whole
    assert "Round 1," in whole
    assert 'href="../../"' in whole
    assert ("http-equiv" in newest, "http-equiv" in whole) == (True, False)


def test_who_signed_the_plan_is_shown_if_it_verifies(
    browser: TestClient, home: CoordinatorHome, token: str
) -> None:
    shown = browser.get(f"/{token}/runs/run").text
    assert f"signed by <code>{fingerprint(home.public_key)}</code>" in shown
    registry = home.registry()
    (plan,) = registry.plans()
    registry.add_plan(replace(plan, json=plan.json.replace('"seed":3', '"seed":4')))
    registry.close()
    answer = browser.get(f"/{token}/runs/run")
    assert (answer.status_code, "signature" in answer.text) == (503, True)


def test_what_is_altered_after_a_look_is_seen_at_the_next(
    browser: TestClient, home: CoordinatorHome, token: str
) -> None:
    assert browser.get(f"/{token}/runs/run").status_code == 200
    file = home.path / "checkpoints" / "run" / "round-0001" / "receipt.json"
    file.write_text(file.read_text().replace("42.0", "41.0"))
    assert browser.get(f"/{token}/runs/run").status_code == 503


@pytest.mark.slow
def test_ten_prompts_are_drawn_once_beside_the_foundation(
    browser: TestClient, home: CoordinatorHome, token: str, foundation
) -> None:
    plan = Plan.parse(plan_values(foundation.manifest.hash))
    page = f"/{token}/runs/run"
    assert "crafts-server runs draw run" in browser.get(page).text
    assert draw_samples(home, "run", plan, device="cpu") == 1
    files = sorted((home.path / "checkpoints" / "run" / "samples").rglob("*.png"))
    written = [file.stat().st_mtime_ns for file in files]
    assert draw_samples(home, "run", plan, device="cpu") == 1
    assert [file.stat().st_mtime_ns for file in files] == written

    drawn = samples_of(home, plan, home.checkpoints("run").chain())
    assert drawn is not None
    assert drawn.round == 1
    assert len(drawn.pairs) == len({pair.prompt for pair in drawn.pairs}) == 10
    assert all(pair.foundation != pair.checkpoint for pair in drawn.pairs)
    assert all(read_provenance(file).synthetic for file in files)
    assert browser.get(page).text.count('src="data:image/png;base64,') == 20


@pytest.mark.slow
def test_a_round_costs_what_its_sites_declared(foundation) -> None:
    """Another noise and rate than the plan's: what was declared counts, round after round."""
    values = plan_values(foundation.manifest.hash)
    plan = Plan.parse(values | {"privacy": values["privacy"] | {"delta": 1e-5}})
    loud = receipt(aachen=0.6, bern=0.4)
    weak = loud.sites[1].model_copy(update={"noise_multiplier": 0.8})
    later = loud.model_copy(update={"round": 2, "sites": (loud.sites[0], weak)})
    first, second = round_costs(plan, [loud, later])

    def epsilon(*noises: float) -> float:
        events = [PrivacyEvent(noise_multiplier=n, sample_rate=0.5, steps=1) for n in noises]
        return accounting.epsilon(events, 1e-5)

    assert first.lowest == first.highest == pytest.approx(epsilon(1.0), abs=2e-3)
    assert second.lowest == pytest.approx(epsilon(1.0, 1.0), abs=2e-3)
    assert second.highest == pytest.approx(epsilon(1.0, 0.8), abs=2e-3)
    assert "to" in second.in_words
    silent = loud.sites[1].model_copy(update={"noise_multiplier": 0.0})
    (none,) = round_costs(plan, [loud.model_copy(update={"sites": (silent,)})])
    assert none.in_words.startswith("no epsilon")


def test_ever_other_noise_of_a_site_counts_as_its_least(foundation) -> None:
    """Else one site could make the page compose a hundred kinds of steps."""
    plan = Plan.parse(plan_values(foundation.manifest.hash))
    first = receipt(aachen=0.6)
    receipts = [
        first.model_copy(
            update={
                "round": number,
                "sites": (first.sites[0].model_copy(update={"noise_multiplier": 1 + number / 64}),),
            }
        )
        for number in range(1, 7)
    ]
    costs = [cost.highest for cost in round_costs(plan, receipts)]
    assert costs == sorted(costs)
    weakest = PrivacyEvent(noise_multiplier=1 + 1 / 64, sample_rate=0.5, steps=6)
    delta = plan.privacy.delta
    bound = accounting.epsilon([weakest], delta, discretization=accounting.COARSE)
    assert 0.9 * bound < costs[-1] <= bound


def test_the_newest_rounds_cost_what_all_before_them_add_up_to(foundation) -> None:
    """Also where sites told nothing in the first that is asked for."""
    plan = Plan.parse(plan_values(foundation.manifest.hash))
    loud = receipt(aachen=0.6)
    receipts = [loud, loud, loud.model_copy(update={"sites": ()}), loud]
    assert round_costs(plan, receipts, newest=2) == round_costs(plan, receipts)[2:]
    assert round_costs(plan, receipts, newest=30) == round_costs(plan, receipts)
    (alone,) = round_costs(plan, receipts[2:3])
    assert (alone.lowest, alone.highest) == (0.0, 0.0)


def test_of_distributed_trust_the_sums_noise_counts(foundation) -> None:
    """Each site declares its share; one of three colludes, so the noise of two counts."""
    values = plan_values(foundation.manifest.hash)
    plan = Plan.parse(values)
    changes = {"trust": "distributed", "colluding_sites": 1}
    trust = plan.model_copy(update={"privacy": plan.privacy.model_copy(update=changes)})
    read = SumReceipt(
        attempt=1,
        members=("aachen", "bern", "coimbra"),
        missing=(),
        noise_multiplier=3**0.5,
        norm=1.0,
        lowest=0.0,
        highest=9.0,
    )
    shared = receipt(aachen=0.4, bern=0.3, coimbra=0.3).model_copy(update={"sums": (read,)})
    event = PrivacyEvent(noise_multiplier=2**0.5, sample_rate=0.5, steps=1)
    epsilon = accounting.epsilon([event], plan.privacy.delta, discretization=accounting.COARSE)
    assert round_costs(trust, [shared])[0].highest == epsilon


def test_who_has_not_sees_the_same_as_where_nothing_is(browser: TestClient, token: str) -> None:
    nothing = browser.get("/nothing/here/at/all")
    for path in ("/", "/x/", f"/{token[:-1]}/", f"/{token}x/", "/x/runs/run", "/docs", "/é/"):
        answer = browser.get(path)
        assert (answer.status_code, answer.content) == (404, nothing.content), path
    assert b"run" not in nothing.content


def test_every_answer_is_closed(browser: TestClient, token: str) -> None:
    nonces = set()
    paths = ("", "runs/run", "runs/run/all", "runs/none")
    for path in (*(f"/{token}/{each}" for each in paths), "/x/"):
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
    assert len(nonces) == 5


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
    ("name", "outcome", "why"),
    [
        ("aachen", "used", "round 1, weight 0.60"),
        ("dresden", "refused", "round 1: code 101"),
        ("essen", "late", "had not answered when round 1 closed"),
        ("fulda", "", "was not there in round 1"),
    ],
)
def test_what_came_of_a_site_in_the_newest_round(name: str, outcome: str, why: str) -> None:
    line = site_line(site(name), first_round(), at=NOW)
    assert line.outcome == outcome
    assert line.why.startswith(why)
    assert site_line(site(name, state="revoked"), first_round(), at=NOW).outcome == ""


@pytest.mark.parametrize(
    ("state", "last_contact", "standing"),
    [
        ("enrolled", NOW - timedelta(minutes=4), "up"),
        ("enrolled", NOW - timedelta(days=7), "silent"),
        ("enrolled", None, "not seen"),
        ("revoked", NOW, "revoked"),
        ("invited", None, "invited"),
    ],
)
def test_up_is_who_called_just_now_whatever_the_newest_round_used(
    state: str, last_contact: datetime | None, standing: str
) -> None:
    """A study that had ended showed all up, for ever."""
    stands = site("aachen", state=state, last_contact=last_contact)
    assert site_line(stands, first_round(), at=NOW).standing == standing


def test_a_plan_without_a_run_shows_why_it_failed(
    browser: TestClient, home: CoordinatorHome, token: str, foundation
) -> None:
    values = plan_values(foundation.manifest.hash)
    plan = Plan.parse(values | {"study": values["study"] | {"name": "kidneys"}})
    queue_plan(home, plan)
    fail_plan(home, plan.hash, "this home has another foundation")
    shown = browser.get(f"/{token}/").text
    assert "kidneys" in shown
    assert "this home has another foundation" in shown


@pytest.mark.slow
@pytest.mark.network
def test_a_phone_shows_it_by_day_and_by_night(
    home: CoordinatorHome, token: str, tmp_path: Path
) -> None:
    """Nothing is wider than the screen, and the policy lets the style in."""
    papers = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 29)"}
    screen = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    with (
        chromium(tmp_path / "profile") as browser,
        served(make_app(home.path, token)) as address,
    ):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        for page, (scheme, paper) in itertools.product(("", "runs/run"), papers.items()):
            wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
            browser.get(f"{address}{token}/{page}")
            shown = browser.execute_script(
                "return [getComputedStyle(document.body).backgroundColor,"
                " document.documentElement.scrollWidth]"
            )
            assert shown == [paper, screen["width"]], page
