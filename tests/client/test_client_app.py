import json
import logging
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, RecordDict
from typer.testing import CliRunner

from crafts_client import cli, refusals, site
from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.errors import EnrolmentError, HomeError, OutboxError, TrainingError
from crafts_client.outbox import REFUSED_RELEASE, Outbox
from crafts_client.patients import PatientTiles
from crafts_client.policy import PolicyError, Rule
from crafts_client.refusals import OF_ERROR, OF_RULE, refusal_of
from crafts_client.seen_updates import SeenUpdates
from crafts_client.site import Site
from crafts_client.trainer import Trainer
from crafts_client.witness_folders import begin_in_folder
from crafts_core.exchange import RoundReply, global_norm, schema_hash, state_hash
from crafts_core.stages.batch import TileBatch
from crafts_core.state import AdapterError, State, add_delta
from crafts_core.tiles import TileStoreError
from crafts_privacy.errors import RankError
from crafts_privacy.ledger import (
    EntryKind,
    Ledger,
    LedgerError,
    PlanBudgetExceededError,
)
from crafts_privacy.patient_sgd import PatientSGD
from crafts_privacy.sampling import PoissonSampler
from support.sites import (
    Coordinator,
    flower_message,
    make_site_home,
    plan_values,
    without_privacy,
)
from support.sum_study import set_policy
from support.wire import as_record, from_record

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator):
    return make_site_home(tmp_path / "site", foundation, coordinator.public_key)


@pytest.fixture
def hospital(home, foundation) -> Site:
    return Site(home, foundation)


def ask(home, foundation, content: RecordDict, witness=lambda: None, **context):
    app = make_client_app(lambda path: Site(home, foundation), witness=witness)
    config = context or {HOME_KEY: str(home.path)}
    where = Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={})
    return app(flower_message(content), where)


def test_a_round_is_answered_and_charged(home, foundation, coordinator) -> None:
    plan = coordinator.plan()
    state = coordinator.start(plan)

    reply = ask(home, foundation, coordinator.content(plan, state)).content

    record = RoundReply.from_scalars(dict(reply["reply"]))
    seconds = {name: tensor for name, tensor in state.items() if name.endswith(".second")}
    delta = from_record(reply["delta"], seconds)
    assert delta.keys() == {name for name in state if name.endswith(".second")}
    assert record.update_norm > 0
    assert record.update_norm == pytest.approx(global_norm(delta))
    assert record.schema_hash == schema_hash(delta)
    assert (record.steps, record.sample_rate, record.max_grad_norm) == (2, 0.5, 1.0)
    (event,) = Ledger(home.ledger_path).events("main")
    assert (event.noise_multiplier, event.steps) == (record.noise_multiplier, 2)


def test_no_release_leaves_unless_the_ledger_was_witnessed(home, foundation, coordinator) -> None:
    plan = coordinator.plan()
    content = coordinator.content(plan, coordinator.start(plan))
    heads = []

    def fails_once_charged() -> None:
        heads.append(Ledger(home.ledger_path).verify().sequence)
        if heads[-1] > 1:
            raise EnrolmentError("the coordinator cannot be reached")

    assert ask(home, foundation, content, fails_once_charged).error.code == 116
    assert heads == [1, 3], "asked before the round, and again with its reservation and release"
    assert ask(home, foundation, content).has_content(), "the sealed release is sent later"
    assert len(Ledger(home.ledger_path).events("main")) == 1


def test_a_refusal_that_was_charged_is_witnessed_before_it_leaves(
    home, foundation, coordinator, monkeypatch
) -> None:
    """Else a copy of the home could answer the round as if nobody had."""
    plan = coordinator.plan()
    content = coordinator.content(plan, coordinator.start(plan))

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Trainer, "_drawn", fail)
    monkeypatch.setattr(PoissonSampler, "sample", lambda *_: np.arange(3))
    heads: list[int] = []

    def look() -> None:
        heads.append(Ledger(home.ledger_path).verify().sequence)

    assert ask(home, foundation, content, look).error.code == 109
    assert heads == [1, 3], "with its reservation, and closed"


