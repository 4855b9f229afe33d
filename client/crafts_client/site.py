"""One hospital's side of a round: from a coordinator's message to a release.

The order, and what a crash leaves behind::

    verify   signer, signature, plan, policy, arrays      nothing happened
    reserve  the ledger charges the whole round           charged; the same request trains again
    train    patient-level private steps                  under the same reservation
    check    finite, norm; refused, or training failed once it drew: charged and closed
    seal     the release is on disk                       sent only after a commit
    wait     until a time that no patient decides         committed when the site starts again
    commit   the ledger names the release's hash          asked again: the same file is sent
    witness  the folders elsewhere have the ledger's head (and were asked before anything)
    send     the message leaves

Of a sum over sites, what training ends with is held in memory; what is sealed is one masked
vector, once the members are announced (``sums``).

So nothing leaves that was not charged, and nothing is charged twice for being asked twice. A
reservation is for one request, adapter included: asked from another adapter, a round that a crash
left open is charged anew. When an answer leaves tells nothing either: ``answer_times``.
"""

import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from crafts_client import stage_start, unusable
from crafts_client.answer_times import Clock, Departure, Pace, PublicStep, longest_round_s
from crafts_client.devices import DeviceWorkers, check_devices
from crafts_client.errors import LateAnswerError, OutboxError, TrainingError
from crafts_client.home import POLICY_NAME, SiteHome
from crafts_client.mechanism import limit_of, mechanism_of
from crafts_client.messages import AnnouncementMessage, RoundMessage, read_state
from crafts_client.outbox import REFUSED_RELEASE, Outbox, Release
from crafts_client.patients import PatientTiles
from crafts_client.policy import Policy, PolicyError, check_not_replayed, check_request, check_run
from crafts_client.register import PatientRegister
from crafts_client.roster_rules import check_roster
from crafts_client.round_news import RoundNews
from crafts_client.seen_updates import SeenUpdates
from crafts_client.signed_plan import open_signed_plan
from crafts_client.site_key import site_key
from crafts_client.site_ledger import open_ledger, take_place
from crafts_client.speed import Speed
from crafts_client.sums import (
    SiteSums,
    alone_limit,
    check_answers,
    check_weight,
    least_share,
)
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, TrainingTask
from crafts_client.witness_folders import show_to_folders
from crafts_core.exchange import (
    ExchangeError,
    ReadyReply,
    RoundReply,
    RoundRequest,
    SignedPlan,
    global_norm,
    schema_hash,
    state_hash,
)
from crafts_core.foundation import Foundation, load
from crafts_core.plan import Plan, RoundOfPlan
from crafts_core.plan_sections import AdapterConfig, Part, StageConfig
from crafts_core.releases import release_schema
from crafts_core.roster import Roster
from crafts_core.state import State, factor_names
from crafts_core.threads import quickest_threads
from crafts_privacy import signing
from crafts_privacy.held_sum import HeldSum
from crafts_privacy.ledger import LedgerEntry, Reservation
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.plan_noise import release_events
from crafts_privacy.secure_aggregation.updates import HeldUpdate

log = logging.getLogger(__name__)

_PACE_COUNTS_S = 3600.0
"""So long a stage that was too slow here is refused by the pace it had; then it is timed anew."""


class StageStartMissingError(ExchangeError):
    """The stage's first adapter is neither here nor in the message."""


