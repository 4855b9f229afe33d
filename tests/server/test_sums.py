"""Rounds of sums on a grid of honest, late, vanishing and hostile sites, and under crashes."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, RecordDict

from crafts_core import durable
from crafts_core.exchange import Announcement, RoundRequest
from crafts_core.state import State
from crafts_privacy.secure_aggregation.masking import Group
from crafts_server.attempts import Attempts
from crafts_server.checkpoints import Checkpoint
from crafts_server.errors import AggregationError, VoidSumsError
from crafts_server.receipts import RoundReceipt
from crafts_server.rounds import run_rounds
from crafts_server.study import Study
from support.fake_grid import FakeGrid
from support.studies import RUN_ID, small_state, small_study
from support.summing_sites import SummingSite, summed_plan, summing_sites

pytestmark = pytest.mark.slow

Sites = dict[int, SummingSite]


def study_of(home: Path, sites: Sites) -> Study:
    site = sites[min(sites)]
    return small_study(home, plan=site.plan, roster=site.roster)


def run(
    home: Path, sites: Sites, grid: FakeGrid | None = None
) -> tuple[Checkpoint, list[RoundReceipt]]:
    study = study_of(home, sites)
    receipts: list[RoundReceipt] = []
    try:
        last = run_rounds(
            grid or FakeGrid(sites), study, initial_state=small_state, on_round=receipts.append
        )
        return last, receipts
    finally:
        study.registry.close()


def same(left: State, right: State) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left | right)


def quiet(sites: Sites) -> Sites:
    """Without noise, so that two runs can be compared."""
    for site in sites.values():
        site.noise = lambda _own, num_values: torch.zeros(num_values, dtype=torch.float64)  # type: ignore[method-assign]
    return sites


def test_a_study_of_sums_runs_to_its_end_and_says_what_happened(tmp_path: Path) -> None:
    last, receipts = run(tmp_path / "home", summing_sites(summed_plan()))
    assert last.round == 4
    for receipt in receipts:
        (told,) = receipt.sums
        assert told.members == ("aachen", "bern", "coimbra")
        assert (told.attempt, told.missing, told.is_plausible) == (1, (), True)
        weights = [site.weight for site in receipt.sites]
        assert weights == pytest.approx([30 / 120, 40 / 120, 50 / 120])
        assert all(site.update_norm is None for site in receipt.sites)
        assert (receipt.step_scale, receipt.refused, receipt.missing) == (1.0, (), ())


def test_the_upload_is_four_bytes_a_number(tmp_path: Path) -> None:
    _, receipts = run(tmp_path / "home", summing_sites(summed_plan(rounds=1)))
    header = 128
    assert receipts[0].bytes_up == 3 * (header + 4 * 4)


def test_the_coordinator_gets_nothing_but_ready_words_and_masked_vectors(tmp_path: Path) -> None:
    """Of ten thousand numbers a vector's own gradients and noise would lie near zero."""
    sites = summing_sites(summed_plan(rounds=1))
    run(tmp_path / "home", sites)
    for site in sites.values():
        for answer in site.sealed.values():
            assert set(answer) == {"masked", "sum"}
            (array,) = answer["sum"].values()
            words = np.frombuffer(array.data[-16:], "<u4").view(np.int32)
            assert np.abs(words.astype(np.float64)).max() > 2**25


# --- who comes, and when


class LateInRound(SummingSite):
    """Not there when round 1 asks who is ready."""

    def ready(self, request: RoundRequest, state: State) -> RecordDict | Error | None:
        return None if request.round == 1 else super().ready(request, state)


def test_who_is_late_to_be_ready_is_no_member_and_costs_no_attempt(tmp_path: Path) -> None:
    plan = summed_plan(deadline_s=0.05)
    sites = summing_sites(plan, 4, kinds={3: LateInRound})
    _, receipts = run(tmp_path / "home", sites)
    assert receipts[0].sums[0].members == ("aachen", "bern", "coimbra")
    assert receipts[0].missing == ("node 13",)
    assert receipts[1].sums[0].members == ("aachen", "bern", "coimbra", "dresden")
    assert all(len(receipt.sums) == 1 for receipt in receipts)