def test_a_plan_trains_only_while_somebody_here_approves_it(
    tmp_path, foundation, coordinator
) -> None:
    home = make_site_home(
        tmp_path / "careful", foundation, coordinator.public_key, require_approval=True
    )
    plan = coordinator.plan()
    content = coordinator.content(plan, coordinator.start(plan))

    assert ask(home, foundation, content).error == error_of(Rule.APPROVAL)
    assert Ledger(home.ledger_path).events("main") == ()
    home.approvals.approve(plan)
    assert ask(home, foundation, content).has_content()
    home.approvals.take_back(plan.hash)
    assert ask(home, foundation, content).error == error_of(Rule.APPROVAL)
    (home.path / "approved.json").write_text("{")
    assert ask(home, foundation, content).error.code == 112, "what cannot be read approves nothing"


def test_a_policy_that_is_tightened_holds_for_a_running_site(home, hospital, coordinator) -> None:
    plan = coordinator.plan()
    state = coordinator.start(plan)
    hospital.answer(coordinator.message(plan, state))
    second = coordinator.message(plan, state, request=coordinator.request(plan, state, number=2))
    file = home.path / "policy.toml"
    generous = file.read_text()

    file.write_text(generous.replace("max_rounds = 100", "max_rounds = 3"))
    with pytest.raises(PolicyError, match="4 rounds"):
        hospital.answer(second)
    file.write_text("max_rounds =")
    with pytest.raises(HomeError, match="cannot read policy"):
        hospital.answer(second)
    file.unlink()
    with pytest.raises(HomeError, match="cannot read policy"):
        hospital.answer(second)
    file.write_text(generous)
    hospital.answer(second)


def test_gradients_that_are_not_finite_are_counted_at_home_and_nowhere_else(
    home, hospital, coordinator, monkeypatch, caplog
) -> None:
    """One of six patients is damaged, and drawn in each of two steps and two rounds."""
    batch = PatientTiles.batch

    def damaged(self: PatientTiles, patient: int, **options: object) -> TileBatch:
        tiles = batch(self, patient, **options)  # type: ignore[arg-type]
        return replace(tiles, latents_BCHW=tiles.latents_BCHW * (torch.nan if patient == 2 else 1))

    monkeypatch.setattr(PatientTiles, "batch", damaged)
    privacy = coordinator.plan().privacy.model_dump() | {"sample_rate": 1.0}
    plan = coordinator.plan(privacy=privacy)
    state = coordinator.start(plan)
    with caplog.at_level(logging.DEBUG):
        for number in (1, 2):
            request = coordinator.request(plan, state, number=number)
            hospital.answer(coordinator.message(plan, state, request=request))

    told = CliRunner().invoke(cli.app, ["status", "--json", "--home", str(home.path)]).stdout
    values = json.loads(told)
    assert (values["unusable_gradients"], values["unusable_tiles"]) == (4, 0)
    (file,) = home.unusable_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [message.partition(" began")[0] for message in caplog.messages] == [
        f"round {number} of 4 (stage pretraining) of tiny" for number in (1, 2)
    ]


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        (Rule.EPSILON, {"max_epsilon": 7.9}),
        (Rule.DELTA, {"max_delta": 1e-4}),
        (Rule.SAMPLE_RATE, {"max_sample_rate": 0.4}),
        (Rule.TILES, {"max_tiles_per_patient": 1}),
        (Rule.DRAWS, {"max_draws_per_tile": 1}),
        (Rule.STAGE, {"allowed_stages": ("pretraining",)}),
        (Rule.STEPS, {"max_local_steps": 1}),
        (Rule.ROUNDS, {"max_rounds": 3}),
        (Rule.PATIENTS, {"min_patients": 11}),
        (Rule.NOISE, {"min_noise_multiplier": 1e3}),
        (Rule.SECURE_AGGREGATION, {"require_secure_aggregation": True}),
        (Rule.APPROVAL, {"require_approval": True}),
    ],
)
def test_whatever_a_coordinator_sends_the_sites_own_limits_hold(
    tmp_path, foundation, coordinator, rule: Rule, limit: dict[str, object]
) -> None:
    """The same well-signed plan that a generous site trains; nothing is reserved or released."""
    home = make_site_home(tmp_path / "strict", foundation, coordinator.public_key, **limit)
    plan = coordinator.plan()

    reply = ask(home, foundation, coordinator.content(plan, coordinator.start(plan)))

    assert reply.error == error_of(rule)
    assert Ledger(home.ledger_path).events("main") == ()
    assert not list(home.outbox_path.glob("*.safetensors"))


def test_exact_noise_is_used_where_the_home_asks_for_it(home, foundation, coordinator) -> None:
    config = home.config.model_copy(update={"exact_noise": True})
    plan = coordinator.plan()
    message = coordinator.message(plan, coordinator.start(plan))
    assert Site(replace(home, config=config), foundation).answer(message).noise == "ExactNoise"


