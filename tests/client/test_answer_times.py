"""When an answer leaves tells nothing of who was drawn. Time here passes by the row of a pass."""

import itertools
import logging
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as pld
from flwr.app import Context, RecordDict
from numpy.typing import NDArray
from scipy.stats import binom

from crafts_client import round_time
from crafts_client.answer_times import (
    COHORT_SLACK,
    OVERRUN,
    Departure,
    Pace,
    PublicStep,
    longest_round_s,
    most_passes,
)
from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.errors import HomeError, TrainingError
from crafts_client.home import SiteConfig, SiteHome
from crafts_client.network_cli import join
from crafts_client.patients import PatientTiles
from crafts_client.policy import PolicyError
from crafts_client.running import the_only_one
from crafts_client.seen_updates import SeenUpdates
from crafts_client.site import Site
from crafts_client.site_ledger import existing_ledger
from crafts_client.training_task import Randomness, entropy_generator
from crafts_core.plan import Plan
from crafts_core.stages.objective import Objective
from crafts_privacy.charges import MAX_CARRIED
from crafts_privacy.ledger import EntryKind, Ledger
from crafts_privacy.noise import GridNoise
from crafts_privacy.sampling import PoissonSampler
from support.clocks import ManualClock
from support.noise import FixedSampler, NoNoise
from support.sites import control_values, flower_message, make_site_home, plan_values

PATIENTS, DECLARED = 9, 12
ROW_S = 0.5


class ScriptedSampler:
    """So many patients in each step, the first ones."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = iter(counts)

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        return np.arange(min(next(self._counts), num_patients))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """A clock that every row of every pass moves on, of public tiles as of patients'."""
    manual, honest = ManualClock(), Objective.loss_per_tile

    def timed(self, tiles, draws):
        manual.work(ROW_S * len(tiles))
        return honest(self, tiles, draws)

    monkeypatch.setattr(Objective, "loss_per_tile", timed)
    return manual


@pytest.fixture
def make_home(tmp_path: Path, foundation, coordinator) -> Callable[..., SiteHome]:
    def make(*, declared_patients: int = DECLARED, **options: object) -> SiteHome:
        options = {"answer_every_s": "auto", "num_patients": PATIENTS} | options
        stages = ("pretraining", "alignment", "control")
        home = make_site_home(
            tmp_path / f"site-{len(list(tmp_path.iterdir()))}", foundation, coordinator.public_key,
            **{"allowed_stages": stages} | options,
        )  # fmt: skip
        return replace(
            home, config=home.config.model_copy(update={"declared_patients": declared_patients})
        )

    return make


def site_of(home, foundation, clock: ManualClock, counts: Sequence[int]) -> Site:
    randomness = Randomness(
        noise=GridNoise(), sampler=ScriptedSampler(counts), generator=entropy_generator
    )
    return Site(home, foundation, randomness=randomness, clock=clock.clock)


def ask(home, site: Site, content: RecordDict, witness: Callable[[], None] = lambda: None):
    app = make_client_app(lambda path: site, witness=witness)
    where = Context(1, 7, {HOME_KEY: str(home.path)}, RecordDict(), {})
    return app(flower_message(content), where)


def plan_of(coordinator, foundation, *, control: bool = False) -> Plan:
    """Four rounds alike, of few weights."""
    make = control_values if control else plan_values
    values = make(foundation.manifest.hash)
    adapter = {"kind": "lora", "rank": 2, "targets": ["to_q"], "schedule": "second_only"}
    return coordinator.plan(
        adapter=adapter | {"first_factor": "random"}, stage=[values["stage"][0] | {"rounds": 4}]
    )


def seconds_of_rounds(
    home, foundation, coordinator, clock, drawn: Sequence[int], *, control: bool = False
) -> list[float]:
    """From request to answer, where each round draws so many in each of its two steps.

    A round goes before, as a site's first one checks more public tiles than later ones.
    """
    plan, seconds = plan_of(coordinator, foundation, control=control), []
    site = site_of(home, foundation, clock, [1, 1, *(count for count in drawn for _ in range(2))])
    state = coordinator.start(plan)
    for number in range(1, len(drawn) + 2):
        began = clock.now_s
        request = coordinator.request(plan, state, number=number)
        ask(home, site, coordinator.content(plan, state, request))
        seconds.append(clock.now_s - began)
    return seconds[1:]


def spread(times: Sequence[float]) -> float:
    return max(times) - min(times)


