"""The round loop on a grid of honest, silent and hostile sites, and under crashes anywhere."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Error, RecordDict

from crafts_core import durable
from crafts_core.exchange import RoundRequest, state_hash
from crafts_core.state import State
from crafts_server.aggregation import PublicProbe, RoundState, ServerStep, Uniform
from crafts_server.checkpoints import Checkpoint
from crafts_server.collection import Members, Patience
from crafts_server.errors import (
    AggregationError,
    CheckpointError,
    DivergedError,
    SitesRefuseError,
)
from crafts_server.receipts import RoundReceipt
from crafts_server.registry import RunStatus
from crafts_server.rounds import run_rounds
from crafts_server.study import Study
from support.fake_grid import FakeGrid
from support.studies import (
    RUN_ID,
    QuadraticProbe,
    honest_site,
    received,
    reply_with,
    silent_site,
    small_plan,
    small_state,
    small_study,
    three_sites,
)


def run(
    study: Study, grid: FakeGrid, after: Callable[[RoundReceipt], None] = lambda _: None
) -> tuple[Checkpoint, list[RoundReceipt]]:
    receipts: list[RoundReceipt] = []

    def on_round(receipt: RoundReceipt) -> None:
        receipts.append(receipt)
        after(receipt)

    try:
        last = run_rounds(grid, study, initial_state=small_state, on_round=on_round)
        return last, receipts
    finally:
        study.registry.close()


@pytest.fixture
def undisturbed(tmp_path: Path) -> State:
    """Where the study ends when nothing happens."""
    last, _ = run(small_study(tmp_path / "undisturbed"), FakeGrid(three_sites()))
    return last.state()


def same(left: State, right: State) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left | right)


def test_a_study_runs_to_its_end_and_says_what_happened(tmp_path: Path) -> None:
    study = small_study(tmp_path / "home")
    last, receipts = run(study, FakeGrid(three_sites()))
    assert [receipt.round for receipt in receipts] == [1, 2, 3, 4]
    assert [receipt.factor for receipt in receipts] == ["second", "first", "second", "first"]
    assert [receipt.stage for receipt in receipts] == ["pretraining"] * 2 + ["alignment"] * 2
    assert last.round == 4
    assert receipts[-1].state_hash == state_hash(last.state())
    for receipt in receipts:
        assert [site.site for site in receipt.sites] == ["aachen", "bern", "coimbra"]
        assert sum(site.weight for site in receipt.sites) == pytest.approx(1.0)
        assert receipt.refused == () and receipt.missing == ()  # noqa: PT018
    assert small_study(tmp_path / "home").registry.run(RUN_ID).status is RunStatus.FINISHED


def test_a_round_without_sums_has_the_words_and_files_that_it_always_had(tmp_path: Path) -> None:
    """Sites and auditors of earlier versions read them, and refuse what they do not know."""
    grid = FakeGrid(three_sites())
    last, _ = run(small_study(tmp_path / "home"), grid)
    _, asked = grid.requests[0]
    assert set(asked) == {"request", "plan", "adapter"}
    assert set(asked["request"]) == {
        *("run_id", "plan_hash", "round", "stage_index", "factor"),
        *("checkpoint_hash", "stage_start_hash"),
    }
    assert {path.name for path in last.path.iterdir()} == {
        *("adapter.safetensors", "momentum.safetensors", "receipt.json"),
        *("manifest.json", "manifest.sig"),
    }
    assert list(json.loads((last.path / "receipt.json").read_text())) == [
        *("run_id", "round", "stage", "stage_index", "factor", "sites", "refused", "missing"),
        *("rises", "margin_before", "margin_after", "step_norm", "trust_norm", "step_scale"),
        *("bytes_down", "bytes_up", "seconds", "finished_at", "sent_hash", "state_hash"),
    ]


def test_margins_connect_from_round_to_round(tmp_path: Path) -> None:
    _, receipts = run(small_study(tmp_path / "home"), FakeGrid(three_sites()))
    for before, after in itertools.pairwise(receipts):
        assert after.margin_before == before.margin_after


def test_bytes_are_the_arrays_that_travelled(tmp_path: Path) -> None:
    _, receipts = run(small_study(tmp_path / "home"), FakeGrid(three_sites()))
    header = 128
    assert receipts[0].bytes_down == 3 * (header + 2 * 4 * 4)
    assert receipts[0].bytes_up == 3 * (header + 4 * 4)


def test_one_uniform_site_moves_the_adapter_by_exactly_its_delta(tmp_path: Path) -> None:
    plan = small_plan(rule="uniform", min_sites=1)
    last, _ = run(
        small_study(tmp_path / "home", plan=plan), FakeGrid({5: honest_site("solo", 2.0)})
    )
    expected = small_state()
    for planned in plan.rounds():
        name = f"layer.{planned.factor}"
        expected[name] = expected[name] + (2.0 - expected[name]) / 10.0
    assert same(last.state(), expected)


def test_each_request_names_the_adapter_that_comes_along(tmp_path: Path) -> None:
    grid = FakeGrid(three_sites())
    run(small_study(tmp_path / "home"), grid)
    for _, content in grid.requests:
        request = RoundRequest.from_scalars(dict(content["request"]))
        assert state_hash(received(content["adapter"])) == request.checkpoint_hash
        if "stage_start" in content:
            assert state_hash(received(content["stage_start"])) == request.stage_start_hash


def test_the_stage_start_goes_only_to_sites_that_lack_it(tmp_path: Path) -> None:
    """Stage alignment starts in round 3. Bern fails there, so in round 4 it needs theta1."""
    sites = three_sites()
    sites[22] = failing_in(3, "bern")
    grid = FakeGrid(sites)
    run(small_study(tmp_path / "home"), grid)
    sent = [
        (content["request"]["round"], node)
        for node, content in grid.requests
        if "stage_start" in content
    ]
    assert sent == [(4, 22)]


def failing_in(number: int, name: str, goal: float = 1.0):  # type: ignore[no-untyped-def]
    honest = honest_site(name, goal)

    def answer(content: RecordDict) -> RecordDict | Error:
        if content["request"]["round"] == number:
            return Error(101, "policy: no more rounds today")
        return honest(content)  # type: ignore[return-value]

    return answer


@pytest.mark.parametrize(
    ("patients", "reason"),
    [
        ({"aachen": 100, "bern": 30, "coimbra": 100}, "declared_patients: agreed are 30, got 100"),
        ({"aachen": 100, "coimbra": 100}, "declared_patients: nothing was agreed"),
    ],
)
def test_who_declares_what_was_not_agreed_is_refused_and_named(
    tmp_path: Path, patients: dict[str, int], reason: str
) -> None:
    study = small_study(tmp_path / "home", patients=patients)
    _, receipts = run(study, FakeGrid(three_sites()))
    for receipt in receipts:
        assert [site.site for site in receipt.sites] == ["aachen", "coimbra"]
        (refusal,) = receipt.refused
        assert refusal.site == "node 22"
        assert refusal.reason.startswith(reason)


def test_a_number_that_both_sides_change_counts_from_the_next_reply_on(tmp_path: Path) -> None:
    patients = {"aachen": 100, "bern": 100, "coimbra": 100}
    sites = three_sites()
    resized = honest_site("bern", 1.0, declared_patients=50)

    def bern(content: RecordDict) -> RecordDict | Error | None:
        if content["request"]["round"] < 3:
            return honest_site("bern", 1.0)(content)
        patients["bern"] = 50
        return resized(content)

    sites[22] = bern
    _, receipts = run(small_study(tmp_path / "home", patients=patients), FakeGrid(sites))
    told = [site.declared_patients for r in receipts for site in r.sites if site.site == "bern"]
    assert told == [100, 100, 50, 50]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_site_that_strikes_after_lying_low_is_told_in_the_receipt(
    tmp_path: Path, restarted: bool
) -> None:
    """Round 1 as bad as can be, round 2 as the gate likes it; a restart in between forgets none."""
    plan = small_plan(gate_temperature=1e-3, margin_tolerance=10.0)
    sites = {number: honest_site(f"site-{number}", -1.0) for number in range(1, 4)}

    def striker(content: RecordDict) -> RecordDict | Error | None:
        lies_low = content["request"]["round"] == 1
        return honest_site("site-4", -9.0 if lies_low else 1.0)(content)

    sites[4] = striker
    study = small_study(tmp_path / "home", plan=plan)
    if restarted:
        with pytest.raises(KeyboardInterrupt):
            run_rounds(
                FakeGrid(sites), study, initial_state=small_state, on_round=_stop_after_the_first
            )
        study.registry.close()
        study = small_study(tmp_path / "home", plan=plan)
    last, receipts = run(study, FakeGrid(sites))
    (second,) = [receipt for receipt in receipts if receipt.round == 2]
    (rise,) = second.rises
    assert rise.site == "site-4"
    assert rise.before < 0.01
    assert rise.now == pytest.approx(2.0), "half of all, and four sites are equally large"
    assert all(not receipt.rises for receipt in receipts if receipt.round == 1)
    assert last.round == 4


def _stop_after_the_first(_receipt: RoundReceipt) -> None:
    raise KeyboardInterrupt


def test_a_site_that_fails_does_not_fail_the_round(tmp_path: Path) -> None:
    sites = three_sites()
    sites[22] = failing_in(2, "bern")
    _, receipts = run(small_study(tmp_path / "home"), FakeGrid(sites))
    assert [len(receipt.sites) for receipt in receipts] == [3, 2, 3, 3]
    (refusal,) = receipts[1].refused
    assert (refusal.site, refusal.reason) == ("bern", "code 101: policy: no more rounds today")


def test_a_silent_site_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    plan = small_plan(deadline_s=0.05)
    sites = {**three_sites(), 44: silent_site}
    _, receipts = run(small_study(tmp_path / "home", plan=plan), FakeGrid(sites))
    assert all(len(receipt.sites) == 3 for receipt in receipts)
    assert all(receipt.missing == ("node 44",) for receipt in receipts)


def test_too_few_sites_at_the_deadline_stop_the_run_and_name_who_is_missing(tmp_path: Path) -> None:
    plan = small_plan(deadline_s=0.05, min_sites=2)
    sites = {11: honest_site("aachen", 2.0), 22: silent_site, 33: failing_in(1, "coimbra")}
    with pytest.raises(AggregationError) as caught:
        run(small_study(tmp_path / "home", plan=plan), FakeGrid(sites))
    message = str(caught.value)
    assert "round 1: 1 good updates, expected at least 2" in message
    assert "Good: aachen" in message
    assert "Missing: node 22" in message
    assert "Refused: node 33 (code 101" in message
    assert not isinstance(caught.value, SitesRefuseError), "node 22 may come back by itself"


def test_too_many_that_refuse_are_told_apart_from_sites_that_are_away(tmp_path: Path) -> None:
    plan = small_plan(min_sites=2)
    sites = {11: honest_site("aachen", 2.0), 33: failing_in(1, "coimbra")}
    with pytest.raises(SitesRefuseError, match=r"Refused: node 33.*crafts-server stop"):
        run(small_study(tmp_path / "home", plan=plan), FakeGrid(sites))


class Counting(Uniform):
    """A rule from research whose state is a number: rounds so far, and a hundred for each stage."""

    def move(self, start: RoundState, delta: State, probe: PublicProbe) -> ServerStep:
        count = start.server_state.get("count", torch.zeros(1)) + 1
        return replace(super().move(start, delta, probe), server_state={"count": count})

    def begin_stage(self, server_state: State) -> State:
        return {name: tensor + 100 for name, tensor in server_state.items()}


def test_the_rule_owns_its_state_over_stages_and_restarts(tmp_path: Path) -> None:
    study = small_study(tmp_path / "home", rule=Counting())
    with pytest.raises(KeyboardInterrupt):
        run_rounds(
            FakeGrid(three_sites()),
            study,
            initial_state=small_state,
            on_round=_stop_after_the_first,
        )
    study.registry.close()
    last, _ = run(small_study(tmp_path / "home", rule=Counting()), FakeGrid(three_sites()))
    assert last.server_state()["count"].item() == 4 + 100


def test_a_stopped_run_goes_on_when_the_sites_are_back(tmp_path: Path, undisturbed: State) -> None:
    sites = three_sites()
    sites[11], sites[22] = failing_in(3, "aachen", 2.0), failing_in(3, "bern")
    with pytest.raises(AggregationError, match="round 3"):
        run(small_study(tmp_path / "home"), FakeGrid(sites))
    last, receipts = run(small_study(tmp_path / "home"), FakeGrid(three_sites()))
    assert [receipt.round for receipt in receipts] == [3, 4]
    assert same(last.state(), undisturbed)


def test_a_diverged_round_is_not_committed(tmp_path: Path, monkeypatch) -> None:
    """And says so by an error of its own: the sites are all there."""
    study = small_study(tmp_path / "home")
    monkeypatch.setattr(QuadraticProbe, "margin", lambda *_: math.nan)
    with pytest.raises(DivergedError, match=r"round 1.*smaller learning_rate"):
        run(study, FakeGrid(three_sites()))
    assert [checkpoint.round for checkpoint in study.store.chain()] == [0]


def test_a_late_joiner_is_waited_for_and_asked(tmp_path: Path) -> None:
    class Joining(FakeGrid):
        def get_node_ids(self) -> list[int]:
            self.polls = getattr(self, "polls", 0) + 1
            return [11, 22] if self.polls > 3 else [11]

    patience = Patience(poll_s=0.001, join_wait_s=5.0)
    study = small_study(tmp_path / "home", patience=patience)
    _, receipts = run(study, Joining(three_sites()))
    assert [site.site for site in receipts[0].sites] == ["aachen", "bern"]


def hostile(name: str, kind: str):  # type: ignore[no-untyped-def]
    honest = honest_site(name, 1.0)

    def answer(content: RecordDict) -> RecordDict:
        request = RoundRequest.from_scalars(dict(content["request"]))
        good = honest(content)
        assert isinstance(good, RecordDict)
        key = f"layer.{request.factor}"
        delta = received(good["delta"], {key: small_state()[key]})
        match kind:
            case "nan":
                delta[key] = delta[key] * float("nan")
            case "shape":
                delta[key] = torch.ones(9, 9)
            case "other factor":
                delta = {"layer.other": torch.ones(4, 1)}
            case "name of another":
                return reply_with(request, "aachen", delta)
            case "old round":
                return reply_with(request, name, delta, round=request.round + 1)
            case "other plan":
                return reply_with(request, name, delta, plan_hash="f" * 64)
            case "truncated":
                del good["delta"]
                return good
        return reply_with(request, name, delta)

    return answer


@pytest.mark.parametrize(
    "kind",
    ["nan", "shape", "other factor", "name of another", "old round", "other plan", "truncated"],
)
def test_a_hostile_reply_is_refused_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    honest_sites = {11: honest_site("aachen", 2.0), 33: honest_site("coimbra", -1.0)}
    expected, _ = run(small_study(tmp_path / "without"), FakeGrid(honest_sites))
    sites = {**honest_sites, 44: hostile("mallory", kind)}
    last, receipts = run(small_study(tmp_path / "with"), FakeGrid(sites))
    assert same(last.state(), expected.state())
    for receipt in receipts:
        (refusal,) = receipt.refused
        assert refusal.site == "node 44"


def test_an_impostor_that_answers_first_next_time_is_still_refused(tmp_path: Path) -> None:
    """Node 5 is asked before aachen's node 11; in round 1 it was still called something else."""

    def impostor(content: RecordDict) -> RecordDict | Error:
        if content["request"]["round"] == 1:
            return Error(2, "not yet")
        return honest_site("aachen", 50.0)(content)  # type: ignore[return-value]

    _, receipts = run(small_study(tmp_path / "home"), FakeGrid({**three_sites(), 5: impostor}))
    assert "another node is site aachen" in receipts[1].refused[0].reason
    assert len(receipts[1].sites) == 3