def test_a_reply_says_nothing_but_the_closed_record(home, foundation, coordinator) -> None:
    plan = coordinator.plan()

    reply = ask(home, foundation, coordinator.content(plan, coordinator.start(plan))).content

    assert set(reply) == {"reply", "delta"}
    assert set(reply["reply"]) == set(RoundReply.model_fields)


def test_every_round_of_a_plan_ends_at_its_target(hospital, home, coordinator) -> None:
    plan = coordinator.plan()
    state = stage_start = coordinator.start(plan)
    for planned in plan.rounds():
        stage_start = state if planned.starts_stage else stage_start
        request = coordinator.request(plan, state, number=planned.round, stage_start=stage_start)
        release = hospital.answer(coordinator.message(plan, state, request=request))
        state = add_delta(state, release.delta)

    spent = Ledger(home.ledger_path).epsilon("main", plan.privacy.delta)
    assert 7.9 < spent <= 8.0


def test_asked_again_the_same_bytes_leave_and_nothing_is_spent(
    hospital, home, foundation, coordinator
) -> None:
    plan = coordinator.plan()
    message = coordinator.message(plan, coordinator.start(plan))
    first = hospital.answer(message)
    spent = Ledger(home.ledger_path).entries()

    again = Site(home, foundation).answer(message)  # also after a restart

    assert all(torch.equal(first.delta[name], again.delta[name]) for name in first.delta)
    assert again.reply == first.reply
    assert Ledger(home.ledger_path).entries() == spent


def test_a_crash_in_training_trains_again_under_the_same_reservation(
    hospital, home, coordinator, monkeypatch
) -> None:
    plan = coordinator.plan()
    message = coordinator.message(plan, coordinator.start(plan))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", _killed)
        with pytest.raises(KeyboardInterrupt):
            hospital.answer(message)
    kinds = [entry.kind for entry in Ledger(home.ledger_path).entries()]
    assert kinds == [EntryKind.PLACED, EntryKind.RESERVED]

    hospital.answer(message)

    kinds = [entry.kind for entry in Ledger(home.ledger_path).entries()]
    assert kinds == [EntryKind.PLACED, EntryKind.RESERVED, EntryKind.COMMITTED]


def test_a_crash_between_seal_and_commit_sends_the_sealed_file(
    hospital, home, foundation, coordinator, monkeypatch
) -> None:
    plan = coordinator.plan()
    message = coordinator.message(plan, coordinator.start(plan))
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", _killed)
        with pytest.raises(KeyboardInterrupt):
            hospital.answer(message)
    (sealed,) = home.outbox_path.glob("*.safetensors")
    before = sealed.read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", _killed)  # must not train again
        release = Site(home, foundation).answer(message)

    assert sealed.read_bytes() == before
    last = Ledger(home.ledger_path).entries()[-1]
    assert (last.kind, last.detail) == (EntryKind.COMMITTED, release.hash)


def test_nothing_is_sealed_before_it_is_charged(hospital, home, coordinator, monkeypatch) -> None:
    plan = coordinator.plan()
    monkeypatch.setattr(Ledger, "reserve", _killed)

    with pytest.raises(KeyboardInterrupt):
        hospital.answer(coordinator.message(plan, coordinator.start(plan)))

    assert not list(home.outbox_path.glob("*"))


def test_a_sealed_file_that_was_altered_is_never_sent(hospital, home, coordinator) -> None:
    plan = coordinator.plan()
    message = coordinator.message(plan, coordinator.start(plan))
    hospital.answer(message)
    (sealed,) = home.outbox_path.glob("*.safetensors")
    data = bytearray(sealed.read_bytes())
    data[-1] ^= 1
    sealed.write_bytes(data)

    with pytest.raises((OutboxError, LedgerError)):
        hospital.answer(message)


def test_a_sealed_file_of_another_history_of_the_ledger_is_never_sent(
    hospital, home, coordinator, monkeypatch
) -> None:
    """The number is there; what stands at it is not what paid."""
    plan = coordinator.plan()
    message = coordinator.message(plan, coordinator.start(plan))
    find, sent = Outbox.find, hospital.answer(message)
    elsewhere = (sent.payment[0], "f" * 64)
    monkeypatch.setattr(Outbox, "find", lambda *which: replace(find(*which), payment=elsewhere))
    with pytest.raises(OutboxError, match="that the ledger lacks"):
        hospital.answer(message)