def test_the_noise_is_whole_whoever_comes(tmp_path: Path) -> None:
    """With one colluding site of m members it is the plan's times root m / (m - 1)."""
    plan = summed_plan(deadline_s=0.05)
    sites = summing_sites(plan, 4, kinds={3: LateInRound})
    _, receipts = run(tmp_path / "home", sites)
    sigma = sites[10].noise_multiplier
    noise = [receipt.sums[0].noise_multiplier for receipt in receipts[:2]]
    assert noise == pytest.approx([sigma * (3 / 2) ** 0.5, sigma * (4 / 3) ** 0.5])


class VanishingOnce(SummingSite):
    """Ready in round 1, then gone for that attempt."""

    def masked(
        self, request: RoundRequest, announcement: Announcement
    ) -> RecordDict | Error | None:
        if (request.round, request.attempt) == (1, 1):
            return Error(119, "this site is not ready for this round")
        return super().masked(request, announcement)


def test_a_void_attempt_is_repeated_with_fresh_words(tmp_path: Path) -> None:
    sites = summing_sites(summed_plan(), 4, kinds={1: VanishingOnce})
    _, receipts = run(tmp_path / "home", sites)
    void, good = receipts[0].sums
    assert (void.attempt, void.missing, void.norm) == (1, ("bern",), None)
    assert void.in_words == "4 members, attempt 1: not read, as bern did not deliver"
    assert good.in_words.startswith("4 members, attempt 2: norm ")
    assert ", within 0 to " in good.in_words
    assert (good.attempt, good.missing, good.is_plausible) == (2, (), True)
    assert receipts[0].missing == ("bern",)
    assert [(told[0], told[1]) for told in sites[10].sent] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (3, 1),
        (4, 1),
    ]
    assert len({members_hash for *_, members_hash in sites[10].sent}) == 5


class NeverDelivering(SummingSite):
    def masked(
        self, request: RoundRequest, announcement: Announcement
    ) -> RecordDict | Error | None:
        return Error(119, "this site is not ready for this round")


def test_who_is_ready_and_does_not_deliver_twice_is_left_out(tmp_path: Path) -> None:
    sites = summing_sites(summed_plan(), 4, kinds={1: NeverDelivering})
    _, receipts = run(tmp_path / "home", sites)
    assert [len(receipt.sums) for receipt in receipts] == [3, 1, 1, 1]
    assert all(receipt.left_out == ("bern",) for receipt in receipts)
    assert receipts[1].sums[0].members == ("aachen", "coimbra", "dresden")


def test_nobody_is_left_out_whom_the_plan_cannot_do_without(tmp_path: Path) -> None:
    plan = summed_plan(max_attempts=4)
    sites = summing_sites(plan, 3, kinds={1: NeverDelivering})
    with pytest.raises(VoidSumsError, match=r"4 sums in a row could not be read.*Missing: bern"):
        run(tmp_path / "home", sites)


def test_too_few_that_are_ready_stop_the_run_and_are_named(tmp_path: Path) -> None:
    sites = summing_sites(summed_plan(deadline_s=0.05), 3, kinds={2: LateInRound})
    with pytest.raises(AggregationError, match=r"2 sites are ready, expected at least 3.*node 12"):
        run(tmp_path / "home", sites)


# --- hostile sites


class Garbage(SummingSite):
    """What somebody makes up fills the whole group."""

    def reply(
        self,
        request: RoundRequest,
        members_hash: str,
        vector_D: Group,
        own: float,
        **changes: object,
    ) -> RecordDict:
        made_up = np.random.default_rng(1).integers(0, 2**32, len(vector_D), dtype=np.uint32)
        return super().reply(request, members_hash, made_up, own, **changes)