class Site:
    """A site home at work. Foundation, tiles and model stay warm between rounds."""

    def __init__(
        self,
        home: SiteHome,
        foundation: Foundation,
        *,
        randomness: Randomness | None = None,
        clock: Clock | None = None,
        news: RoundNews | None = None,
    ) -> None:
        """Open the ledger and the tiles.

        Args:
            home: Read from disk.
            foundation: The home's own foundation, on the home's device.
            randomness: For tests; the operating system's otherwise.
            clock: For tests; the machine's otherwise.
            news: Told how a round goes on; the log alone if absent.

        Raises:
            LedgerTamperedError: the ledger is not what was written.
            LedgerPlaceError: this home is a copy of the one that trains.
            TileStoreError: there is no finished tile store or latent cache.
            HomeError: the tiles are another cohort's.
            PolicyError: nobody here approved the foundation.
        """
        home.foundation_approvals.check(foundation.manifest)
        self._home = home
        self._foundation = foundation
        self._randomness = randomness or Randomness.from_os(exact_noise=home.config.exact_noise)
        self._clock = clock or Clock()
        self._news = news or RoundNews()
        self._departure = Departure(self._clock)
        self._to_close: list[Reservation] = []
        self._too_slow: dict[tuple[str, StageConfig], tuple[float, float]] = {}
        self._ledger = open_ledger(home)
        self._outbox = Outbox(home.outbox_path)
        self._sums = SiteSums(self._outbox, type(self._randomness.noise).__name__)
        self._seen = SeenUpdates(home.seen_path)
        self._settle()
        self._patients = PatientTiles.of(home, foundation)
        self._register = PatientRegister(home.register_path)
        self._register.enrol(self._patients.pseudonyms, home.config.cohort)
        take_place(home, self._ledger)
        self._speed = Speed.of(home.config)  # before any round has changed the number of threads
        self._trainer: tuple[tuple[AdapterConfig, tuple[Part, ...]], Trainer] | None = None
        self._workers: DeviceWorkers | None = None
        check_devices(home)

    @classmethod
    def open(cls, path: Path, news: RoundNews | None = None) -> "Site":
        """Open a home and everything in it.

        Raises:
            CraftsError: names what is missing or damaged.
        """
        home = SiteHome.open(path)
        return cls(home, load(home.foundation_path, device=home.config.device), news=news)

    def answer(self, message: RoundMessage) -> Release | ReadyReply:
        """Do what the message asks, if everything about it is allowed.

        Of a sum that is the word that the site holds its part.

        Raises:
            CraftsError: what is wrong; ``refusals`` turns it into a public sentence.
        """
        self._close_rounds()
        show_to_folders(self._home, self._ledger)
        release = self._answer(message)
        show_to_folders(self._home, self._ledger)  # where that fails it stays, sealed
        return release

    def add_to_sum(self, message: AnnouncementMessage) -> Release:
        """The masked vector for exactly the members that were announced, once.

        Raises:
            CraftsError: what is wrong; ``refusals`` turns it into a public sentence.
        """
        self._close_rounds()
        show_to_folders(self._home, self._ledger)
        release = self._masked(message)
        show_to_folders(self._home, self._ledger)  # as above
        return release

    def spent(self) -> str:
        """What the policy's filters count of the cohort's life, by charges alone."""
        states = self._home.policy.lifetime.states(self._ledger.plans(self._home.config.cohort))
        return "; ".join(map(str, states))

    def _allowed(self, signed: SignedPlan, request: RoundRequest) -> tuple[Plan, RoundOfPlan]:
        """The plan and its round, if both are allowed here and now."""
        # Read anew: a policy that was tightened holds from this answer on.
        policy = Policy.load(self._home.path / POLICY_NAME)
        self._home = replace(self._home, policy=policy)
        config = self._home.config
        plan = open_signed_plan(signed, policy)
        policy.check_plan(plan, declared_patients=config.declared_patients)
        policy.check_approved(plan, self._home.approvals.all())
        self._home.foundation_approvals.check(self._foundation.manifest)
        planned = check_request(plan, request, foundation_hash=self._foundation.manifest.hash)
        return plan, planned

    def _answer(self, message: RoundMessage) -> Release | ReadyReply:
        request = message.request
        plan, planned = self._allowed(message.plan, request)
        ready = self._sums.word_for(request)
        if ready is not None:
            return ready
        sealed = self._outbox.find(request)
        if sealed is not None:
            self._commit_sealed(sealed)
            if not plan.aggregation.secure_aggregation:
                return sealed
        self._settle()
        runs = {entry.run_id for entry in self._entries_of(plan.hash)}
        check_run(plan, request, runs, self._home.approvals.runs_of(plan))
        check_not_replayed(request, *self._ledger.last_released(plan.hash, request.run_id))
        with self._news.of(_words_of(plan, planned, request), planned.stage.local_steps):
            answer = self._train(plan, planned.stage, message)
        if isinstance(answer, ReadyReply) and self._departure.was_in_time:
            self._sums.left_in_time()
        return answer

    def _masked(self, message: AnnouncementMessage) -> Release:
        """Seal the vector and commit it, or find the one that was sealed.

        Whoever has withdrawn since the word is in it, as in a sealed answer that waits for its
        time: not to answer would tell the coordinator, without noise, that somebody has.
        """
        request, announcement = message.request, message.announcement
        plan, _ = self._allowed(message.plan, request)
        sealed = self._outbox.find(request)
        if sealed is not None:
            check_answers(sealed, announcement)
            self._commit_sealed(sealed)
            return sealed
        roster = self._roster(plan)
        release, reservation = self._sums.release(
            request, announcement, plan=plan, policy=self._home.policy, roster=roster
        )
        self._ledger.commit(reservation, release.hash, release.share)
        self._outbox.drop_before(request.run_id, request.round - 1)
        return release

    def _roster(self, plan: Plan) -> Roster:
        """Who the hospitals of a plan's sums are, as somebody here approved it."""
        config, roster = self._home.config, self._home.roster_approvals.of_plan(plan.hash)
        check_roster(
            roster,
            self._home.policy,
            site=config.name,
            declared_patients=config.declared_patients,
            identity=signing.public_key_of(site_key(self._home, self._ledger)),
        )
        return roster

    def _train(self, plan: Plan, stage: StageConfig, message: RoundMessage) -> Release | ReadyReply:
        """Reserve, train, check, seal, commit: the order that the module's docstring explains."""
        config, policy, request = self._home.config, self._home.policy, message.request
        mechanism = mechanism_of(plan, stage, declared_patients=config.declared_patients)
        policy.check_noise(plan, mechanism)
        self._check_in_time(plan, stage)
        trainer = self._trainer_for(plan)
        schema = trainer.schema() | release_schema(plan, self._foundation)
        state = _read_hashed(message, "adapter", schema, request.checkpoint_hash, policy)
        task = TrainingTask.of_plan(
            *(plan, stage, request.factor, mechanism),
            state=state,
            stage_start=self._stage_start(message, stage, state),
            withdrawn=self._register.withdrawn,
        )
        reservation = self._reserve(plan, request, task)
        try:
            with quickest_threads(), self._departure:
                trained = self._train_everywhere(trainer, plan, task)
                if isinstance(trained, HeldSum):
                    return self._hold(request, trained, reservation, task, plan)
                if plan.aggregation.secure_aggregation:
                    policy.check_update_norm(global_norm(trained))
                    return self._hold(request, HeldUpdate(trained), reservation, task, plan)
                delta = _as_wire(trained, plan)
                update_norm = global_norm(delta)
                policy.check_update_norm(update_norm)
                reply = self._reply(request, stage, mechanism, delta, update_norm)
                source = type(self._randomness.noise).__name__
                release = self._outbox.seal(request, reply, delta, reservation, noise=source)
                self._keep(plan, request, state, release)
        except (TrainingError, PolicyError):
            self._close_round(reservation)
            raise
        except Exception as error:
            if not trainer.has_drawn:  # on public values; the round stays reserved
                raise
            # That it failed may depend on who was drawn: the coordinator is told the same, whatever
            # it was.
            self._close_round(reservation)
            raise TrainingError(
                "the round failed once patients were drawn; it is charged and closed"
            ) from error
        self._ledger.commit(reservation, release.hash)
        self._outbox.drop_before(request.run_id, request.round - 1)
        return release

    def _hold(
        self,
        request: RoundRequest,
        held: HeldSum | HeldUpdate,
        reservation: Reservation,
        task: TrainingTask,
        plan: Plan,
    ) -> ReadyReply:
        """Keep what was computed; nothing of it is on disk, and what was reserved stays open."""
        names = factor_names(task.state, task.factor)
        return self._sums.hold(
            request,
            held,
            reservation,
            mechanism=task.mechanism,
            trained={name: task.state[name] for name in names},
            identity=site_key(self._home, self._ledger),
            site=self._home.config.name,
            declared_patients=self._home.config.declared_patients,
            keep_s=plan.aggregation.deadline_s + plan.aggregation.masked_deadline_s,
        )

    def _close_round(self, reservation: Reservation) -> None:
        """Charged, and not trained again; the refusal tells something too, so folders see it."""
        self._to_close.append(reservation)
        self._close_rounds()

    def _close_rounds(self) -> None:
        """What a full disk kept open, too: before it is closed nothing else is answered."""
        if not self._to_close:
            return
        still_open = self._ledger.open_reservations()
        for reservation in self._to_close:
            if reservation in still_open:
                self._ledger.commit(reservation, REFUSED_RELEASE)
        self._to_close.clear()
        show_to_folders(self._home, self._ledger)

    def _keep(self, plan: Plan, request: RoundRequest, state: State, release: Release) -> None:
        """For an attack of the site's own; a full disk stops no answer that is sealed."""
        if plan.stage[request.stage_index].is_release:  # no gradient is in it
            return
        try:
            self._seen.keep(plan, request, state, release.delta, release.hash)
        except OSError as error:
            log.warning("an update is not kept for crafts-client attack: %s", error.strerror)

    def _train_everywhere(
        self, trainer: Trainer, plan: Plan, task: TrainingTask
    ) -> State | HeldSum:
        """On all of the site's devices."""
        trainer.has_drawn = False
        try:
            if self._workers is not None:
                is_timed = self._home.config.answer_every_s == "auto"
                self._workers.start(plan.adapter, plan.parts, task, is_timed=is_timed)
            run = trainer.train if task.sum_grid_bits is None else trainer.hold
            return run(task, partial(self._fix_departure, plan, task))
        except TrainingError:
            raise
        except Exception:
            self.close()  # other devices may wait for this one; the next round begins anew
            raise
        finally:
            counted = unusable.Unusable(
                gradients=trainer.num_unusable_patients, tiles=self._patients.take_num_unusable()
            )
            unusable.note(self._home.unusable_path, counted)

    def _fix_departure(self, plan: Plan, task: TrainingTask, step: PublicStep) -> None:
        """Decide now, before anybody is drawn, when the round's answer leaves."""
        config = self._home.config
        every_s = config.answer_every_s
        if every_s == "auto":
            every_s = longest_round_s(
                Pace.of(step, self._clock.now),
                config,
                task.stage,
                sample_rate=task.mechanism.sample_rate,
                num_bytes=task.num_bytes,
            )
        if every_s > plan.aggregation.deadline_s:
            log.warning(_too_late(every_s, plan))
            self._too_slow[plan.hash, task.stage] = every_s, self._clock.now()
        self._departure.begin(every_s)
        self._news.began(every_s)

    def _check_in_time(self, plan: Plan, stage: StageConfig) -> None:
        """Refuse, before anything is charged, what the coordinator would not wait for.

        A pace is timed when the round is charged already: the first round that is too slow is
        trained, and may be in time where another site is slower still.

        Raises:
            LateAnswerError: says how long it waits, and the answer takes.
        """
        every_s = self._home.config.answer_every_s
        if every_s == "auto":
            every_s, timed_s = self._too_slow.get((plan.hash, stage), (0.0, 0.0))
            if self._clock.now() - timed_s > _PACE_COUNTS_S:
                return
        if every_s > plan.aggregation.deadline_s:
            raise LateAnswerError(_too_late(every_s, plan))

    def close(self) -> None:
        """End the processes of further devices; the next round starts them again."""
        if self._workers is not None:
            self._workers.close()
        self._workers = self._trainer = None

    def _reserve(self, plan: Plan, request: RoundRequest, task: TrainingTask) -> Reservation:
        """Charge the round against the plan's target and the cohort's lifetime over all studies."""
        lifetime = self._home.policy.lifetime
        limit = limit_of(plan, lifetime)
        if limit.max_epsilon == math.inf:  # without noise; the policy has allowed it by name
            lifetime = replace(lifetime, max_epsilon=math.inf)
        share = unused = None
        if plan.aggregation.secure_aggregation:
            roster = self._roster(plan)
            check_weight(plan, roster, self._home.config.name)
            if plan.privacy.trust == "distributed":
                share = least_share(plan, self._home.policy, task.mechanism, roster)
            # First: from here on no announcement finds the sum whose charge is carried or closed.
            given_up = self._sums.give_up(request, task.charged, task.stage.name)
            if given_up.spent is not None:
                self._close_round(given_up.spent)
            unused = given_up.unused
        try:
            return self._ledger.reserve(
                cohort=self._home.config.cohort,
                plan_hash=request.plan_hash,
                run_id=request.run_id,
                round=request.round,
                stage=task.stage.name,
                event=task.charged,
                request_hash=request.hash,
                lifetime=lifetime,
                plan_limit=limit,
                attempt=request.attempt,
                alone=alone_limit(self._home.policy, share),
                unused=unused,
                promised=release_events(plan),
                most_of_stage=plan.release_attempts if task.stage.is_release else None,
            )
        finally:
            # Not carried: too often already, or what is asked for was refused, or is open itself.
            # Left open, two could be asked for by turns, each time trained and not counted.
            if unused is not None:
                self._close_round(unused)  # unless it is not open any more

    def _commit_sealed(self, sealed: Release) -> None:
        """Make sure that the ledger knows exactly this release before it is sent (again).

        Raises:
            LedgerError: the reservation released something else: the file is not sent.
        """
        sequence, entry_hash = sealed.payment
        paid = self._ledger.entries()[sequence - 1 : sequence]
        if not paid or paid[0].hash != entry_hash:
            raise OutboxError("a sealed release names a reservation that the ledger lacks")
        reservation, reply = Reservation.of(paid[0]), sealed.reply
        if reservation.key[1:] != (reply.plan_hash, reply.run_id, reply.round):
            raise OutboxError("a sealed release names the reservation of another round")
        self._outbox.remember(sealed)
        self._ledger.commit(reservation, sealed.hash, sealed.share)

    def _settle(self) -> None:
        """Commit what a crash or a full disk left sealed: the ledger names all that may leave.

        Also before a round is trained, or an attempt that was sealed and never committed could be
        asked for with another adapter, and two vectors of it would leave.
        """
        self._outbox.remember_all()
        waiting = {held.sequence: held for held in self._ledger.open_reservations()}
        for record in reversed(self._outbox.records().values()):  # the newest of each
            reservation = waiting.pop(record.reservation, None)
            if reservation is not None:
                self._ledger.commit(reservation, record.hash, record.share)

    def _entries_of(self, plan_hash: str) -> list[LedgerEntry]:
        return [entry for entry in self._ledger.entries() if entry.plan_hash == plan_hash]

    def _trainer_for(self, plan: Plan) -> Trainer:
        """The warm trainer, or a new one where the adapter is another."""
        more_devices = self._home.config.more_devices
        if more_devices and self._workers is None:
            self._workers = DeviceWorkers(self._home.path, more_devices)
        wanted = (plan.adapter, plan.parts)
        if self._trainer is None or self._trainer[0] != wanted:
            trainer = Trainer(
                self._foundation,
                plan.adapter,
                self._patients,
                parts=plan.parts,
                randomness=self._randomness,
                speed=self._speed,
                ranks=self._workers.ranks if self._workers else None,
                after_step=self._news.stepped,
            )
            self._trainer = (wanted, trainer)
        return self._trainer[1]

    def _stage_start(self, message: RoundMessage, stage: StageConfig, state: State) -> State | None:
        """theta1: from this round, from the message, or from an earlier round of the stage."""
        if stage.lambda_drift == 0:
            return None
        wanted, path = message.request.stage_start_hash, self._home.stage_start_path
        if wanted == message.request.checkpoint_hash:
            found = state
        elif message.stage_start is not None:
            found = _read_hashed(message, "stage_start", state, wanted, self._home.policy)
        else:
            kept = stage_start.recall(path, wanted)
            if kept is None:
                raise StageStartMissingError("the adapter that began the stage is needed once more")
            self._home.policy.check_adapter_norm(global_norm(kept))
            return kept
        stage_start.remember(path, found)
        return found

    def _reply(
        self,
        request: RoundRequest,
        stage: StageConfig,
        mechanism: Mechanism,
        delta: State,
        update_norm: float,
    ) -> RoundReply:
        config = self._home.config
        return RoundReply(
            site=config.name,
            run_id=request.run_id,
            plan_hash=request.plan_hash,
            round=request.round,
            checkpoint_hash=request.checkpoint_hash,
            schema_hash=schema_hash(delta),
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.max_grad_norm,
            steps=stage.local_steps,
            sample_rate=mechanism.sample_rate,
            declared_patients=config.declared_patients,
            update_norm=update_norm,
        )


