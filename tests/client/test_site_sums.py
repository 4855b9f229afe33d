"""A site's part in a sum: one vector an attempt, for exactly the members that it agreed to."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Error, RecordDict

from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.errors import NotReadyError, TrainingError, WitnessError
from crafts_client.home import SiteHome
from crafts_client.mechanism import mechanism_of
from crafts_client.outbox import Outbox, Release
from crafts_client.patients import PatientTiles
from crafts_client.policy import PolicyError, Rule
from crafts_client.register import PatientRegister
from crafts_client.site import Site
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, entropy_generator
from crafts_client.witness_folders import begin_in_folder
from crafts_core.array_bytes import PACKED, unpacked_vector
from crafts_core.exchange import MaskedReply, ReadyReply
from crafts_core.plan import Plan
from crafts_core.state import State
from crafts_privacy import accounting, signing
from crafts_privacy.errors import AloneBudgetExceededError, StageSpentError
from crafts_privacy.held_sum import HeldSum
from crafts_privacy.ledger import Ledger, Share
from crafts_privacy.noise import GridNoise
from crafts_privacy.plan_noise import plan_noise_multiplier, release_events
from crafts_privacy.sampling import PoissonSampler
from crafts_privacy.secure_aggregation.members import MembersError, announce, members_hash
from crafts_privacy.signed_head import SignedHead
from support.clocks import ManualClock
from support.noise import FixedSampler, RecordedSums
from support.sites import Coordinator, flower_message
from support.sum_study import (
    STAGES,
    SumStudy,
    distributed_values,
    kinds,
    set_policy,
    summing_home,
    telling_plan,
    values_of_updates,
)
from support.sums import SumSite

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator: Coordinator) -> SiteHome:
    return summing_home(tmp_path / "site", foundation, coordinator)


@pytest.fixture
def study(coordinator: Coordinator, foundation, home: SiteHome) -> SumStudy:
    return SumStudy(coordinator, foundation, home)


@pytest.fixture
def site(home: SiteHome, foundation, study: SumStudy) -> Site:
    return Site(home, foundation)


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def words(release: Release) -> np.ndarray:
    return release.delta[PACKED].numpy().view(np.uint32)


def test_a_vector_opens_to_the_sum_with_its_share_of_noise(home, foundation, study) -> None:
    """Everybody drawn, noise recorded instead of drawn: what the others cannot know."""
    noise = RecordedSums()
    site = Site(
        home,
        foundation,
        randomness=Randomness(noise=noise, sampler=FixedSampler(), generator=entropy_generator),
    )
    ready = study.ready(site)
    assert noise.sums == []
    request = study.request()
    announcement = study.announcement(request, ready)
    release = site.add_to_sum(study.tell(request, announcement))
    assert study.opened(release, announcement).equal(noise.sums[0])
    assert noise.sums[0].any()
    assert isinstance(release.reply, MaskedReply)
    assert release.reply.members_hash == members_hash(announcement)
    (event,) = Ledger(home.ledger_path).events("main")
    own = event.noise_multiplier / 2**0.5
    assert release.reply.own_noise_multiplier == pytest.approx(own)
    assert release.share == Share(own_noise_multiplier=own, members=3, colluding_sites=1)
    assert (event.steps, kinds(home)) == (1, ["reserved", "committed"])


def test_a_share_has_the_noise_that_was_declared(home, foundation, study, monkeypatch) -> None:
    """At a site that holds nobody, two-sided, through everything that a site does."""
    monkeypatch.setattr(FixedSampler, "sample", lambda *_: np.arange(0))
    site = Site(
        home,
        foundation,
        randomness=Randomness(
            noise=GridNoise(), sampler=FixedSampler(), generator=entropy_generator
        ),
    )
    drawn: list[float] = []
    for attempt in range(1, 5):
        request = study.request(attempt=attempt)
        announcement = study.announcement(request, study.ready(site, attempt=attempt))
        release = site.add_to_sum(study.tell(request, announcement))
        assert isinstance(release.reply, MaskedReply)
        std = release.reply.own_noise_multiplier * 2.0**18
        drawn += (study.opened(release, announcement) / std).tolist()
    spread = float(np.mean(np.square(drawn)))
    assert spread == pytest.approx(1.0, abs=5 * (2 / len(drawn)) ** 0.5)


def test_until_the_members_are_known_nothing_is_on_disk(home, site, study) -> None:
    study.ready(site)
    assert not list(home.outbox_path.glob("*.safetensors"))
    assert kinds(home) == ["reserved"]
    assert "HeldSum" not in "".join(path.name for path in home.path.rglob("*"))


def test_a_site_says_the_same_word_until_its_vector_left(home, site, study) -> None:
    first = study.ready(site)
    assert study.ready(site) == first
    study.add(site)
    with pytest.raises(PolicyError, match="replay"):
        study.ready(site)
    assert kinds(home) == ["reserved", "committed"]


def test_the_same_announcement_gets_the_same_bytes_and_another_one_nothing(
    home, site, study
) -> None:
    """Two announcements for one sum would give two vectors whose difference has no noise."""
    request, ready = study.request(), study.ready(site)
    announcement = study.announcement(request, ready)
    release = site.add_to_sum(study.tell(request, announcement))
    again = site.add_to_sum(study.tell(request, announcement))
    assert (again.hash, words(again).tolist()) == (release.hash, words(release).tolist())
    fresh = study.peer("south", 77, request.hash)
    fresh.declared_patients = 33
    fresh.identity = study.peers(request.hash)["south"].identity
    south = fresh.word(request.hash)
    other = announce([ready, study.peers(request.hash)["east"].ready, south])
    with pytest.raises(PolicyError, match="another announcement"):
        site.add_to_sum(study.tell(request, other))
    assert len(Outbox(home.outbox_path).records()) == 1


@pytest.mark.parametrize(
    "what", ["ghost", "too few", "swapped key", "low order", "without it", "replayed"]
)
def test_a_lying_announcement_gets_nothing_and_spoils_nothing(home, site, study, what: str) -> None:
    request, ready = study.request(), study.ready(site)
    peers = study.peers(request.hash)
    east, south = peers["east"].ready, peers["south"].ready
    mine = SumSite("south", 90, declared_patients=33, request=request.hash)
    lies = {
        "ghost": [ready, east, south, SumSite("zz", 91, request=request.hash).ready],
        "too few": [ready, east],
        "swapped key": [ready, east, south.model_copy(update={"key": mine.mask_key.public_key})],
        "low order": [ready, east, peers["south"].word(request.hash, f"{'A' * 43}=")],
        "without it": [east, south],
        "replayed": [peer.ready for peer in study.peers("9" * 64).values()],
    }
    with pytest.raises(MembersError):
        site.add_to_sum(study.tell(request, announce(lies[what])))
    assert kinds(home) == ["reserved"]
    site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert kinds(home) == ["reserved", "committed"]


def test_two_honest_members_besides_the_colluding_whatever_a_policy_asks_for(
    home, foundation, coordinator, monkeypatch
) -> None:
    """Against two others four are needed, where the policy asks for three."""
    values = distributed_values(foundation.manifest.hash)
    values["privacy"] |= {"colluding_sites": 2}  # type: ignore[operator]
    values["aggregation"] |= {"min_sites": 4}  # type: ignore[operator]
    study = SumStudy(coordinator, foundation, home, Plan.parse(values))
    names = dict(zip(("east", "south", "west"), (2, 3, 4), strict=True))
    monkeypatch.setattr(
        study, "peers", lambda asked: {n: study.peer(n, k, asked) for n, k in names.items()}
    )
    home.roster_approvals.approve(study.roster())
    site = Site(home, foundation)
    request, ready = study.request(), study.ready(site)
    east, south, _ = (peer.ready for peer in study.peers(request.hash).values())
    with pytest.raises(MembersError):
        site.add_to_sum(study.tell(request, announce([ready, east, south])))
    assert kinds(home) == ["reserved"]
    site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert kinds(home) == ["reserved", "committed"]


def test_a_model_for_one_site_alone_has_no_members(site, study) -> None:
    """The victim's request is another one, so nobody else is ready for it."""
    own: State = {name: value + 0.01 for name, value in study.state.items()}
    request = study.request(state=own)
    ready = site.answer(study.ask(request, own))
    assert isinstance(ready, ReadyReply)
    peers = study.peers(study.request().hash).values()  # what the others were asked
    announcement = study.announcement(request, ready).model_copy(
        update={"members": tuple(sorted((ready, *(p.ready for p in peers)), key=lambda r: r.site))}
    )
    with pytest.raises(MembersError, match="another request"):
        site.add_to_sum(study.tell(request, announcement))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def patient(tmp_path: Path, foundation, coordinator: Coordinator, clock: ManualClock):
    """A study, its home, and a site whose words wait until a time that no patient decides."""
    home = summing_home(tmp_path / "patient", foundation, coordinator, answer_every_s=60.0)
    study = SumStudy(coordinator, foundation, home)
    return home, Site(home, foundation, clock=clock.clock), study