def test_a_sum_that_cannot_come_from_the_mechanism_moves_nothing(tmp_path: Path) -> None:
    sites = summing_sites(summed_plan(rounds=1), 3, kinds={1: Garbage})
    last, receipts = run(tmp_path / "home", sites)
    assert same(last.state(), small_state())
    for receipt in receipts:
        assert (receipt.step_scale, receipt.accepted) == (0.0, False)
        assert receipt.sums[0].is_plausible is False
        assert ", refused, beyond 0 to " in receipt.sums[0].in_words
        assert [site.site for site in receipt.sites] == ["aachen", "bern", "coimbra"]


@pytest.mark.parametrize("keys", [{"diagnose_after": 1}, {}], ids=["after one", "by default"])
def test_a_site_that_spoils_every_sum_is_found_by_halves(
    tmp_path: Path, keys: dict[str, int]
) -> None:
    """Also where a plan says nothing of it, or every step to its end would be charged and void."""
    plan = summed_plan(rounds=7, **keys)
    sites = summing_sites(plan, 8, kinds={5: Garbage})
    _, receipts = run(tmp_path / "home", sites)
    halves = [receipt for receipt in receipts if len(receipt.sums) == 2]
    assert 1 <= len(halves) <= 4
    for receipt in halves:
        assert receipt.step_scale == 1.0, "the good half counts"
        assert len(receipt.sites) == 4
    assert receipts[-1].left_out == ("fulda",)
    assert receipts[-1].sums[0].is_plausible
    assert len(receipts[-1].sites) == 7


def replies_with(changed: Callable[[SummingSite, RecordDict], RecordDict]) -> type[SummingSite]:
    """A site that sends something else than it has made."""

    class Lying(SummingSite):
        def reply(
            self,
            request: RoundRequest,
            members_hash: str,
            vector_D: Group,
            own: float,
            **changes: object,
        ) -> RecordDict:
            good = super().reply(request, members_hash, vector_D, own, **changes)
            return changed(self, good)

    return Lying


def _edited(**changes: object) -> type[SummingSite]:
    def edit(_site: SummingSite, good: RecordDict) -> RecordDict:
        for name, value in changes.items():
            good["masked"][name] = value
        return good

    return replies_with(edit)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_edited(site="aachen"), "aachen has delivered before"),
        (_edited(site="nobody"), "nobody is no member"),
        (_edited(members_hash="0" * 64), "members_hash"),
        (_edited(request_hash="0" * 64), "request_hash"),
        (_edited(schema_hash="0" * 64), "schema_hash"),
        (_edited(round=9), "round: expected 1, got 9"),
        (_edited(own_noise_multiplier=1e-6), "at least this member's share"),
        (_edited(own_noise_multiplier=1e6), "at most 4 times the plan's"),
        (_edited(own_noise_multiplier=float("nan")), "own_noise_multiplier"),
    ],
    ids=["twice", "stranger", "members", "request", "schema", "round", "less", "more", "nan"],
)
def test_a_vector_that_says_something_wrong_voids_the_sum_and_is_named(
    tmp_path: Path, kind: type[SummingSite], reason: str
) -> None:
    plan = summed_plan(rounds=1, max_attempts=1)
    sites = summing_sites(plan, 3, kinds={1: kind})
    with pytest.raises(VoidSumsError, match=reason):
        run(tmp_path / "home", sites)


@pytest.mark.parametrize("array", ["short", "float", "two", "none"])
def test_a_vector_of_another_shape_or_type_voids_the_sum(tmp_path: Path, array: str) -> None:
    def change(_site: SummingSite, good: RecordDict) -> RecordDict:
        (name,) = good["sum"].keys()
        whole = good["sum"][name].numpy()
        made = {
            "short": lambda: {name: whole[:-1]},
            "float": lambda: {name: whole.astype(np.float32)},
            "two": lambda: {name: whole, "more": whole},
            "none": dict,
        }[array]()
        good["sum"] = ArrayRecord({key: Array.from_numpy_ndarray(v) for key, v in made.items()})
        return good

    plan = summed_plan(rounds=1, max_attempts=1)
    sites = summing_sites(plan, 3, kinds={1: replies_with(change)})
    with pytest.raises(VoidSumsError, match="Missing: bern"):
        run(tmp_path / "home", sites)


