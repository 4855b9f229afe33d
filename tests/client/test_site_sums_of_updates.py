"""A site's own private update in a sum: its own guarantee, charged once, and one vector a word."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crafts_client.home import SiteHome
from crafts_client.outbox import Outbox, Release
from crafts_client.policy import PolicyError, Rule
from crafts_client.privacy_report import privacy_report, write_privacy_report
from crafts_client.site import Site
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, entropy_generator
from crafts_core.array_bytes import PACKED
from crafts_core.exchange import Announcement, MaskedReply
from crafts_core.plan import Plan
from crafts_core.state import State
from crafts_privacy.ledger import Ledger
from crafts_privacy.noise import GridNoise
from crafts_privacy.secure_aggregation.members import announce
from crafts_privacy.secure_aggregation.updates import UpdateGrid
from support.clocks import ManualClock
from support.noise import FixedSampler, SeededNoise
from support.sites import Coordinator
from support.sum_study import SumStudy, kinds, set_policy, summing_home, values_of_updates
from support.sums import SumSite


def updating_home(path: Path, foundation, coordinator: Coordinator, **changes: object) -> SiteHome:
    """Of a hospital that relies on nobody's noise."""
    policy = {
        "allowed_trust": ("site",),
        "max_epsilon_alone": None,
        "require_secure_aggregation": True,
    }
    return summing_home(path, foundation, coordinator, **(policy | changes))


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator: Coordinator) -> SiteHome:
    return updating_home(tmp_path / "site", foundation, coordinator)


@pytest.fixture
def study(coordinator: Coordinator, foundation, home: SiteHome) -> SumStudy:
    plan = Plan.parse(values_of_updates(foundation.manifest.hash))
    return SumStudy(coordinator, foundation, home, plan)


@pytest.fixture
def site(home: SiteHome, foundation, study: SumStudy) -> Site:
    return Site(home, foundation)


def site_that_draws(home: SiteHome, foundation, noise, sampler) -> Site:
    return Site(
        home,
        foundation,
        randomness=Randomness(noise=noise, sampler=sampler, generator=entropy_generator),
    )


def test_a_vector_opens_to_the_weighted_update_on_the_grid(
    home, foundation, study, monkeypatch
) -> None:
    """What the trainer gave, noise and all, for the site's part of all members' patients."""
    trained: list[State] = []
    train = Trainer.train

    def noted(*args: object, **options: object) -> State:
        trained.append(train(*args, **options))  # type: ignore[arg-type]
        return trained[-1]

    monkeypatch.setattr(Trainer, "train", noted)
    site = site_that_draws(home, foundation, SeededNoise(1), FixedSampler())
    request, ready = study.request(), study.ready(site)
    announcement = study.announcement(request, ready)
    release = site.add_to_sum(study.tell(request, announcement))
    (update,) = trained
    flat_D = torch.cat([update[name].reshape(-1) for name in sorted(update)]).double()
    patients = {each.site: each.declared_patients for each in announcement.members}
    weight = ready.declared_patients / sum(patients.values())
    step = step_of(study, announcement)
    assert torch.equal(study.opened(release, announcement), (flat_D * weight / step).round())
    assert flat_D.any()


def step_of(study: SumStudy, announcement: Announcement) -> float:
    patients = {ready.site: ready.declared_patients for ready in announcement.members}
    noise = max(ready.noise_multiplier for ready in announcement.members)
    return UpdateGrid.of(study.plan, study.plan.stage[0], patients, noise_multiplier=noise).step


@pytest.mark.slow
def test_it_is_charged_and_recorded_as_the_update_of_a_plain_round(home, site, study) -> None:
    """One guarantee: whole noise, every local step, no share that others' noise must fill up."""
    release = study.add(site)
    assert isinstance(release.reply, MaskedReply)
    ledger = Ledger(home.ledger_path)
    (event,) = ledger.events("main")
    assert (event.steps, kinds(home)) == (2, ["reserved", "committed"])
    assert release.reply.own_noise_multiplier == event.noise_multiplier
    assert ledger.events_alone("main") == (event,)
    assert release.share is None
    report = privacy_report(home)
    assert (report.sums, report.summed_updates, report.charged_and_not_sent) == (None, 1, 0)
    page, _ = write_privacy_report(report, home.path / "report")
    text = page.read_text()
    assert "1 updates with all the noise of this promise left in sums" in text
    assert "All noise is added here" in text