def test_a_hospital_that_enrols_again_goes_on_under_its_new_node(tmp_path: Path) -> None:
    """Every year, with a new key: it was refused, and had paid, until the coordinator restarted."""
    grid = FakeGrid(three_sites())
    enrolled = {11: "aachen", 22: "bern", 33: "coimbra", 44: "aachen"}

    def enrol_again(receipt: RoundReceipt) -> None:
        if receipt.round == 1:
            grid.sites[44] = grid.sites.pop(11)

    study = replace(
        small_study(tmp_path / "home"), members=Members(enrolled_as=lambda node: enrolled.get(node))
    )
    _, receipts = run(study, grid, enrol_again)
    assert [[site.site for site in receipt.sites] for receipt in receipts] == [
        ["aachen", "bern", "coimbra"]
    ] * 4
    assert not any(receipt.refused or receipt.missing for receipt in receipts)


def test_a_site_that_enrols_again_within_a_round_counts_once(tmp_path: Path) -> None:
    """Its node before had answered already; two answers of one site are not two sites."""
    sites = {**three_sites(), 44: honest_site("aachen", 2.0)}
    enrolled = {11: "aachen", 22: "bern", 33: "coimbra", 44: "aachen"}
    study = replace(
        small_study(tmp_path / "home"), members=Members(enrolled_as=lambda node: enrolled.get(node))
    )
    last, receipts = run(study, FakeGrid(sites))
    expected, _ = run(small_study(tmp_path / "without"), FakeGrid(three_sites()))
    assert same(last.state(), expected.state())
    assert [each.reason for each in receipts[0].refused] == ["aachen has delivered before"]