class Impostor(SummingSite):
    """Says that it is ready under another site's name."""

    def ready(self, request: RoundRequest, state: State) -> RecordDict | Error | None:
        answer = super().ready(request, state)
        assert isinstance(answer, RecordDict)
        answer["ready"]["site"] = "aachen"
        return answer


class Replaying(SummingSite):
    """Sends the word of round 1 in every round."""

    first: RecordDict | None = None

    def ready(self, request: RoundRequest, state: State) -> RecordDict | Error | None:
        answer = super().ready(request, state)
        assert isinstance(answer, RecordDict)
        self.first = self.first or answer
        return self.first


@pytest.mark.parametrize(
    ("kind", "round_number", "reason"),
    [(Impostor, 1, "aachen"), (Replaying, 2, "request_hash")],
)
def test_a_word_that_is_not_the_sites_own_and_of_now_is_refused(
    tmp_path: Path, kind: type[SummingSite], round_number: int, reason: str
) -> None:
    sites = summing_sites(summed_plan(), 4, kinds={3: kind})
    grid = FakeGrid(sites)
    _, receipts = run(tmp_path / "home", sites, grid)
    receipt = receipts[round_number - 1]
    (refusal,) = receipt.refused
    assert reason in refusal.reason
    assert len(receipt.sites) == 3
    assert 13 not in [node for node, content in grid.requests if "announcement" in content][:3]


def test_a_site_that_is_not_in_the_roster_is_no_member(tmp_path: Path) -> None:
    sites = summing_sites(summed_plan(rounds=1), 4)
    inside = summing_sites(summed_plan(rounds=1), 3)
    stranger = sites[13]
    stranger.roster = inside[10].roster
    _, receipts = run(tmp_path / "home", {**inside, 13: stranger})
    assert receipts[0].sums[0].members == ("aachen", "bern", "coimbra")
    assert "dresden is not in the approved roster" in receipts[0].refused[0].reason


def test_a_site_with_another_noise_is_named_and_costs_nobody_an_attempt(tmp_path: Path) -> None:
    sites = summing_sites(summed_plan(rounds=1), 4)
    sites[13].noise_multiplier *= 0.997
    _, receipts = run(tmp_path / "home", sites)
    assert receipts[0].sums[0].members == ("aachen", "bern", "coimbra")
    assert "dresden calibrated the plan's noise to" in receipts[0].refused[0].reason


# --- crashes


class Killed(BaseException):
    """The process dies: nothing but ``finally`` runs."""


def vectors_of(sites: Sites) -> list[tuple[str, int, int]]:
    return [
        (site.name, number, attempt) for site in sites.values() for number, attempt, _ in site.sent
    ]


def run_until_killed(
    home: Path, sites: Sites, at: int, monkeypatch: pytest.MonkeyPatch
) -> Checkpoint | None:
    """Dies at the n-th point: every durable write, every message that is sent."""
    left = [at]

    def tick() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    class Dying(FakeGrid):
        def push_messages(self, messages):  # type: ignore[no-untyped-def]
            tick()
            ids = super().push_messages(messages)
            tick()
            return ids

    fsync = durable.os.fsync

    def counted_fsync(descriptor: int) -> None:
        tick()
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", counted_fsync)
        for name in ("begin", "announce", "note"):
            patch.setattr(Attempts, name, _ticking(getattr(Attempts, name), tick))
        try:
            return run(home, sites, Dying(sites))[0]
        except Killed:
            return None