def test_a_sealed_file_that_names_another_rounds_charge_is_never_sent(
    hospital, home, coordinator, monkeypatch
) -> None:
    """Round 1 was charged and not answered; its charge does not pay for what lies there for 2."""
    plan = coordinator.plan()
    state = coordinator.start(plan)
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "seal", _killed)
        with pytest.raises(KeyboardInterrupt):
            hospital.answer(coordinator.message(plan, state))
    (paid,) = Ledger(home.ledger_path).open_reservations()
    request = coordinator.request(plan, state, number=2)
    shared = request.model_dump(include=set(RoundReply.model_fields))
    reply = RoundReply(
        site="north",
        schema_hash=schema_hash(state),
        noise_multiplier=paid.event.noise_multiplier,
        max_grad_norm=1.0,
        steps=2,
        sample_rate=0.5,
        declared_patients=10,
        update_norm=1.0,
        **shared,
    )
    Outbox(home.outbox_path).seal(request, reply, state, paid, noise="GridNoise")

    with pytest.raises(OutboxError, match="reservation of another round"):
        hospital.answer(coordinator.message(plan, state, request=request))


def test_an_answered_round_is_refused_from_another_checkpoint(
    home, foundation, coordinator
) -> None:
    plan = coordinator.plan()
    state = coordinator.start(plan)
    ask(home, foundation, coordinator.content(plan, state))
    other = {name: value + 1 for name, value in state.items()}

    reply = ask(home, foundation, coordinator.content(plan, other))

    assert reply.error == error_of(Rule.REPLAY)


def test_the_lifetime_budget_holds_over_studies(
    tmp_path, foundation, coordinator, monkeypatch
) -> None:
    home = make_site_home(tmp_path / "site", foundation, coordinator.public_key, max_epsilon=8.5)
    first = coordinator.plan()
    second = coordinator.plan(
        study={"name": "second", "foundation": foundation.manifest.hash, "seed": 3}
    )
    state, hospital = coordinator.start(first), Site(home, foundation)
    for planned in first.rounds():
        request = coordinator.request(first, state, number=planned.round)
        hospital.answer(coordinator.message(first, state, request=request))
    spent = Ledger(home.ledger_path).entries()
    read: list[int] = []
    monkeypatch.setattr(PatientTiles, "batch", lambda _, patient, **__: read.append(patient))

    reply = ask(home, foundation, coordinator.content(second, state))

    assert reply.error.code == 104
    assert Ledger(home.ledger_path).entries() == spent
    assert read == [], "refused before anybody is read"


def test_a_plan_is_held_to_its_target_at_its_own_delta(tmp_path, foundation, coordinator) -> None:
    """At the policy's larger delta the same rounds look cheaper, and one more would fit."""
    home = make_site_home(tmp_path / "site", foundation, coordinator.public_key, max_delta=9e-3)
    plan = coordinator.plan()
    state, hospital = coordinator.start(plan), Site(home, foundation)
    for number in range(1, plan.num_rounds + 1):
        request = coordinator.request(plan, state, number=number)
        hospital.answer(coordinator.message(plan, state, request=request))
    home.approvals.approve(plan, runs_so_far=1)

    request = coordinator.request(plan, state, run_id="run-2")
    with pytest.raises(PlanBudgetExceededError):
        hospital.answer(coordinator.message(plan, state, request=request))


def test_however_a_coordinator_names_its_runs_a_plan_stays_within_its_target(
    tmp_path, foundation, coordinator
) -> None:
    """A person approved one run of four rounds; the coordinator makes up forty."""
    home = make_site_home(
        tmp_path / "careful", foundation, coordinator.public_key, require_approval=True
    )
    plan = coordinator.plan()
    home.approvals.approve(plan)
    state, hospital = coordinator.start(plan), Site(home, foundation)

    def code_of(run_id: str, number: int) -> int:
        """Of the refusal; 0 for an answer."""
        request = coordinator.request(plan, state, run_id=run_id, number=number)
        app = make_client_app(lambda path: hospital)
        where = Context(7, 7, {HOME_KEY: str(home.path)}, RecordDict(), {})
        reply = app(flower_message(coordinator.content(plan, state, request)), where)
        return reply.error.code if reply.has_error() else 0

    assert code_of("run-0", 1) == 0
    tries = [code_of(f"run-{number}", 1) for number in range(1, 40)]
    assert tries == [OF_RULE[Rule.RUN].code] * 39
    home.approvals.approve(plan, runs_so_far=1)  # the coordinator lost its first run, say
    assert [code_of("run-1", number) for number in (1, 2, 3)] == [0] * 3
    assert code_of("run-1", 4) == 117, "round 1 was paid for twice: the last one is refused"
    home.approvals.approve(plan, runs_so_far=2)
    assert code_of("run-2", 1) == 117
    assert Ledger(home.ledger_path).epsilon("main", plan.privacy.delta) <= 8.0