def test_a_site_that_was_left_out_pays_once(patient) -> None:
    """Ready, and not taken: three attempts and two rounds, then a vector leaves."""
    home, site, study = patient
    for number, attempt in ((1, 1), (1, 2), (1, 3), (2, 1)):
        study.ready(site, number, attempt)
    study.add(site, 3)
    assert len(Ledger(home.ledger_path).events("main")) == 1
    assert kinds(home) == ["reserved", *["carried"] * 4, "committed"]


def test_what_was_charged_for_a_release_pays_for_no_other(
    tmp_path: Path, foundation, coordinator: Coordinator, clock
) -> None:
    """Though it costs the same: with a carried charge colour could be told three times."""
    home = summing_home(
        *(tmp_path / "telling", foundation, coordinator),
        allowed_stages=STAGES,
        answer_every_s=60.0,
    )
    values = telling_plan(foundation).model_dump(mode="json")
    values["study"]["captions"] = ["tissue with glands", "tissue with sheets"]
    values["stage"] = [{"name": "anchors", "noise_multiplier": 16.0}, *values["stage"]]
    study = SumStudy(coordinator, foundation, home, Plan.parse(values))
    site = Site(home, foundation, clock=clock.clock)
    study.ready(site, 1)
    study.ready(site, 1, attempt=2)
    assert kinds(home) == ["reserved", "carried"], "anchors again"
    study.ready(site, 2)
    assert kinds(home) == ["reserved", "carried", "committed", "reserved"]