def _ticking(method: Callable[..., object], tick: Callable[[], None]) -> Callable[..., object]:
    def ticking(*args: object, **options: object) -> object:
        tick()
        result = method(*args, **options)
        tick()
        return result

    return ticking


@pytest.fixture
def undisturbed(tmp_path: Path) -> State:
    """Where a study without noise ends when nothing happens."""
    return run(tmp_path / "undisturbed", quiet(summing_sites(summed_plan(rounds=1))))[0].state()


def check_killed_at(
    home: Path, at: int, undisturbed: State, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Kill one run there and let the next finish; False where the run has no such point."""
    sites = quiet(summing_sites(summed_plan(rounds=1)))
    if run_until_killed(home, sites, at, monkeypatch) is not None:
        return False
    last, _ = run(home, sites)
    assert same(last.state(), undisturbed), f"killed at point {at}"
    vectors = vectors_of(sites)
    assert len(vectors) == len(set(vectors)), "one vector for each site, round and attempt"
    return True


def test_killed_anywhere_the_end_is_the_same_and_no_attempt_is_announced_twice(
    tmp_path: Path, undisturbed: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The points around the first announcement, and two later ones."""
    for at in (7, 8, 9, 10, 12, 25, 40):
        check_killed_at(tmp_path / str(at), at, undisturbed, monkeypatch)


@pytest.mark.exhaustive
def test_killed_at_every_point(
    tmp_path: Path, undisturbed: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in itertools.count(1):
        if not check_killed_at(tmp_path / str(at), at, undisturbed, monkeypatch):
            break
    assert at > 40


def test_after_a_crash_an_announced_sum_is_asked_for_again_and_charged_once(
    tmp_path: Path,
) -> None:
    sites = summing_sites(summed_plan(rounds=1))

    class DyingAtTheLastMember(FakeGrid):
        def push_messages(self, messages):  # type: ignore[no-untyped-def]
            messages = list(messages)
            if "announcement" in messages[0].content and messages[0].metadata.dst_node_id == 12:
                raise Killed
            return super().push_messages(messages)

    with pytest.raises(Killed):
        run(tmp_path / "home", sites, DyingAtTheLastMember(sites))
    _, receipts = run(tmp_path / "home", sites)
    assert receipts[0].sums[0].attempt == 1
    assert sorted(vectors_of(sites))[:3] == [("aachen", 1, 1), ("aachen", 2, 1), ("bern", 1, 1)]


def test_after_a_crash_before_announcing_the_next_attempt_begins(tmp_path: Path) -> None:
    sites = summing_sites(summed_plan(rounds=1))
    study = study_of(tmp_path / "home", sites)
    assert Attempts(study.registry, RUN_ID).begin(1) == 1
    study.registry.close()
    _, receipts = run(tmp_path / "home", sites)
    assert [receipt.sums[0].attempt for receipt in receipts] == [2, 1]


def test_a_site_that_lost_its_sum_voids_the_attempt_that_a_crash_left(tmp_path: Path) -> None:
    sites = summing_sites(summed_plan(rounds=1))

    class DyingBeforeAnyMember(FakeGrid):
        def push_messages(self, messages):  # type: ignore[no-untyped-def]
            messages = list(messages)
            if "announcement" in messages[0].content:
                raise Killed
            return super().push_messages(messages)

    with pytest.raises(Killed):
        run(tmp_path / "home", sites, DyingBeforeAnyMember(sites))
    sites[11].held.clear()
    _, receipts = run(tmp_path / "home", sites)
    assert [told.attempt for told in receipts[0].sums] == [1, 2]
    assert receipts[0].sums[0].missing == ("bern",)


def test_noise_reaches_the_step(tmp_path: Path) -> None:
    """Two runs end elsewhere: what the sites drew is in the adapter."""
    one, _ = run(tmp_path / "one", summing_sites(summed_plan(rounds=1)))
    other, _ = run(tmp_path / "other", summing_sites(summed_plan(rounds=1)))
    assert not same(one.state(), other.state())