def test_an_update_over_the_norm_limit_is_charged_closed_and_refused(
    tmp_path, foundation, coordinator
) -> None:
    home = make_site_home(
        tmp_path / "strict", foundation, coordinator.public_key, max_update_norm=1e-6
    )
    plan = coordinator.plan()
    content = coordinator.content(plan, coordinator.start(plan))

    reply = ask(home, foundation, content)

    assert reply.error == error_of(Rule.UPDATE_NORM)
    last = Ledger(home.ledger_path).entries()[-1]
    assert (last.kind, last.detail) == (EntryKind.COMMITTED, REFUSED_RELEASE)
    assert ask(home, foundation, content).error == error_of(Rule.REPLAY)
    assert len(Ledger(home.ledger_path).events("main")) == 1, "its cost stays"


def test_training_that_ends_in_an_error_is_charged_and_closed(
    home, foundation, coordinator, monkeypatch
) -> None:
    """Else a coordinator gets an answer for each adapter that it asks with, under one charge."""
    plan = coordinator.plan()
    state = coordinator.start(plan)

    def train(*_: object) -> State:
        raise TrainingError("an update that is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", train)
        assert ask(home, foundation, coordinator.content(plan, state)).error.code == 109

    last = Ledger(home.ledger_path).entries()[-1]
    assert (last.kind, last.detail) == (EntryKind.COMMITTED, REFUSED_RELEASE)
    other = {name: value + 1 for name, value in state.items()}
    for adapter in (state, other):
        reply = ask(home, foundation, coordinator.content(plan, adapter))
        assert reply.error == error_of(Rule.REPLAY)
    assert len(Ledger(home.ledger_path).events("main")) == 1


@pytest.mark.parametrize("which", ["adapter", "stage start"])
def test_an_adapter_over_the_norm_limit_is_refused_before_it_costs_anything(
    tmp_path, foundation, coordinator, which: str
) -> None:
    home = make_site_home(
        tmp_path / "strict", foundation, coordinator.public_key, max_adapter_norm=100.0
    )
    plan = coordinator.plan()
    honest = coordinator.start(plan)
    wild = {name: value + 50.0 for name, value in honest.items()}
    state, start = (wild, None) if which == "adapter" else (honest, wild)
    number = 1 if which == "adapter" else 3  # the stage whose loss reads where it began
    request = coordinator.request(plan, state, number=number, stage_start=start)
    content = coordinator.content(plan, state, request, stage_start=start)

    assert ask(home, foundation, content).error == error_of(Rule.ADAPTER_NORM)
    assert not Ledger(home.ledger_path).events("main")


def test_training_without_privacy_is_recorded_as_infinite(
    tmp_path, foundation, coordinator
) -> None:
    home = make_site_home(tmp_path / "lab", foundation, coordinator.public_key, allow_non_private=1)
    plan = coordinator.plan(**without_privacy(plan_values(foundation.manifest.hash)))

    assert ask(home, foundation, coordinator.content(plan, coordinator.start(plan))).has_content()
    assert Ledger(home.ledger_path).epsilon("main", 1e-3) == float("inf")
    private = coordinator.plan()
    reply = ask(home, foundation, coordinator.content(private, coordinator.start(private)))
    assert reply.error.code == 104