def test_a_word_that_was_late_is_paid_for(patient, clock, monkeypatch) -> None:
    """By whole multiples of its time, which tells how many were drawn; then all is well again."""
    home, site, study = patient
    whole = Trainer.hold

    def slow(*arguments: object) -> HeldSum:
        held = whole(*arguments)  # type: ignore[arg-type]
        clock.work(61.0)
        return held

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "hold", slow)
        study.ready(site, 1)
    assert clock.now_s == 120.0
    study.ready(site, 2)
    study.ready(site, 3)
    assert kinds(home) == ["reserved", "committed", "reserved", "carried"]


def test_a_word_that_is_not_held_back_is_paid_for(home, site, study) -> None:
    """It tells by its time how many were drawn, each time that it is asked for."""
    study.ready(site, 1)
    study.ready(site, 2)
    assert kinds(home) == ["reserved", "committed", "reserved"]


def test_words_that_told_are_not_asked_for_again_by_turns(home, site, study) -> None:
    """Two open requests would else be trained in turns, each time under the same two charges."""
    study.ready(site, 1)
    study.ready(site, 2)
    with pytest.raises(PolicyError, match="replay"):
        study.ready(site, 1)
    study.ready(site, 2)  # the word that was said
    assert len(Ledger(home.ledger_path).events("main")) == 2


def test_a_late_word_after_one_in_time_is_paid_for(patient, clock, monkeypatch) -> None:
    """What was known of the first says nothing of the second."""
    home, site, study = patient
    study.ready(site, 1)
    whole = Trainer.hold
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "hold", lambda *a: (whole(*a), clock.work(61.0))[0])
        study.ready(site, 2)
    assert clock.now_s == 180.0
    study.ready(site, 3)
    assert kinds(home) == ["reserved", "carried", "committed", "reserved"]


def is_closed(site: Site, study: SumStudy, number: int, attempt: int = 1) -> bool:
    """Asked for again, it is not trained."""
    try:
        study.ready(site, number, attempt)
    except PolicyError as error:
        return error.rule is Rule.REPLAY
    return False


def test_a_charge_that_was_carried_enough_is_closed(patient, monkeypatch) -> None:
    """Left open, it and the next could be asked for by turns, each training under its charge."""
    home, site, study = patient
    monkeypatch.setattr("crafts_privacy.ledger.MAX_CARRIED", 1)
    for attempt in (1, 2, 3):
        study.ready(site, 1, attempt)
    assert kinds(home) == ["reserved", "carried", "reserved", "committed"]
    assert is_closed(site, study, 1, 2)


def test_a_charge_that_what_is_asked_for_does_not_need_is_closed(
    patient, foundation, clock
) -> None:
    """A crash left one open; the other is given up for it."""
    home, site, study = patient
    study.ready(site, 1, 2)
    again = Site(home, foundation, clock=clock.clock)
    study.ready(again, 1)
    study.ready(again, 1, 2)
    assert kinds(home) == ["reserved", "reserved", "committed"]
    assert is_closed(again, study, 1)