def test_the_vector_of_a_site_that_holds_nobody_has_the_whole_noise(
    home, foundation, study, monkeypatch
) -> None:
    """Two-sided, through everything that a site does; a share for two would be half as much."""
    monkeypatch.setattr(FixedSampler, "sample", lambda *_: np.arange(0))
    site = site_that_draws(home, foundation, GridNoise(), FixedSampler())
    privacy, stage = study.plan.privacy, study.plan.stage[0]
    drawn: list[float] = []
    for attempt in range(1, 4):
        request = study.request(attempt=attempt)
        ready = study.ready(site, attempt=attempt)
        announcement = study.announcement(request, ready)
        release = site.add_to_sum(study.tell(request, announcement))
        assert isinstance(release.reply, MaskedReply)
        own, patients = release.reply.own_noise_multiplier, ready.declared_patients
        in_step = own * privacy.max_grad_norm / (privacy.sample_rate * patients)
        total = sum(each.declared_patients for each in announcement.members)
        std = stage.learning_rate * in_step * stage.local_steps**0.5 * patients / total
        step = step_of(study, announcement)
        drawn += (study.opened(release, announcement) * step / std).tolist()
    spread = float(np.mean(np.square(drawn)))
    assert spread == pytest.approx(1.0, abs=5 * (2 / len(drawn)) ** 0.5)


def test_until_the_members_are_known_nothing_is_on_disk(home, site, study) -> None:
    first = study.ready(site)
    assert study.ready(site) == first
    assert not list(home.outbox_path.glob("*.safetensors"))
    assert kinds(home) == ["reserved"]


def test_an_update_leaves_in_one_sum_only(home, site, study) -> None:
    """Two sums of it over other members could be subtracted. Again the same bytes, or nothing."""
    request, ready = study.request(), study.ready(site)
    announcement = study.announcement(request, ready)
    release = site.add_to_sum(study.tell(request, announcement))
    again = site.add_to_sum(study.tell(request, announcement))
    assert (again.hash, words(again)) == (release.hash, words(release))
    more = study.peer("south", 77, request.hash)
    more.declared_patients = 33
    more.identity = study.peers(request.hash)["south"].identity
    other = announce([ready, study.peers(request.hash)["east"].ready, more.word(request.hash)])
    with pytest.raises(PolicyError, match="another announcement"):
        site.add_to_sum(study.tell(request, other))
    next_attempt = study.add(site, attempt=2)
    assert np.mean(np.array(words(next_attempt)) == np.array(words(release))) < 0.01
    assert len(Ledger(home.ledger_path).events("main")) == 2, "drawn, noised and charged anew"
    assert len(Outbox(home.outbox_path).records()) == 2


def test_an_attempt_is_answered_once_whatever_adapter_is_asked_for(home, site, study) -> None:
    """A later attempt too: which one was charged is in the ledger, and outlives the process."""
    study.add(site, attempt=2)
    other: State = {name: value + 0.01 for name, value in study.state.items()}
    for attempt in (1, 2):
        with pytest.raises(PolicyError, match="replay"):
            site.answer(study.ask(study.request(attempt=attempt, state=other), other))
    assert kinds(home) == ["reserved", "committed"]


def words(release: Release) -> list[int]:
    found: list[int] = release.delta[PACKED].tolist()
    return found


@pytest.mark.slow
def test_a_site_that_was_left_out_pays_once(
    tmp_path: Path, foundation, coordinator: Coordinator
) -> None:
    """Ready, in time, and not taken; then a vector leaves."""
    home = updating_home(tmp_path / "patient", foundation, coordinator, answer_every_s=60.0)
    plan = Plan.parse(values_of_updates(foundation.manifest.hash))
    study = SumStudy(coordinator, foundation, home, plan)
    site = Site(home, foundation, clock=ManualClock().clock)
    for number, attempt in ((1, 1), (1, 2), (2, 1)):
        study.ready(site, number, attempt)
    study.add(site, 3)
    assert len(Ledger(home.ledger_path).events("main")) == 1
    assert kinds(home) == ["reserved", *["carried"] * 3, "committed"]