def _read_hashed(
    message: RoundMessage, name: str, expected: State, expected_hash: str, policy: Policy
) -> State:
    """Decode one of the message's states, compare its hash, and measure it."""
    record = message.adapter if name == "adapter" else message.stage_start
    assert record is not None
    state = read_state(record, expected)
    if state_hash(state) != expected_hash:
        raise ExchangeError(f"{name} is not the checkpoint that the request names")
    policy.check_adapter_norm(global_norm(state))
    return state


def _words_of(plan: Plan, planned: RoundOfPlan, request: RoundRequest) -> str:
    stage = planned.stage.modality or planned.stage.name
    return f"round {request.round} of {plan.num_rounds} (stage {stage}) of {plan.study.name}"


def _too_late(every_s: float, plan: Plan) -> str:
    return (
        f"this site answers {every_s:.0f} s after it began, and the plan waits for "
        f"{plan.aggregation.deadline_s:.0f} s; ask the coordinator for a longer deadline_s or "
        "fewer local_steps"
    )


def _as_wire(delta: State, plan: Plan) -> State:
    """The delta as it will leave. Values that the wire's type cannot hold are refused.

    Whether they fit follows from noised sums alone, as with the norm's limit.

    Raises:
        TrainingError: a value overflows.
    """
    dtype = getattr(torch, plan.transport.wire_dtype)
    wire = {name: tensor.to(dtype) for name, tensor in delta.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in wire.values()):
        raise TrainingError(f"an update does not fit into {plan.transport.wire_dtype}")
    return wire