def test_a_charge_is_closed_where_what_is_asked_for_is_refused(patient) -> None:
    """Refused and asked again by turns, it would be trained for each time."""
    home, site, study = patient
    study.ready(site, 1)
    set_policy(home, max_epsilon_alone=0.05)
    with pytest.raises(AloneBudgetExceededError):
        study.ready(site, 2)
    set_policy(home, max_epsilon_alone=60.0)
    assert is_closed(site, study, 1)
    assert kinds(home) == ["reserved", "committed"]


def test_a_charge_of_another_run_is_closed(patient) -> None:
    home, site, study = patient
    study.ready(site, 1)
    other = study.request().model_copy(update={"run_id": "another"})
    home.approvals.approve(study.plan, runs_so_far=1)
    site.answer(study.ask(other))
    assert kinds(home) == ["reserved", "committed", "reserved"]
    assert is_closed(site, study, 1)


def test_a_sum_that_grew_old_is_gone_and_its_charge_is_not(patient, monkeypatch) -> None:
    """Overwritten once no announcement can come any more; what it cost may still be carried."""
    home, site, study = patient
    timers: list[tuple[float, Callable[..., None], list[object]]] = []

    class Kept(threading.Timer):
        def start(self) -> None:
            timers.append((self.interval, self.function, list(self.args)))

    sums: list[HeldSum] = []
    whole = Trainer.hold
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Timer", Kept)
        patch.setattr(Trainer, "hold", lambda *a: sums.append(whole(*a)) or sums[-1])
        request, ready = study.request(), study.ready(site)
        ((interval, grow_old, arguments),) = timers
        aggregation = study.plan.aggregation
        assert interval == aggregation.deadline_s + aggregation.masked_deadline_s
        held_D = sums[0]._sum_D
        grow_old(*arguments)
        assert held_D is not None
        assert not held_D.any()
        with pytest.raises(NotReadyError):
            site.add_to_sum(study.tell(request, study.announcement(request, ready)))
        study.ready(site, 2)
        grow_old(*arguments)  # late: what is held now is another
        study.add(site, 2)
        assert kinds(home) == ["reserved", "carried", "committed"]
        study.ready(site, 3)
        grow_old(*timers[-1][2])
        study.ready(site, 3)  # the same again is no attempt that was left out
    assert kinds(home)[3:] == ["reserved", "committed", "reserved"]


def timers_of(monkeypatch) -> list[threading.Timer]:
    """Real ones, noted as they start."""
    started: list[threading.Timer] = []
    start = threading.Timer.start
    monkeypatch.setattr(threading.Timer, "start", lambda self: (started.append(self), start(self)))
    return started


def test_a_sum_that_left_or_was_given_up_has_no_thread_any_more(site, study, monkeypatch) -> None:
    """A coordinator that asks and asks would fill the site with threads that sleep for days."""
    timers = timers_of(monkeypatch)
    study.ready(site, 1)
    study.add(site, 2)
    study.ready(site, 3)
    given_up, left, waits = timers
    for timer in (given_up, left):
        timer.join(30.0)
        assert not timer.is_alive()
    assert waits.is_alive()
    assert waits.daemon, "no process waits for it"


def test_a_sum_that_cannot_grow_old_is_not_held(home, site, study, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading.Timer, "start", failing(RuntimeError("can't start new thread")))
        with pytest.raises(TrainingError, match="charged and closed"):
            study.ready(site)
    with pytest.raises(PolicyError, match="replay"):
        study.ready(site)
    assert kinds(home) == ["reserved", "committed"]


def test_a_sum_is_held_no_longer_than_a_week_whatever_a_plan_waits(
    home, site, study, monkeypatch
) -> None:
    """A week, as short as a test can wait for."""
    monkeypatch.setattr("crafts_client.sums.MAX_HELD_S", 0.01)
    timers = timers_of(monkeypatch)
    request, ready = study.request(), study.ready(site)
    (timer,) = timers
    timer.join(30.0)
    assert not timer.is_alive()
    with pytest.raises(NotReadyError):
        site.add_to_sum(study.tell(request, study.announcement(request, ready)))