@pytest.mark.slow
@pytest.mark.parametrize("answer_every_s", ["auto", 500.0])
def test_nobody_few_or_all_drawn_the_answer_leaves_at_the_same_time(
    make_home, foundation, coordinator, clock, caplog, answer_every_s: str | float
) -> None:
    home, drawn = make_home(answer_every_s=answer_every_s), [PATIENTS, 4, 0]
    times = seconds_of_rounds(home, foundation, coordinator, clock, drawn)
    assert spread(times) < 1e-6
    assert len(list(home.outbox_path.glob("*.safetensors"))) > 0
    waited = clock.slept[1:]
    assert waited == sorted(set(waited)), "training itself took longer with more patients"
    assert waited[0] > 0
    assert "deadline_s" not in caplog.text


class Timed(logging.Handler):
    """When each line came, by a clock, and what it was before its values were put in."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self.lines: list[tuple[float, str]] = []
        self._clock = clock

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((self._clock.now_s, str(record.msg)))


@pytest.mark.slow
def test_the_log_tells_of_a_round_as_it_begins_and_leaves_and_never_between(
    make_home, foundation, coordinator, clock, caplog, monkeypatch
) -> None:
    """Whoever reads the log elsewhere has a clock, too."""
    seen, drawn, log = Timed(clock), [PATIENTS, 4, 0], logging.getLogger("crafts_client")
    monkeypatch.setattr(log, "handlers", [seen])
    with caplog.at_level(logging.INFO, "crafts_client"):
        seconds_of_rounds(make_home(), foundation, coordinator, clock, drawn)
    began = [at for at, line in seen.lines if "began" in line]
    answered = [at for at, line in seen.lines if "answered" in line]
    assert len(began) == len(answered) == len(drawn) + 1
    assert len(seen.lines) == 2 * len(began)
    assert spread([left - at for at, left in zip(began[1:], answered[1:], strict=True)]) < 1e-6


def num_charged(home: SiteHome) -> int:
    return sum(entry.kind is EntryKind.RESERVED for entry in Ledger(home.ledger_path).entries())


def code_of(answer) -> int | None:
    return answer.error.code if answer.has_error() else None


def test_what_the_plan_would_not_wait_for_is_refused_uncharged(
    make_home, foundation, coordinator, clock
) -> None:
    home, plan = make_home(answer_every_s=3600.0), plan_of(coordinator, foundation)
    state = coordinator.start(plan)
    assert plan.aggregation.deadline_s < 3600
    content = coordinator.content(plan, state, coordinator.request(plan, state))
    answer = ask(home, site_of(home, foundation, clock, []), content)
    assert code_of(answer) == 152
    assert num_charged(home) == 0


@pytest.mark.slow
def test_a_pace_that_was_too_slow_counts_for_an_hour_and_is_then_timed_anew(
    make_home, foundation, coordinator, clock, monkeypatch
) -> None:
    home, plan = make_home(), plan_of(coordinator, foundation)
    site, state = site_of(home, foundation, clock, [1] * 6), coordinator.start(plan)

    def answer_of(number: int):
        request = coordinator.request(plan, state, number=number)
        return ask(home, site, coordinator.content(plan, state, request))

    slow, honest = 100.0, Objective.loss_per_tile
    monkeypatch.setattr(
        Objective,
        "loss_per_tile",
        lambda self, *rest: (clock.work(slow), honest(self, *rest))[1],
    )
    # Nobody knew: charged and trained. Then not even charged, also where the machine is idle again.
    assert (code_of(answer_of(1)), num_charged(home)) == (None, 1)
    slow = 0.0
    assert (code_of(answer_of(2)), num_charged(home)) == (152, 1)
    clock.work(3601.0)
    assert (code_of(answer_of(3)), num_charged(home)) == (None, 2)
    assert (code_of(answer_of(4)), num_charged(home)) == (None, 3)


@pytest.mark.slow
def test_without_waiting_the_time_counts_the_drawn_patients(
    make_home, foundation, coordinator, clock
) -> None:
    home = make_home(answer_every_s=0.0)
    times = seconds_of_rounds(home, foundation, coordinator, clock, [0, 4, PATIENTS])
    assert times == sorted(set(times)), "this is what waiting has to hide"
    assert not clock.slept


@pytest.mark.slow
def test_in_a_control_round_no_time_tells_how_many_have_a_mask(
    make_home, foundation, coordinator, clock
) -> None:
    """All are drawn; nobody or everybody has one."""
    times = []
    for num_steered in (0, PATIENTS):
        # Patients one by one: in a pass of fixed shape rows without a mask are filled.
        home = make_home(num_steered=num_steered, microbatch_tiles=3)
        times += seconds_of_rounds(home, foundation, coordinator, clock, [PATIENTS], control=True)
    assert spread(times) < 1e-6
    assert clock.slept[1] > clock.slept[3] > 0, "training itself took longer with masks"


@pytest.mark.slow
def test_the_time_follows_the_declared_size_and_not_the_true_one(
    make_home, foundation, coordinator, clock
) -> None:
    times = []
    for num_patients in (5, PATIENTS):
        home = make_home(num_patients=num_patients)
        times += seconds_of_rounds(home, foundation, coordinator, clock, [num_patients])
    assert spread(times) < 1e-6
    larger = make_home(declared_patients=2 * DECLARED)
    assert seconds_of_rounds(larger, foundation, coordinator, clock, [5])[0] > 1.3 * times[0]


@pytest.mark.slow
def test_what_a_round_will_take_is_known_before_any_patient_is_drawn(
    make_home, foundation, coordinator, clock, monkeypatch
) -> None:
    home, plan = make_home(), plan_of(coordinator, foundation)
    with monkeypatch.context() as nobody:
        nobody.setattr(PatientTiles, "batch", pytest.fail)
        (told,) = round_time.time_rounds(home, plan, clock.clock.now)
    assert existing_ledger(home) is None, "nothing was charged"
    waits: list[float] = []
    monkeypatch.setattr(Departure, "begin", lambda _, every_s: waits.append(every_s))
    seconds_of_rounds(home, foundation, coordinator, clock, [3])
    assert told.seconds == pytest.approx(waits[-1])


@pytest.mark.slow
def test_every_stage_is_timed_and_by_its_slower_factor(
    make_home, foundation, coordinator, clock
) -> None:
    """Two stages of one name are two, and the longer one is not forgotten."""
    values = plan_values(foundation.manifest.hash)
    short, middle = values["stage"]
    long = short | {"local_steps": 9}
    plan = coordinator.plan(stage=[short, middle, long], adapter=values["adapter"])
    assert {each.factor for each in plan.rounds()} == {"first", "second"}
    found = round_time.time_rounds(make_home(), plan, clock.clock.now)
    assert [each.stage.local_steps for each in found] == [2, 2, 9]
    assert found[2].seconds > 3 * found[0].seconds > 0


def test_what_cannot_be_timed_is_told(make_home, coordinator) -> None:
    home, plan = make_home(), coordinator.plan()
    other = coordinator.plan(study=plan.study.model_dump() | {"foundation": "0" * 64})
    with pytest.raises(HomeError, match="another foundation"):
        round_time.time_rounds(home, other)
    with the_only_one(home), pytest.raises(HomeError, match="join runs here"):
        round_time.time_rounds(home, plan)


def test_a_release_is_committed_and_witnessed_after_it_waited(
    make_home, foundation, coordinator
) -> None:
    """A committed entry tells its time, and the coordinator gets the hash of it."""
    home, plan = make_home(), plan_of(coordinator, foundation)
    order: list[str] = []

    def looked(what: str) -> Callable[[], None]:
        return lambda: order.append(f"{what} {len(Ledger(home.ledger_path).entries())}")

    clock = ManualClock(on_sleep=looked("wait"))
    site = site_of(home, foundation, clock, [3, 4])
    content = coordinator.content(plan, coordinator.start(plan))
    assert ask(home, site, content, looked("witness")).has_content()
    assert order == ["witness 1", "wait 2", "witness 3"], "the first says where the ledger lies"
    assert len(list(home.outbox_path.glob("*.safetensors"))) == 1


def _fails(kind: type[Exception]) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise kind("what a patient's tiles led to")

    return fail


@pytest.mark.slow
@pytest.mark.parametrize("late", [PolicyError, TrainingError, OSError])
def test_a_refusal_that_patients_led_to_waits_like_an_answer(
    make_home, foundation, coordinator, clock, monkeypatch, late: type[Exception]
) -> None:
    """An update too long, one not finite, a fault of a disk: after nobody or all patients."""
    home = make_home(max_update_norm=1e-6)
    if late is not PolicyError:
        monkeypatch.setattr(Site, "_reply", _fails(late))
    times = seconds_of_rounds(home, foundation, coordinator, clock, [0, PATIENTS])
    assert spread(times) < 1e-6
    assert clock.slept[1] > clock.slept[2] > 0
    assert not list(home.outbox_path.glob("*.safetensors"))


def test_the_time_allows_for_all_that_a_round_writes(
    make_home, foundation, coordinator, monkeypatch
) -> None:
    allowed: list[int] = []
    monkeypatch.setattr(
        "crafts_client.site.longest_round_s",
        lambda *_, num_bytes, **__: allowed.append(num_bytes) or 1.0,
    )
    home, plan = make_home(), plan_of(coordinator, foundation)
    site = site_of(home, foundation, ManualClock(), [1, 1])
    release = site.answer(coordinator.message(plan, coordinator.start(plan)))
    (update,) = SeenUpdates(home.seen_path).read({release.hash})
    written = [release.delta, update.delta, update.received]
    assert allowed == [sum(tensor.nbytes for state in written for tensor in state.values())]


def test_what_is_refused_before_anybody_is_drawn_is_refused_at_once(
    make_home, foundation, coordinator, clock
) -> None:
    home, plan = make_home(max_local_steps=1), plan_of(coordinator, foundation)
    site = site_of(home, foundation, clock, [])
    assert ask(home, site, coordinator.content(plan, coordinator.start(plan))).has_error()
    assert not clock.slept


@pytest.mark.slow
def test_a_process_that_dies_waiting_loses_nothing_and_then_answers_at_once(
    make_home, foundation, coordinator
) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    home, plan = make_home(), plan_of(coordinator, foundation)
    message = coordinator.message(plan, coordinator.start(plan))
    with pytest.raises(KeyboardInterrupt):
        site_of(home, foundation, ManualClock(on_sleep=killed), [3, 4]).answer(message)
    (sealed,) = home.outbox_path.glob("*.safetensors")
    before = sealed.read_bytes()

    later = ManualClock()
    release = site_of(home, foundation, later, []).answer(message)

    assert not later.slept
    assert sealed.read_bytes() == before
    last = Ledger(home.ledger_path).entries()[-1]
    assert (last.kind, last.detail) == (EntryKind.COMMITTED, release.hash)
    assert len(Ledger(home.ledger_path).events("main")) == 1


@pytest.mark.slow
def test_timing_public_steps_changes_nothing_of_what_is_trained(
    make_home, foundation, coordinator, monkeypatch
) -> None:
    """With no noise and everybody drawn, the same delta to the last bit."""
    deltas = []
    for answer_every_s in (0.0, "auto"):
        home, plan = (
            make_home(answer_every_s=answer_every_s, seed=1),
            plan_of(coordinator, foundation),
        )
        randomness = Randomness(
            noise=NoNoise(),
            sampler=FixedSampler(),
            generator=lambda _step, _patient: torch.Generator().manual_seed(5),
        )
        site = Site(home, foundation, randomness=randomness, clock=ManualClock().clock)
        deltas.append(site.answer(coordinator.message(plan, coordinator.start(plan))).delta)
    assert all(torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])


class TestDeparture:
    def test_an_answer_that_is_late_leaves_at_the_next_multiple_and_is_told_of_at_home(
        self, caplog
    ) -> None:
        told_early: list[str] = []
        clock = ManualClock(on_sleep=lambda: told_early.append(caplog.text))
        with Departure(clock.clock) as departure:
            departure.begin(10.0)
            clock.work(23.0)
        assert clock.now_s == 30.0
        assert told_early == [""], "the log's own time would say when training ended"
        assert not departure.was_in_time
        assert "set answer_every_s" in caplog.text
        assert "23" not in caplog.text

    def test_one_in_time_is_no_event(self, caplog) -> None:
        clock = ManualClock()
        with caplog.at_level(logging.INFO), Departure(clock.clock) as departure:
            departure.begin(10.0)
            clock.work(10.0)
        assert (clock.now_s, caplog.text) == (10.0, "")
        assert departure.was_in_time
        with departure:  # the next one holds nothing back
            departure.begin(0.0)
        assert not departure.was_in_time

    def test_a_stop_waits_for_nothing(self) -> None:
        clock = ManualClock()
        departure = Departure(clock.clock)
        departure.begin(10.0)
        departure.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert clock.now_s == 0.0

    def test_a_round_in_which_nobody_was_drawn_yet_waits_for_nothing(self) -> None:
        """Whatever the round before it had fixed."""
        clock = ManualClock()
        departure = Departure(clock.clock)
        with departure:
            departure.begin(10.0)
        with departure:
            clock.work(3.0)
        assert clock.now_s == 13.0


def test_words_under_one_charge_are_late_as_rarely_as_answers_of_a_study() -> None:
    """A charge that is carried pays for so many; see this module's bound for a thousand rounds."""
    assert MAX_CARRIED * OVERRUN <= 1e-12