def test_a_node_that_changes_its_name_is_refused(tmp_path: Path) -> None:
    def shifty(content: RecordDict) -> RecordDict:
        name = f"site-{content['request']['round']}"
        return honest_site(name, 1.0)(content)  # type: ignore[return-value]

    _, receipts = run(small_study(tmp_path / "home"), FakeGrid({**three_sites(), 44: shifty}))
    assert len(receipts[0].sites) == 4
    assert "this node was site-1 before" in receipts[1].refused[0].reason


def test_a_tampered_checkpoint_stops_the_run(tmp_path: Path) -> None:
    run(small_study(tmp_path / "home"), FakeGrid(three_sites()))
    path = tmp_path / "home" / "checkpoints" / "round-0004" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match="altered"):
        run(small_study(tmp_path / "home"), FakeGrid(three_sites()))


@pytest.mark.parametrize("rounds_lost", [1, 5])
def test_a_rolled_back_run_is_noticed(tmp_path: Path, rounds_lost: int) -> None:
    """A valid but older chain: the registry is the witness."""
    run(small_study(tmp_path / "home"), FakeGrid(three_sites()))
    checkpoints = tmp_path / "home" / "checkpoints"
    for number in range(5 - rounds_lost, 5):
        shutil.rmtree(checkpoints / f"round-{number:04d}")
    with pytest.raises(CheckpointError, match="missing or was replaced"):
        run(small_study(tmp_path / "home"), FakeGrid(three_sites()))