def test_a_sum_is_gone_before_its_charge_is_carried(patient, monkeypatch) -> None:
    """Killed in between, or asked meanwhile: the charge never pays for two."""
    home, site, study = patient
    request, ready = study.request(), study.ready(site)
    whole = Ledger.reserve

    def cut_off(*arguments: object, **options: object) -> None:
        whole(*arguments, **options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "reserve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            study.ready(site, 2)
    assert kinds(home) == ["reserved", "carried"]
    with pytest.raises(NotReadyError):
        site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert not list(home.outbox_path.glob("*.safetensors"))


def test_an_answer_that_was_hidden_is_charged_and_the_next_attempt_again(home, site, study) -> None:
    """What the coordinator says about the first does not matter: it left."""
    first, second = study.add(site), study.add(site, attempt=2)
    assert len(Ledger(home.ledger_path).events("main")) == 2
    assert kinds(home) == ["reserved", "committed"] * 2
    assert (words(first) == words(second)).mean() < 0.01
    with pytest.raises(PolicyError, match="replay"):
        study.ready(site, attempt=1)


def test_a_release_is_told_twice_at_most_and_both_are_in_the_target(
    tmp_path: Path, foundation, coordinator: Coordinator
) -> None:
    """Or whoever saw the first could choose between another and further steps of training."""
    home = summing_home(tmp_path / "telling", foundation, coordinator, allowed_stages=STAGES)
    plan = telling_plan(foundation)
    study, site = SumStudy(coordinator, foundation, home, plan), Site(home, foundation)
    for attempt in (1, 2):
        study.add(site, attempt=attempt)
    for attempt in (3, 4):
        with pytest.raises(StageSpentError, match="stage colour was charged 2 times"):
            study.ready(site, attempt=attempt)
    events = Ledger(home.ledger_path).events("main")
    assert [event.noise_multiplier for event in events] == [16.0, 16.0]
    training = mechanism_of(plan, declared_patients=20).event(plan.charged_steps)
    spent = accounting.epsilon([*events, training], 1e-3)
    assert 0.98 * 1.0 < spent <= 1.0, "training's noise is made for what two of them leave"
    assert release_events(plan) == tuple(events)


def test_a_process_that_died_holds_no_sum_and_its_charge_is_for_its_request(
    home, foundation, site, study
) -> None:
    request, ready = study.request(), study.ready(site)
    again = Site(home, foundation)
    with pytest.raises(NotReadyError):
        again.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert study.ready(again) != ready, "a fresh key, under the same charge"
    assert kinds(home) == ["reserved"]
    third = Site(home, foundation)
    study.ready(third, attempt=2)  # nobody knows what the end of the second told
    assert kinds(home) == ["reserved", "reserved"]


def test_a_round_that_failed_is_closed_and_its_charge_not_carried(
    home, site, study, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_drawn", failing(MemoryError()))
        patch.setattr(PoissonSampler, "sample", lambda *_: np.arange(2))
        with pytest.raises(TrainingError, match="charged and closed"):
            study.ready(site)
    with pytest.raises(PolicyError, match="replay"):
        study.ready(site)
    study.add(site, attempt=2)
    assert kinds(home) == ["reserved", "committed"] * 2


def test_a_vector_that_could_not_be_sealed_is_gone_and_charged(
    home, site, study, monkeypatch
) -> None:
    request, ready = study.request(), study.ready(site)
    announced = study.tell(request, study.announcement(request, ready))
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "seal", failing(OSError("full")))
        with pytest.raises(OSError, match="full"):
            site.add_to_sum(announced)
    with pytest.raises(NotReadyError):
        site.add_to_sum(announced)
    study.add(site, attempt=2)
    assert len(Ledger(home.ledger_path).events("main")) == 2


def test_what_a_crash_left_sealed_is_committed_with_its_share(
    home, foundation, site, study, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            study.add(site)
    assert kinds(home) == ["reserved"]
    Site(home, foundation)
    (committed,) = [e for e in Ledger(home.ledger_path).entries() if e.share is not None]
    assert committed.share is not None
    assert committed.share.members == 3


@pytest.mark.parametrize("is_restarted", [True, False])
def test_what_was_sealed_without_a_record_is_the_attempts_one_vector(
    home, foundation, site, study, monkeypatch, is_restarted: bool
) -> None:
    """Killed, or on a full disk, between a seal and its record; then another adapter is tried."""
    request, ready = study.request(), study.ready(site)
    told = study.tell(request, study.announcement(request, ready))
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "_remember", failing(OSError("full")))
        with pytest.raises(OSError, match="full"):
            site.add_to_sum(told)
    assert kinds(home) == ["reserved"]
    if is_restarted:
        site = Site(home, foundation)
        assert kinds(home) == ["reserved", "committed"]
    other: State = {name: value + 0.01 for name, value in study.state.items()}
    with pytest.raises(PolicyError, match="replay"):
        site.answer(study.ask(study.request(state=other), other))
    release = site.add_to_sum(told)
    assert kinds(home) == ["reserved", "committed"]
    assert list(Outbox(home.outbox_path).records()) == [release.hash]


@pytest.fixture
def share(tmp_path: Path, home: SiteHome, site: Site) -> Path:
    """A folder elsewhere that witnesses the ledger."""
    folder = tmp_path / "share"
    folder.mkdir()
    begin_in_folder(home, Ledger(home.ledger_path), folder)
    file = home.path / "site.toml"
    line = f"witness_folders = {json.dumps([str(folder)])}"
    file.write_text(file.read_text().replace("witness_folders = []", line))
    return folder


def test_a_folder_elsewhere_is_asked_before_a_vector_is_made(
    home, foundation, study, share: Path
) -> None:
    """Of a machine that was put back with its memory, it alone knows of the other vector."""
    site = Site(SiteHome.open(home.path), foundation)
    request, ready = study.request(), study.ready(site)
    told = study.tell(request, study.announcement(request, ready))
    unplugged = share.rename(share.with_name("unplugged"))
    with pytest.raises(WitnessError):
        site.add_to_sum(told)
    assert kinds(home) == ["reserved"]
    assert not list(home.outbox_path.glob("*.safetensors"))
    unplugged.rename(share)
    site.add_to_sum(told)


def test_a_folder_elsewhere_has_the_head_before_a_vector_leaves(
    home, foundation, study, share: Path, monkeypatch
) -> None:
    site = Site(SiteHome.open(home.path), foundation)
    request, ready = study.request(), study.ready(site)
    told = study.tell(request, study.announcement(request, ready))
    masked, unplugged = Site._masked, share.with_name("unplugged")

    def unplugs(*arguments):
        share.rename(unplugged)
        return masked(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "_masked", unplugs)
        with pytest.raises(WitnessError):
            site.add_to_sum(told)
    unplugged.rename(share)
    release = site.add_to_sum(told)
    (file,) = share.glob("*.json")
    (committed,) = [e for e in Ledger(home.ledger_path).entries() if e.kind == "committed"]
    assert committed.release_hash == release.hash
    assert SignedHead.model_validate_json(file.read_bytes()).head.hash == committed.hash


def test_another_study_between_ready_and_masked_takes_nothing_away(
    home, site, study, coordinator
) -> None:
    request, ready = study.request(), study.ready(site)
    plan = coordinator.plan()
    plain = site.answer(coordinator.message(plan, coordinator.start(plan)))
    assert isinstance(plain, Release)
    site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert kinds(home).count("reserved") == 2


def test_a_share_is_sized_by_the_member_that_calibrated_most(home, site, study) -> None:
    """Two versions of an accountant: the sum has the noise that each of the two was charged for."""
    request, ready = study.request(), study.ready(site)
    (event,) = Ledger(home.ledger_path).events("main")
    assert ready.noise_multiplier == event.noise_multiplier
    peers = study.peers(request.hash)
    peers["east"].noise_multiplier *= 1.004
    words = [ready, peers["east"].word(request.hash), peers["south"].ready]
    release = site.add_to_sum(study.tell(request, announce(words)))
    assert release.share is not None
    own = 1.004 * event.noise_multiplier / 2**0.5
    assert release.share.own_noise_multiplier == pytest.approx(own, rel=1e-12)


def test_a_floor_that_would_void_the_sum_is_said_before_anything_is_charged(
    home, site, study
) -> None:
    noise = plan_noise_multiplier(study.plan)
    set_policy(home, min_own_noise_multiplier=4.0 * noise)
    with pytest.raises(PolicyError, match="min_own_noise_multiplier") as refused:
        study.ready(site)
    assert refused.value.rule is Rule.NOISE
    assert kinds(home) == []
    set_policy(home, min_own_noise_multiplier=3.97 * noise)
    request, ready = study.request(), study.ready(site)
    set_policy(home, min_own_noise_multiplier=4.0 * noise)
    with pytest.raises(PolicyError, match="min_own_noise_multiplier"):
        site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    set_policy(home, min_own_noise_multiplier=3.97 * noise)
    release = site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert release.share is not None
    assert release.share.own_noise_multiplier == 3.97 * noise


def test_a_site_adds_its_floor_of_noise(home, site, study) -> None:
    set_policy(home, min_own_noise_multiplier=9.5)
    release = study.add(site)
    assert isinstance(release.reply, MaskedReply)
    assert release.reply.own_noise_multiplier == 9.5
    (alone,) = Ledger(home.ledger_path).events_alone("main")
    assert alone.noise_multiplier == 9.5


def test_a_share_is_no_smaller_than_what_the_limit_alone_was_asked_for(
    home, site, study, monkeypatch
) -> None:
    """Between *ready* and *masked* a larger roster is approved, and a floor is lowered."""
    set_policy(home, min_own_noise_multiplier=9.5)
    request, ready = study.request(), study.ready(site)
    set_policy(home, min_own_noise_multiplier=0.0)
    floor = site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert isinstance(floor.reply, MaskedReply)
    assert floor.reply.own_noise_multiplier == 9.5

    request, ready = study.request(2), study.ready(site, 2)
    peers = dict(zip(("east", "south", "west"), (2, 3, 4), strict=True))
    sites = {name: study.peer(name, number, request.hash) for name, number in peers.items()}
    monkeypatch.setattr(study, "peers", lambda _: sites)
    home.roster_approvals.approve(study.roster())
    grown = site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert isinstance(grown.reply, MaskedReply)
    assert grown.share is not None
    assert grown.share.members == 4
    (_, event) = Ledger(home.ledger_path).events("main")
    assert grown.reply.own_noise_multiplier == event.noise_multiplier / 2**0.5
    assert study.ready(site, 3)  # from here on, by the roster of now
    held = Ledger(home.ledger_path).open_reservations()[-1]
    assert held.own_noise_multiplier == event.noise_multiplier / 3**0.5


def test_a_policy_that_is_tightened_holds_for_a_sum_that_is_held(home, site, study) -> None:
    request, ready = study.request(), study.ready(site)
    set_policy(home, min_members=4)
    with pytest.raises(PolicyError) as refused:
        site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert refused.value.rule is Rule.MEMBERS


def test_the_limit_alone_refuses_before_anything_is_drawn(home, site, study, monkeypatch) -> None:
    set_policy(home, max_epsilon_alone=0.05)
    monkeypatch.setattr(PatientTiles, "batch", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(AloneBudgetExceededError):
        study.ready(site)
    assert kinds(home) == []


@pytest.mark.parametrize("trust", ["distributed", "site"])
def test_nobody_is_told_that_a_patient_withdrew_between_the_messages(
    home, foundation, site, study, coordinator, trust: str
) -> None:
    """A refusal in its place said so without noise, to whoever let a word wait for a week."""
    if trust == "site":
        plan = Plan.parse(values_of_updates(foundation.manifest.hash))
        study = SumStudy(coordinator, foundation, home, plan)
    request, ready = study.request(), study.ready(site)
    announced = study.tell(request, study.announcement(request, ready))
    register = PatientRegister(home.register_path)
    register.withdraw(sorted(register.cohorts())[0])
    release = site.add_to_sum(announced)
    assert release.reply.own_noise_multiplier > 0
    assert kinds(home) == ["reserved", "committed"]
    assert release.hash in Ledger(home.ledger_path).entries()[-1].detail


@pytest.mark.parametrize("trust", ["plain", "in sums"])
def test_the_limit_alone_holds_for_updates_with_all_their_noise(
    home, foundation, site, study, coordinator, trust: str
) -> None:
    """They count in it, so a plan of them cannot take what the limit left."""
    study.add(site)
    ledger = Ledger(home.ledger_path)
    spent = accounting.epsilon(ledger.events_alone("main"), home.policy.max_delta)
    set_policy(home, max_epsilon_alone=1.0001 * spent)
    plan = coordinator.plan()
    if trust == "in sums":
        plan = Plan.parse(values_of_updates(foundation.manifest.hash))
        SumStudy(coordinator, foundation, home, plan)
    message = coordinator.message(plan, coordinator.start(plan))
    with pytest.raises(AloneBudgetExceededError, match="max_epsilon_alone"):
        site.answer(message)
    assert kinds(home) == ["reserved", "committed"]
    set_policy(home, max_epsilon_alone=60.0)
    site.answer(message)
    assert ledger.entries()[-1].share is None


@pytest.mark.parametrize(
    ("rule", "policy", "plan"),
    [
        (Rule.TRUST, {"allowed_trust": ("site",)}, {}),
        (Rule.COLLUDING, {"min_colluding_sites": 2}, {}),
        (Rule.MEMBERS, {"min_members": 4}, {}),
    ],
)
def test_every_rule_about_sums_refuses(home, site, study, rule, policy, plan) -> None:
    set_policy(home, **policy)
    with pytest.raises(PolicyError) as refused:
        study.ready(site)
    assert refused.value.rule is rule
    assert kinds(home) == []


def test_the_roster_is_a_persons_word(home, site, study) -> None:
    home.roster_approvals.take_back(study.plan.hash)
    with pytest.raises(PolicyError, match="roster") as refused:
        study.ready(site)
    assert refused.value.rule is Rule.ROSTER
    home.roster_approvals.approve(study.roster())
    request, ready = study.request(), study.ready(site)
    home.roster_approvals.take_back(study.plan.hash)
    with pytest.raises(PolicyError, match="roster"):
        site.add_to_sum(study.tell(request, study.announcement(request, ready)))
    assert kinds(home) == ["reserved"]


def test_a_roster_must_know_this_site_and_the_pinned_others(home, site, study) -> None:
    stranger = signing.public_key_of(SumSite("x", 70).identity)
    home.roster_approvals.approve(study.roster(north=stranger))
    with pytest.raises(PolicyError, match="another key for north"):
        study.ready(site)
    roster = study.roster()
    other_number = roster.patients | {"north": 999}
    home.roster_approvals.approve(type(roster).of(study.plan.hash, other_number, roster.identities))
    with pytest.raises(PolicyError, match="999"):
        study.ready(site)
    home.roster_approvals.approve(roster)
    set_policy(home, peers={"south": "0" * 64})
    with pytest.raises(PolicyError, match="another key for south"):
        study.ready(site)
    set_policy(home, peers={"south": signing.fingerprint(roster.identities["south"])})
    study.ready(site)
    assert len(kinds(home)) == 1


def test_a_key_that_was_lost_and_made_anew_is_not_the_rosters(home, foundation, study) -> None:
    home.site_key_path.unlink()
    site = Site(home, foundation)
    with pytest.raises(PolicyError, match="crafts-client identity"):
        study.ready(site)


def asked(home, site: Site, content: RecordDict, kind: str) -> Error | RecordDict:
    app = make_client_app(lambda _: site)
    where = Context(
        run_id=1,
        node_id=7,
        node_config={HOME_KEY: str(home.path)},
        state=RecordDict(),
        run_config={},
    )
    reply = app(flower_message(content, message_type=kind), where)
    return reply.error if reply.has_error() else reply.content


def test_both_messages_travel(home, site, study) -> None:
    request = study.request()
    content = study.coordinator.content(study.plan, study.state, request)
    reply = asked(home, site, content, "train")
    assert isinstance(reply, RecordDict)
    assert list(reply) == ["ready"]
    ready = ReadyReply.from_scalars(dict(reply["ready"]))
    announcement = study.announcement(request, ready)
    answer = asked(home, site, study.told(request, announcement), "train.masked")
    assert isinstance(answer, RecordDict)
    assert set(answer) == {"masked", "sum"}
    reply_record = MaskedReply.from_scalars(dict(answer["masked"]))
    names = [name for name in study.state if name.endswith(".second")]
    num = sum(study.state[name].numel() for name in names)
    vector = unpacked_vector({key: each.data for key, each in answer["sum"].items()}, num)
    assert sum(len(each.data) for each in answer["sum"].values()) <= 4.05 * num + 128
    assert vector.dtype == np.uint32
    assert reply_record.request_hash == request.hash


def test_refusals_of_sums_have_codes_and_say_nothing_else(home, foundation, site, study) -> None:
    request, ready = study.request(), study.ready(site)
    told = study.told(request, announce([ready, study.peers(request.hash)["east"].ready]))
    for content, code in (
        (told, 145),
        (study.told(study.request(2), study.announcement(request, ready)), 119),
    ):
        error = asked(home, site, content, "train.masked")
        assert isinstance(error, Error)
        assert error.code == code
        assert error.reason is not None
        assert "east" not in error.reason
    broken = dict(told["announcement"]) | {"json": json.dumps({"members": []})}
    told["announcement"] = type(told["announcement"])(broken)
    error = asked(home, site, told, "train.masked")
    assert isinstance(error, Error)
    assert error.code == 101


def test_a_tensor_in_an_announcement_is_refused(home, site, study) -> None:
    request, ready = study.request(), study.ready(site)
    content = study.told(request, study.announcement(request, ready))
    content["adapter"] = study.coordinator.content(study.plan, study.state)["adapter"]
    error = asked(home, site, content, "train.masked")
    assert isinstance(error, Error)
    assert error.code == 101


def test_the_word_that_a_site_is_ready_tells_nothing_of_its_patients(
    home, foundation, study
) -> None:
    """Public numbers, and a key that is drawn from nothing but entropy."""
    site = Site(home, foundation)
    ready = study.ready(site)
    assert set(ready.to_scalars()) == {
        "site", "request_hash", "declared_patients", "noise_multiplier", "key", "signature"
    }  # fmt: skip
    assert ready.declared_patients == home.config.declared_patients
    assert ready.noise_multiplier == plan_noise_multiplier(study.plan)