class TestFailuresOnceDrawn:
    """What fails after the first draw may depend on who was drawn: it is charged and closed."""

    @pytest.fixture
    def plan(self, coordinator):
        return coordinator.plan()

    @pytest.mark.parametrize("error", [RankError("gone"), TileStoreError("torn"), MemoryError()])
    def test_all_look_alike_and_close_the_round(
        self, home, foundation, coordinator, plan, monkeypatch, caplog, error
    ) -> None:
        state = coordinator.start(plan)
        content = coordinator.content(plan, state)
        with monkeypatch.context() as patch:
            patch.setattr(PatientSGD, "_add_patient", _raises(error))
            patch.setattr(PoissonSampler, "sample", lambda *_: [0])
            told = ask(home, foundation, content).error

        assert told == public(TrainingError("any"))
        last = Ledger(home.ledger_path).entries()[-1]
        assert (last.kind, last.detail) == (EntryKind.COMMITTED, REFUSED_RELEASE)
        assert f"{type(error).__name__} at test_client_app.py" in caplog.text, "for the operator"
        other = {name: value + 1 for name, value in state.items()}
        for again in (content, coordinator.content(plan, other)):
            assert ask(home, foundation, again).error == error_of(Rule.REPLAY)
        assert len(Ledger(home.ledger_path).events("main")) == 1

    def test_what_a_full_disk_kept_open_is_closed_before_anything_is_answered(
        self, home, foundation, coordinator, plan, monkeypatch
    ) -> None:
        """Or the same request would be trained again, and one charge had two outcomes."""
        site = Site(home, foundation)
        message = coordinator.message(plan, coordinator.start(plan))
        full = LedgerError("cannot use ledger: database or disk is full")
        with monkeypatch.context() as patch:
            patch.setattr(PatientSGD, "_add_patient", _raises(MemoryError()))
            patch.setattr(PoissonSampler, "sample", lambda *_: [0])
            patch.setattr(Ledger, "commit", _raises(full))
            for _ in range(2):  # and nothing is trained as long as it is full
                with pytest.raises(LedgerError, match="full"):
                    site.answer(message)
        with pytest.raises(PolicyError) as refused:
            site.answer(message)
        assert refused.value.rule is Rule.REPLAY
        entries = Ledger(home.ledger_path).entries()
        assert entries[-1].detail == REFUSED_RELEASE
        assert len(Ledger(home.ledger_path).events("main")) == 1

    def test_before_the_first_draw_the_round_stays_open_for_the_same_request(
        self, home, foundation, coordinator, plan, monkeypatch
    ) -> None:
        content = coordinator.content(plan, coordinator.start(plan))
        with monkeypatch.context() as patch:
            patch.setattr(site.Trainer, "_objective", _raises(AdapterError("public")))
            assert ask(home, foundation, content).error == public(AdapterError("any"))

        assert ask(home, foundation, content).has_content()
        assert len(Ledger(home.ledger_path).events("main")) == 1

    def test_after_a_crash_another_adapter_pays_for_itself(
        self, home, foundation, coordinator, plan, monkeypatch
    ) -> None:
        state = coordinator.start(plan)
        other = {name: value + 1 for name, value in state.items()}
        with monkeypatch.context() as patch:
            patch.setattr(PatientSGD, "_add_patient", _killed)
            patch.setattr(PoissonSampler, "sample", lambda *_: [0])
            with pytest.raises(KeyboardInterrupt):
                Site(home, foundation).answer(coordinator.message(plan, state))

        assert ask(home, foundation, coordinator.content(plan, other)).has_content()
        assert len(Ledger(home.ledger_path).events("main")) == 2
        assert ask(home, foundation, coordinator.content(plan, state)).error == error_of(
            Rule.REPLAY
        )


class TestStageStart:
    @pytest.fixture
    def aligned(self, coordinator, foundation):
        values = plan_values(foundation.manifest.hash)
        plan = coordinator.plan(stage=[values["stage"][1]])
        start = coordinator.start(plan)
        later = {name: value + 0.1 for name, value in start.items()}
        request = coordinator.request(plan, later, number=2, stage_start=start)
        return plan, start, later, request

    def test_it_is_asked_for_where_the_site_lacks_it(
        self, home, foundation, coordinator, aligned
    ) -> None:
        plan, start, later, request = aligned

        reply = ask(home, foundation, coordinator.content(plan, later, request))
        assert reply.error.code == refusals.STAGE_START_MISSING.code
        content = coordinator.content(plan, later, request, stage_start=start)
        assert ask(home, foundation, content).has_content()

    def test_it_is_remembered_from_the_stages_first_round(
        self, home, foundation, coordinator, aligned
    ) -> None:
        plan, start, later, request = aligned
        ask(home, foundation, coordinator.content(plan, start))

        assert ask(home, foundation, coordinator.content(plan, later, request)).has_content()

    def test_the_one_that_is_kept_is_of_a_size_that_the_policy_still_allows(
        self, home, foundation, coordinator, aligned
    ) -> None:
        plan, start, later, request = aligned
        huge = {name: 100.0 * value for name, value in start.items()}
        asked = coordinator.request(plan, huge, number=1)
        assert ask(home, foundation, coordinator.content(plan, huge, asked)).has_content()
        set_policy(home, max_adapter_norm=2.0 * global_norm(later))
        request = coordinator.request(plan, later, number=2, stage_start=huge)

        content = coordinator.content(plan, later, request)
        assert ask(home, foundation, content).error == error_of(Rule.ADAPTER_NORM)

    def test_another_one_is_refused(self, home, foundation, coordinator, aligned) -> None:
        plan, _, later, request = aligned

        content = coordinator.content(plan, later, request, stage_start=later)
        assert ask(home, foundation, content).error.code == 101