def config(**changes: object) -> SiteConfig:
    values = {
        "name": "north",
        "cohort": "main",
        "declared_patients": 50,
        "device": "cpu",
        "foundation": "embedded",
        "tile_store": "tiles",
        "microbatch_tiles": 64,
    }
    return SiteConfig.model_validate(values | changes)


def test_the_pace_is_the_slowest_of_the_public_steps() -> None:
    clock, asked = ManualClock(), []
    seconds = {0: iter([1.0, 1.2, 1.1]), 1: iter([90.0, 4.0, 5.0, 4.5])}

    def run(num_passes: int) -> None:
        asked.append(num_passes)
        clock.work(next(seconds[num_passes]))

    pace = Pace.of(PublicStep(run=run, group_size=4), clock.clock.now)
    assert (pace.step_s, pace.group_size) == (pytest.approx(1.2), 4)
    assert pace.pass_s == pytest.approx(4.0), "the first step, which warms up, does not count"


def exact_chance_above(bound: int, share: int, rate: Fraction, group: int, steps: int) -> Fraction:
    """Of passes on one device, in whole numbers: no rounding, no approximation."""
    passes = [Fraction(0)] * (-(-share // group) + 1)
    for drawn in range(share + 1):
        chance = math.comb(share, drawn) * rate**drawn * (1 - rate) ** (share - drawn)
        passes[-(-drawn // group)] += chance
    total = [Fraction(1)]
    for _ in range(steps):
        longer = [Fraction(0)] * (len(total) + len(passes) - 1)
        for (i, one), (j, other) in itertools.product(enumerate(total), enumerate(passes)):
            longer[i + j] += one * other
        total = longer
    return sum(total[bound + 1 :], Fraction(0))


@pytest.mark.parametrize(("rate", "group_size"), [("2/5", 1), ("2/5", 4), ("1/10", 1), ("1/10", 3)])
def test_the_bound_is_passed_as_rarely_as_it_says_and_is_not_loose(
    rate: str, group_size: int
) -> None:
    declared, exact, steps = 60, Fraction(rate), 4
    bound = most_passes(declared, float(exact), steps=steps, group_size=group_size, num_devices=1)

    def chance(passes: int) -> Fraction:
        return exact_chance_above(passes, 66, exact, group_size, steps)

    assert math.ceil(COHORT_SLACK * declared) == 66
    assert chance(bound) <= OVERRUN
    assert chance(bound - max(2, bound // 15)) > OVERRUN


def test_where_everybody_is_drawn_there_is_no_chance() -> None:
    assert most_passes(100, 1.0, steps=3, group_size=4, num_devices=1) == 3 * 28


def test_several_devices_wait_for_the_one_that_drew_most() -> None:
    rng = np.random.default_rng(3)
    options = {"steps": 12, "group_size": 4}
    bound = most_passes(300, 0.1, **options, num_devices=3)
    # Pseudonyms deal them out, once for all steps and not evenly.
    dealt = rng.multinomial(330, [1 / 3] * 3, size=50_000)[:, None]
    drawn = rng.binomial(dealt, 0.1, size=(50_000, 12, 3)).max(axis=2)
    largest = (-(-drawn // 4)).sum(axis=1).max()
    assert largest <= bound <= 1.7 * largest
    assert bound < 0.7 * most_passes(300, 0.1, **options, num_devices=1)


ROUNDS, STEPS, RATE, TRUE_SIZE = 400, 4, 0.4, 47


def correlation_with_the_count(every_s: float) -> float:
    """Of a clock at the coordinator, after a network's jitter, over many rounds."""
    rng, clock = np.random.default_rng(1), ManualClock()
    departure, counts, seen = Departure(clock.clock), [], []
    for _ in range(ROUNDS):
        count, began = 0, clock.now_s
        with departure:
            departure.begin(every_s)
            for _ in range(STEPS):
                drawn = len(PoissonSampler().sample(TRUE_SIZE, RATE))
                clock.work(0.2 + sum(rng.uniform(0.9, 1.05, drawn)))
                count += drawn
        counts.append(count)
        seen.append(clock.now_s - began + rng.normal(0, 0.01))
    return float(np.corrcoef(counts, seen)[0, 1])


def test_passes_of_patients_may_take_a_fifth_longer_than_public_ones() -> None:
    """Their tiles come from disk; what is late tells how many were drawn."""
    stage = Plan.parse(plan_values("ab" * 32)).stage[0].model_copy(update={"local_steps": STEPS})
    pace = Pace(step_s=2.0, pass_s=10.0, group_size=1)
    size = config().declared_patients
    passes = most_passes(size, RATE, steps=STEPS, group_size=1, num_devices=1)
    bound_s = longest_round_s(pace, config(), stage, sample_rate=RATE, num_bytes=0)
    assert bound_s > 1.2 * (STEPS * pace.step_s + passes * pace.pass_s)


def test_an_attacker_with_a_clock_reads_no_count() -> None:
    """Below five standard deviations of chance; without waiting the clock reads it."""
    stage = Plan.parse(plan_values("ab" * 32)).stage[0].model_copy(update={"local_steps": STEPS})
    pace = Pace(step_s=0.2, pass_s=1.0, group_size=1)
    bound_s = longest_round_s(pace, config(), stage, sample_rate=RATE, num_bytes=10_000)
    assert abs(correlation_with_the_count(bound_s)) < 5 / ROUNDS**0.5
    assert correlation_with_the_count(0.0) > 0.95


def test_a_site_that_takes_part_computes_no_subnormal_number(
    make_home, foundation, monkeypatch
) -> None:
    """In a thread, which alone flushes them: other tests go on as they were."""
    home, made = make_home(), []
    smallest = torch.finfo(torch.float32).tiny

    def take_part(*_: object) -> None:
        made.append(float(torch.tensor(smallest) * 0.5))

    monkeypatch.setattr("crafts_client.enrolment.coordinator_record", lambda _: None)
    monkeypatch.setattr("crafts_client.enrolment.certificate_of", lambda _: b"")
    monkeypatch.setattr("crafts_client.network_cli.run_as_service", lambda **_: None)
    monkeypatch.setattr("crafts_client.supernode.join", take_part)
    joined = threading.Thread(target=join, args=(home.path,), kwargs={"debug": False})
    joined.start()
    joined.join()
    assert made == [0.0]
    assert float(torch.tensor(smallest) * 0.5) > 0


ROUND = """
from crafts_client.answer_times import Clock, Departure
from crafts_core.command_line import run_as_service
run_as_service(once_more="once more ends it")
with Departure(Clock()) as departure:
    departure.begin(600.0)
    print("trained", flush=True)
print("left")
"""


@pytest.mark.parametrize(
    ("signals", "told"),
    [((signal.SIGINT, signal.SIGINT), "once more ends it\n"), ((signal.SIGTERM,), "")],
)
def test_a_round_whose_answer_waits_can_be_ended(signals: tuple[int, ...], told: str) -> None:
    """Neither Ctrl-C nor SIGTERM ended it before its time, and nobody was told; nothing leaves."""
    with subprocess.Popen(
        [sys.executable, "-c", ROUND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "trained\n"
        for place, number in enumerate(signals):
            if place:
                assert process.stderr.readline() == told
            process.send_signal(number)
        ends = threading.Timer(60, process.kill)  # else a failure would wait for it
        ends.start()
        assert process.wait() == 0
        ends.cancel()
        assert process.stdout.read() == ""


@pytest.mark.parametrize(("patients", "steps", "epsilon"), [(28, 12, 1.65), (100, 300, 4.95)])
def test_what_exact_counts_would_cost(patients: int, steps: int, epsilon: float) -> None:
    """Of docs/privacy.md: the counts of all steps, sample rate 0.4, delta 1e-3, rounded up."""
    with_one, without = (
        dict(enumerate(binom.logpmf(np.arange(size + 1), size, 0.4)))
        for size in (patients, patients - 1)
    )
    step = pld.from_two_probability_mass_functions(
        without, with_one, value_discretization_interval=1e-4
    )
    found = step.self_compose(steps).get_epsilon_for_delta(1e-3)
    assert epsilon - 0.01 < found <= epsilon