def test_a_finished_study_asks_nobody_again(tmp_path: Path, undisturbed: State) -> None:
    run(small_study(tmp_path / "home"), FakeGrid(three_sites()))
    grid = FakeGrid(three_sites())
    last, receipts = run(small_study(tmp_path / "home"), grid)
    assert (receipts, grid.requests) == ([], [])
    assert same(last.state(), undisturbed)


class Killed(BaseException):
    """The process dies: nothing but ``finally`` runs."""


class Countdown:
    """Dies at the n-th durable write: each fsync of file or directory, each index entry."""

    def __init__(self, at: int) -> None:
        self.left = at

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def run_until_killed(study: Study, at: int, monkeypatch: pytest.MonkeyPatch) -> State | None:
    """The final adapter, or None if the run was killed."""
    countdown, fsync, record = Countdown(at), os.fsync, study.registry.record

    def counted_fsync(descriptor: int) -> None:
        countdown.tick()
        fsync(descriptor)

    def counted_record(*args: object) -> None:
        countdown.tick()
        record(*args)  # type: ignore[arg-type]
        countdown.tick()

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", counted_fsync)
        patch.setattr(study.registry, "record", counted_record)
        try:
            return run(study, FakeGrid(three_sites()))[0].state()
        except Killed:
            return None


