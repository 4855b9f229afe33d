"""The coordinator's program goes on: with a full disk, a plan that fails, files that vanish."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from flwr.serverapp import Grid
from prometheus_client import generate_latest

from crafts_core.plan import Plan
from crafts_server import service as module
from crafts_server.audit_log import Event
from crafts_server.errors import (
    AggregationError,
    DivergedError,
    HomeError,
    SitesRefuseError,
    StorageError,
)
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.past_rounds import num_short
from crafts_server.pki import Pki
from crafts_server.plan_queue import failed_plans, queue_plan, queued_plans
from crafts_server.receipts import Refusal, RoundReceipt, WeightRise
from crafts_server.service import Service
from support.certificates import identity_of
from support.disk import fill_disk
from support.receipts import receipt
from support.sites import plan_values
from support.superlinks import admitted_nodes, new_key, openssh

pytestmark = pytest.mark.slow


@pytest.fixture
def service(tmp_path: Path, foundation) -> Iterator[Service]:
    config = HomeConfig(foundation=str(foundation.path))
    home = CoordinatorHome.create(tmp_path / "coordinator", config)
    Pki.create(home.path / "pki", ["localhost"])
    queue_plan(home, Plan.parse(plan_values(foundation.manifest.hash)))
    service = Service(home)
    yield service
    service._registry.close()


@dataclass(frozen=True)
class Committed:
    """A checkpoint, as far as its receipt."""

    told: RoundReceipt | None

    def receipt(self) -> RoundReceipt | None:
        return self.told


class Run:
    """A coordinator whose run does this, after rounds of which these are the receipts."""

    def __init__(self, does: Callable[[], None], *receipts: RoundReceipt) -> None:
        self._does = does
        self._chain = [Committed(None), *map(Committed, receipts)]

    def chain(self) -> list[Committed]:
        return self._chain

    def run(self, _grid: Grid) -> None:
        self._does()


def train(
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    does: Callable[[], None],
    *committed: RoundReceipt,
) -> bool:
    monkeypatch.setattr(module.Coordinator, "open", lambda *_, **__: Run(does, *committed))
    (entry,) = queued_plans(service._home)
    return service._train(entry, threading.Event())


def test_a_plan_that_a_full_disk_stopped_is_tried_again(service, monkeypatch) -> None:
    def full() -> None:
        raise StorageError("cannot write checkpoint")

    assert not train(service, monkeypatch, full)
    assert len(queued_plans(service._home)) == 1


def test_the_audit_log_is_waited_for_while_the_disk_is_full(service, monkeypatch) -> None:
    """Instead of ending the program, or going on without the line."""
    timers = []

    def short() -> None:
        timers.append(fill_disk(for_s=0.3))
        raise AggregationError("round 1: too few")

    monkeypatch.setattr(module, "_LOOK_S", 0.05)
    assert not train(service, monkeypatch, short)
    timers[0].join()
    assert service._audit.verify()[-1].event == "round without a result"


def test_a_wait_of_weeks_is_a_line_for_each_reason_and_each_hour(service, monkeypatch) -> None:
    """It was a line every minute, among which the reasons of others were not found again."""

    def short_of(why: str) -> None:
        def short() -> None:
            raise AggregationError(why)

        assert not train(service, monkeypatch, short)

    for why in ("a", "a", "a", "b", "b"):
        short_of(why)
    monkeypatch.setattr(module, "_TELL_AGAIN_S", 0.0)
    short_of("b")
    monkeypatch.undo()
    service._committed(receipt(aachen=1.0))
    short_of("b")
    entries = service._audit.verify()
    told = [entry.facts for entry in entries if entry.event == Event.SHORT]
    assert [(fact["why"], fact["times"]) for fact in told] == [
        ("a", 1), ("b", 3), ("b", 2), ("b", 1),
    ]  # fmt: skip
    assert num_short(entries) == 7


@pytest.mark.parametrize(
    ("error", "trained"),
    [
        (SitesRefuseError("bern (code 112: no person has said yes)"), ["first", "second"]),
        (AggregationError("missing: bern"), ["first", "first", "first", "second"]),
    ],
)
def test_only_what_sites_refuse_lets_the_next_plan_go_before(
    service, monkeypatch, foundation, error: AggregationError, trained: list[str]
) -> None:
    """Days that a person at one hospital takes to say yes were days of every study in the queue."""
    (first,) = queued_plans(service._home)
    values = plan_values(foundation.manifest.hash)
    queue_plan(service._home, Plan.parse(values | {"study": values["study"] | {"seed": 4}}))
    tried: list[str] = []
    stop = threading.Event()

    def run_of(_home: Path, plan: str, **_: object) -> Run:
        def does() -> None:
            tried.append("first" if plan == first.name else "second")
            if tried[-1] == "first" and tried.count("first") < 3:
                raise error

        return Run(does)

    monkeypatch.setattr(module, "_TRY_AGAIN_S", 0.01)
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr(module.Coordinator, "open", run_of)
    worker = threading.Thread(target=service.work, args=(stop,))
    worker.start()
    while queued_plans(service._home):
        time.sleep(0.01)
    stop.set()
    worker.join()
    assert tried[: len(trained)] == trained
    assert sorted(tried) == ["first"] * 3 + ["second"]


def test_two_plans_that_are_refused_are_a_line_each(service, monkeypatch) -> None:
    """Taking turns, each looked like news after the other."""
    (entry,) = queued_plans(service._home)
    other = entry.with_name("f" * 64)
    other.touch()
    for _ in range(3):
        service._note_short(entry, "bern refuses")
        service._note_short(other, "bern refuses")
    told = [each.facts["plan"] for each in service._audit.verify() if each.event == Event.SHORT]
    assert told == [entry.name, other.name]


def test_a_plan_that_is_handed_over_again_waits_anew(service, monkeypatch, foundation) -> None:
    def short() -> None:
        raise AggregationError("too few")

    for _ in range(2):
        train(service, monkeypatch, short)
        queue_plan(service._home, Plan.parse(plan_values(foundation.manifest.hash)))
    events = [entry.event for entry in service._audit.verify()]
    assert events.count("round without a result") == 2


def test_what_waits_is_told_when_the_program_ends(service, monkeypatch) -> None:
    """Else counters would be lower after a restart than before it."""

    def short() -> None:
        raise AggregationError("too few")

    for _ in range(3):
        train(service, monkeypatch, short)
    service._grpc = ()
    monkeypatch.setattr(service.superlink, "stop", lambda: None)
    monkeypatch.setattr(service.metrics, "stop", lambda: None)
    service._over.set()
    service._looking.start()
    service.stop()
    assert num_short(service._audit.verify()) == 3


def test_a_plan_that_comes_to_no_run_keeps_its_reason(service, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HomeError("this home has another foundation")

    monkeypatch.setattr(module.Coordinator, "open", refuse)
    (entry,) = queued_plans(service._home)
    assert service._train(entry, threading.Event())
    assert failed_plans(service._home) == {entry.name: "this home has another foundation"}
    assert queued_plans(service._home) == []


def test_a_connected_node_is_a_contact_of_its_site(service, monkeypatch) -> None:
    token = service._enrolments.invite("north", patients=7, valid_for=timedelta(hours=1))
    service._enrolments.enrol(
        token,
        fingerprint="f" * 64,
        node_public_key=openssh(new_key()),
        identity_public_key=identity_of(1),
        declared_patients=7,
    )
    online = property(lambda _: frozenset({"north", "revoked"}))
    monkeypatch.setattr(type(service.superlink), "online", online)
    service._over.set()
    service._watch_sites()
    assert set(service._home.contacts.last()) == {"north"}


def test_a_run_counts_from_zero_before_its_first_round(service) -> None:
    """An alert needs a rise, and none is in what a series is born with."""
    (entry,) = queued_plans(service._home)
    service._registry.start_run("r1", entry.name)
    service._over.set()
    service._watch_sites()
    shown = generate_latest(service.metrics._registry).decode().splitlines()
    assert 'crafts_updates_total{outcome="refused",run="r1"} 0.0' in shown
    assert 'crafts_rounds_total{run="r1"} 0.0' in shown


def test_a_weight_that_rose_is_logged_and_in_the_audit_log(service, caplog) -> None:
    rise = WeightRise(site="bern", before=0.98, now=2.0)
    round_of_it = receipt(aachen=0.5, bern=0.5).model_copy(update={"rises": (rise,)})
    service._committed(round_of_it)
    entry = service._audit.verify()[-2]
    assert entry.event == "weight of a site rose"
    assert entry.facts == {"run": "run", "round": 1, "site": "bern", "before": 0.98, "now": 2.0}
    assert "weight rose site=bern round=1 per share 0.98 -> 2.00" in caplog.text


def test_a_round_whose_lines_a_kill_cut_off_is_noted_at_the_next_start(
    service, monkeypatch
) -> None:
    """Once, with its refusals, and none that was noted before."""
    refusal = Refusal(site="chur", reason="of another round")
    known = receipt(bern=0.5, aachen=0.5)
    cut_off = known.model_copy(update={"round": 2, "refused": (refusal,), "missing": ("chur",)})
    service._committed(known)

    def later() -> None:
        raise StorageError("cannot write checkpoint")

    for _ in range(2):
        assert not train(service, monkeypatch, later, known, cut_off)
    told = [entry for entry in service._audit.verify() if "round" in entry.facts]
    events = [(entry.event, entry.facts["round"]) for entry in told]
    assert events == [("round committed", 1), ("update refused", 2), ("round committed", 2)]
    assert told[2].facts["missing"] == ["chur"]


def test_an_altered_line_stops_no_study(service, monkeypatch, caplog) -> None:
    service._committed(receipt(bern=0.5, aachen=0.5))
    service._committed(receipt(aachen=1.0))
    file = service._home.path / "audit.jsonl"
    file.write_text(file.read_text().replace("bern", "chur"))
    ran = []
    train(service, monkeypatch, lambda: ran.append(1), receipt(bern=0.5))
    assert ran
    assert "no line of the audit log is made up" in caplog.text


def test_a_plan_that_diverged_is_not_tried_again(service, monkeypatch) -> None:
    def diverge() -> None:
        raise DivergedError("round 1: the alignment margin is nan")

    assert train(service, monkeypatch, diverge)
    assert queued_plans(service._home) == []
    assert [entry.event for entry in service._audit.verify()][-1] == "plan failed"


def test_a_plan_that_fails_while_it_is_stopped_ends_nothing(service, monkeypatch) -> None:
    def fail() -> None:
        (entry,) = queued_plans(service._home)
        entry.unlink()
        raise DivergedError("round 1: the alignment margin is nan")

    assert train(service, monkeypatch, fail)


def test_a_plan_that_leaves_while_the_queue_is_read_is_not_missed(service) -> None:
    """As a link that leads nowhere does: it is listed, and is not there."""
    (service._home.path / "queue" / "gone").symlink_to("nowhere")
    assert len(queued_plans(service._home)) == 1


def test_sites_are_looked_after_whatever_happened(service, monkeypatch) -> None:
    """Revocation closes the fleet path by this thread."""
    looks = []

    def fail_first(_sites: object) -> None:
        looks.append(1)
        if len(looks) == 1:
            raise KeyError("unforeseen")

    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr(service.superlink, "admit_only", fail_first)
    service._looking.start()
    deadline = time.monotonic() + 10
    while len(looks) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    service._over.set()
    service._looking.join()
    assert len(looks) >= 3


def test_a_site_that_enrols_while_sites_are_looked_after_stays(service, monkeypatch) -> None:
    """Its node would be dismissed by a list that is older than it, and never come back."""
    looked_up, key, enrolling = service._enrolments.sites, openssh(new_key()), []

    def enrols_meanwhile() -> list:
        old = looked_up()
        if not enrolling:
            enrolling.append(threading.Thread(target=service._enrolled, args=("north", key)))
            enrolling[0].start()
            enrolling[0].join(timeout=0.5)
            service._over.set()
        return old

    monkeypatch.setattr(service._enrolments, "sites", enrols_meanwhile)
    service._watch_sites()
    enrolling[0].join()
    assert admitted_nodes(service.superlink) == {"north"}