class TestHostileMessages:
    def refused(self, home, foundation, content: RecordDict) -> Error:
        error: Error = ask(home, foundation, content).error
        assert not Ledger(home.ledger_path).events("main"), "a refused message must cost nothing"
        assert not list(home.outbox_path.glob("*"))
        return error

    @pytest.fixture
    def plan(self, coordinator):
        return coordinator.plan()

    @pytest.fixture
    def state(self, coordinator, plan):
        return coordinator.start(plan)

    def test_of_another_coordinator(self, tmp_path, home, foundation, plan, state) -> None:
        stranger = Coordinator(tmp_path, foundation, key_name="stranger.pem")

        error = self.refused(home, foundation, stranger.content(plan, state))
        assert error == error_of(Rule.SIGNER)

    def test_with_a_signature_of_something_else(
        self, home, foundation, coordinator, plan, state
    ) -> None:
        other = coordinator.content(coordinator.plan(transport={"wire_dtype": "float16"}), state)

        content = coordinator.content(plan, state, signature=str(other["plan"]["signature"]))
        assert self.refused(home, foundation, content) == error_of(Rule.SIGNATURE)

    @pytest.mark.parametrize(
        ("rule", "changes"),
        [
            (Rule.PLAN_HASH, {"plan_hash": "cd" * 32}),
            (Rule.ROUND, {"round": 5}),
            (Rule.FACTOR, {"factor": "first"}),
            (Rule.ROUND, {"stage_index": 1}),
        ],
    )
    def test_about_a_round_that_the_plan_lacks(
        self, home, foundation, coordinator, plan, state, rule, changes
    ) -> None:
        request = coordinator.request(plan, state).model_copy(update=changes)

        content = coordinator.content(plan, state, request)
        assert self.refused(home, foundation, content) == error_of(rule)

    def test_with_another_adapter_than_it_names(
        self, home, foundation, coordinator, plan, state
    ) -> None:
        content = coordinator.content(plan, state)
        content["adapter"] = as_record({name: value + 1 for name, value in state.items()})
        assert self.refused(home, foundation, content).code == 101

    @pytest.mark.parametrize("damage", ["missing", "unknown", "nan", "integers", "pickle", "name"])
    def test_with_another_schema(self, home, foundation, coordinator, plan, state, damage) -> None:
        bad = dict(state)
        first = sorted(bad)[0]
        if damage == "missing":
            del bad[first]
        elif damage == "unknown":
            bad["unet.backdoor"] = torch.zeros(1)
        elif damage == "nan":
            bad[first] = bad[first] * float("nan")
        content = coordinator.content(plan, bad, coordinator.request(plan, bad))
        values = content["adapter"]["values"]
        if damage == "integers":
            integers = values.numpy().astype("int32")
            content["adapter"] = ArrayRecord({"values": Array.from_numpy_ndarray(integers)})
        elif damage == "pickle":
            values.data = b"\x80\x04pickled"
        elif damage == "name":
            content["adapter"] = ArrayRecord({"others": values})

        assert self.refused(home, foundation, content).code == 101

    def test_with_a_header_that_asks_for_terabytes(
        self, home, foundation, coordinator, plan, state
    ) -> None:
        content = coordinator.content(plan, state)
        array = content["adapter"]["values"]
        shape = str(tuple(array.shape)).encode()
        forged = array.data.replace(shape, b"(" + b"9" * (len(shape) - 3) + b",)")
        assert forged != array.data
        array.data = forged

        assert self.refused(home, foundation, content).code == 101

    @pytest.mark.parametrize("name", ["request", "plan", "adapter"])
    def test_with_a_record_missing(self, home, foundation, coordinator, plan, state, name) -> None:
        content = coordinator.content(plan, state)
        del content[name]

        assert self.refused(home, foundation, content).code == 101

    def test_with_a_record_too_many(self, home, foundation, coordinator, plan, state) -> None:
        content = coordinator.content(plan, state)
        content["code"] = ConfigRecord({"run": "import os"})

        assert self.refused(home, foundation, content).code == 101

    def test_with_another_type_in_the_request(
        self, home, foundation, coordinator, plan, state
    ) -> None:
        content = coordinator.content(plan, state)
        content["request"]["run_id"] = "../../etc/passwd"

        assert self.refused(home, foundation, content).code == 101