def committed(home: Path) -> int:
    return len(list((home / "checkpoints").glob("round-*")))


@pytest.mark.slow
def test_killed_at_any_durable_write_no_round_is_lost_and_the_end_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write of a whole run, one after the other; each time the next process finishes."""
    plan = small_plan(rounds=1)
    undisturbed, _ = run(small_study(tmp_path / "undisturbed", plan=plan), FakeGrid(three_sites()))
    deaths = 0
    while True:
        home = tmp_path / f"killed-{deaths}"
        study = small_study(home, plan=plan)
        if run_until_killed(study, deaths + 1, monkeypatch) is not None:
            break
        deaths += 1
        rounds_before = max(committed(home) - 1, 0)
        last, receipts = run(small_study(home, plan=plan), FakeGrid(three_sites()))
        assert len(receipts) == 2 - rounds_before, f"killed at write {deaths}"
        assert same(last.state(), undisturbed.state()), f"killed at write {deaths}"
    assert deaths > 20


def test_killed_again_and_again_the_end_is_the_same(
    tmp_path: Path, undisturbed: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine writes a life: each life commits about one round."""
    for _ in range(20):
        state = run_until_killed(small_study(tmp_path / "home"), 9, monkeypatch)
        if state is not None:
            break
    assert state is not None
    assert same(state, undisturbed)