@pytest.mark.slow
def test_a_stage_with_other_steps_is_charged_anew(
    tmp_path: Path, foundation, coordinator: Coordinator
) -> None:
    """A charge is for an event: it is closed at the stage's boundary, and nobody is refused."""
    home = updating_home(tmp_path / "patient", foundation, coordinator, answer_every_s=60.0)
    values = values_of_updates(foundation.manifest.hash, rounds=1)
    (first,) = values["stage"]  # type: ignore[misc]
    values["stage"] = [first, first | {"local_steps": 1}]
    study = SumStudy(coordinator, foundation, home, Plan.parse(values))
    site = Site(home, foundation, clock=ManualClock().clock)
    study.ready(site, 1)
    study.ready(site, 2)
    assert [event.steps for event in Ledger(home.ledger_path).events("main")] == [2, 1]
    assert kinds(home) == ["reserved", "committed", "reserved"]


def test_the_roster_is_asked_before_anything_is_charged(home, site, study) -> None:
    home.roster_approvals.take_back(study.plan.hash)
    with pytest.raises(PolicyError) as refused:
        study.ready(site)
    assert (refused.value.rule, kinds(home)) == (Rule.ROSTER, [])


def uncapped(study: SumStudy, rule: str, sizes: dict[str, int], monkeypatch) -> None:
    """A coordinator's plan whose caps never bind, over peers of such sizes."""
    values = values_of_updates(study.plan.study.foundation)
    caps = {"rule": rule, "max_weight": 1.0, "max_weight_per_share": 100.0}
    values["aggregation"] |= caps  # type: ignore[operator]
    study.plan = Plan.parse(values)

    def peers(request_hash: str) -> dict[str, SumSite]:
        made = {}
        for number, (name, size) in enumerate(sizes.items(), start=2):
            made[name] = study.peer(name, number, request_hash)
            made[name].declared_patients = size
            made[name].ready = made[name].word(request_hash)
        return made

    monkeypatch.setattr(study, "peers", peers)
    study.home.roster_approvals.approve(study.roster())


@pytest.mark.parametrize("rule", ["by_patients", "alignment_regularized"])
def test_a_site_is_not_most_of_a_sum_whatever_the_plan_says(
    home, site, study, monkeypatch, rule: str
) -> None:
    """Said before anything is drawn, of one large and two tiny hospitals."""
    uncapped(study, rule, {"east": 1, "south": 2}, monkeypatch)
    with pytest.raises(PolicyError, match=r"at most 0\.6 is hidden") as refused:
        study.ready(site)
    assert (refused.value.rule, kinds(home)) == (Rule.MEMBERS, [])
    uncapped(study, "uniform", {"east": 1, "south": 2}, monkeypatch)
    study.add(site)


def test_a_site_is_not_most_of_a_sum_whoever_is_announced(home, site, study, monkeypatch) -> None:
    """A coordinator chooses, of those who are ready, whom it announces."""
    uncapped(study, "by_patients", {"east": 1, "south": 2, "west": 40}, monkeypatch)
    request, ready = study.request(), study.ready(site)
    peers = study.peers(request.hash)
    alone = announce([ready, peers["east"].ready, peers["south"].ready])
    with pytest.raises(PolicyError, match=r"this site would be 0\.77") as refused:
        site.add_to_sum(study.tell(request, alone))
    assert (refused.value.rule, kinds(home)) == (Rule.MEMBERS, ["reserved"])
    site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert kinds(home) == ["reserved", "committed"]


def test_an_update_that_is_too_long_is_charged_and_closed(home, site, study) -> None:
    """As in a plain round: neither a word nor a vector."""
    set_policy(home, max_update_norm=1e-9)
    with pytest.raises(PolicyError) as refused:
        study.ready(site)
    assert refused.value.rule is Rule.UPDATE_NORM
    assert kinds(home) == ["reserved", "committed"]
    assert Outbox(home.outbox_path).records() == {}


@pytest.mark.slow
def test_what_a_crash_left_sealed_is_committed(home, foundation, site, study, monkeypatch) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", die)
        with pytest.raises(KeyboardInterrupt):
            study.add(site)
    again = Site(home, foundation)
    assert kinds(home) == ["reserved", "committed"]
    with pytest.raises(PolicyError, match="replay"):
        again.answer(study.ask(study.request()))