def test_the_node_alone_says_which_home(home, foundation, coordinator) -> None:
    plan = coordinator.plan()
    content = coordinator.content(plan, coordinator.start(plan))

    assert ask(home, foundation, content, other="x").error.code == 112


def test_what_an_exception_says_does_not_leave(
    home, foundation, coordinator, monkeypatch, caplog
) -> None:
    def leak(*_: object) -> None:
        raise RuntimeError("patient Jane Doe, /mnt/slides/jane.svs, loss 0.123")

    monkeypatch.setattr(site.Trainer, "train", leak)
    plan = coordinator.plan()
    with caplog.at_level(logging.INFO):
        reply = ask(home, foundation, coordinator.content(plan, coordinator.start(plan)))

    assert reply.error == Error(refusals.INTERNAL.code, refusals.INTERNAL.sentence)
    assert "Jane" not in caplog.text
    assert "RuntimeError" in caplog.text


def test_the_table_of_refusals_is_complete_and_unambiguous() -> None:
    entries = {refusals.INTERNAL, *(refusal for _, refusal in OF_ERROR), *OF_RULE.values()}

    assert set(OF_RULE) == set(Rule)
    assert len({entry.code for entry in entries}) == len(entries)
    assert min(entry.code for entry in entries) >= 100


def test_an_unknown_error_is_internal() -> None:
    assert refusal_of(OSError(28, "No space left on device: /mnt/jane")) == refusals.INTERNAL


def test_the_wire_type_is_the_plans(hospital, coordinator) -> None:
    plan = coordinator.plan(transport={"wire_dtype": "float16"})
    state = {name: value.half().float() for name, value in coordinator.start(plan).items()}

    release = hospital.answer(coordinator.message(plan, state))

    assert {value.dtype for value in release.delta.values()} == {torch.float16}
    assert release.reply.update_norm == pytest.approx(global_norm(release.delta))
    assert release.reply.checkpoint_hash == state_hash(state)


def error_of(rule: Rule) -> Error:
    return Error(OF_RULE[rule].code, OF_RULE[rule].sentence)


def public(error: Exception) -> Error:
    refusal = refusal_of(error)
    return Error(refusal.code, refusal.sentence)


def _raises(error: Exception) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", [(Outbox, "seal"), (site, "_as_wire"), (Site, "close")])
def test_whatever_fails_after_the_draw_closes_the_round_with_one_code(
    home, foundation, coordinator, monkeypatch, place: tuple[object, str]
) -> None:
    """Also what fails in sealing, or in cleaning up after a training that failed."""
    plan = coordinator.plan()
    content = coordinator.content(plan, coordinator.start(plan))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*place, fail)
        if place[1] == "close":
            patch.setattr(Trainer, "_drawn", fail)
        assert ask(home, foundation, content).error.code == 109
    assert Ledger(home.ledger_path).open_reservations() == ()
    assert ask(home, foundation, content).error.code == 137, "and nobody trains it again"


def test_an_update_that_cannot_be_kept_for_an_attack_leaves_all_the_same(
    home, foundation, coordinator, monkeypatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SeenUpdates, "keep", full)
    plan = coordinator.plan()
    content = coordinator.content(plan, coordinator.start(plan))
    assert ask(home, foundation, content).has_content()


def test_a_folder_sees_the_charge_of_a_round_that_is_refused_after_the_draw(
    tmp_path, home, foundation, coordinator, monkeypatch
) -> None:
    """Else a copy of the home could answer under the same charge."""
    folder = tmp_path / "witness"
    folder.mkdir()
    Site(home, foundation)
    head = begin_in_folder(home, Ledger(home.ledger_path), folder)
    config = home.config.model_copy(update={"witness_folders": (str(folder),)})
    plan = coordinator.plan()
    monkeypatch.setattr(site, "_as_wire", lambda *_: (_ for _ in ()).throw(TrainingError("no")))
    content = coordinator.content(plan, coordinator.start(plan))

    assert ask(replace(home, config=config), foundation, content).error.code == 109

    assert json.loads(head.read_text())["sequence"] == len(Ledger(home.ledger_path).entries())