CHILD = """
import os, signal, sys
from pathlib import Path
from crafts_server.rounds import run_rounds
from support.fake_grid import FakeGrid
from support.studies import small_state, small_study, three_sites

def dying(content):
    if content["request"]["round"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return three_sites()[33](content)

sites = {**three_sites(), 33: dying}
run_rounds(FakeGrid(sites), small_study(Path(sys.argv[1])), initial_state=small_state,
           on_round=lambda receipt: None)
"""


@pytest.mark.exhaustive
def test_kill_9_in_a_round_loses_no_committed_round(tmp_path: Path, undisturbed: State) -> None:
    """As at any durable write, in a process of its own, where no ``finally`` runs either."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "home")],
        env=environment,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert committed(tmp_path / "home") == 3
    last, receipts = run(small_study(tmp_path / "home"), FakeGrid(three_sites()))
    assert [receipt.round for receipt in receipts] == [3, 4]
    assert same(last.state(), undisturbed)


def test_the_reply_of_a_killed_round_is_asked_for_with_the_same_request(tmp_path: Path) -> None:
    """So that a site's outbox answers without spending again."""
    sites = three_sites()

    def stops(_content: RecordDict) -> RecordDict:
        raise Killed

    sites[33] = stops
    first = FakeGrid(sites)
    with pytest.raises(Killed):
        run(small_study(tmp_path / "home"), first)
    second = FakeGrid(three_sites())
    run(small_study(tmp_path / "home"), second)
    assert dict(first.requests[0][1]["request"]) == dict(second.requests[0][1]["request"])
