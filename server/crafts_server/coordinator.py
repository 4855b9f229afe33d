"""The coordinator of one study: a home, a plan and a foundation, ready to run on any Grid."""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from flwr.serverapp import Grid
from torch import Tensor

from crafts_core.errors import CraftsError
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.foundation import Foundation, load
from crafts_core.plan import Plan
from crafts_core.plan_sections import Factor
from crafts_core.public_pool import PoolError, PublicPool, open_pool
from crafts_core.releases import Decoded, decoded, release_schema
from crafts_core.retrieval import PublicLoss, picked_tiles, retrieve, trained_on
from crafts_core.retrieval_record import Retrieval
from crafts_core.starting_point import initial_state
from crafts_core.state import State
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.signing import verify
from crafts_server.aggregation import AggregationRule, rule_of
from crafts_server.checkpoints import Checkpoint
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.collection import Members, Patience
from crafts_server.errors import HomeError, RegistryError
from crafts_server.export import retrieval_of
from crafts_server.home import CoordinatorHome
from crafts_server.probe import FoundationProbe, ProbeOfRound, ProbeSize
from crafts_server.receipts import RoundReceipt
from crafts_server.registry import Registry, RunStatus
from crafts_server.rosters import Rosters
from crafts_server.rounds import OnRound, recover, run_rounds
from crafts_server.study import Retrieved, Study

log = logging.getLogger(__name__)


def _ignore(_receipt: RoundReceipt) -> None:
    pass


class Coordinator:
    """Runs one plan to its end, over as many processes as it takes."""

    def __init__(
        self,
        home: CoordinatorHome,
        plan: Plan,
        foundation: Foundation,
        *,
        patience: Patience | None = None,
        probe_size: ProbeSize | None = None,
        rule: AggregationRule | None = None,
        probe_of_round: ProbeOfRound | None = None,
        on_round: OnRound = _ignore,
        members: Members | None = None,
    ) -> None:
        """Sign the plan and get ready.

        Args:
            home: Keys, registry, checkpoints.
            plan: What to run.
            foundation: The plan's.
            patience: How rounds wait; for sites in this process ``join_wait_s=0``.
            probe_size: What a margin may cost.
            rule: Another aggregation rule than the plan names, for research.
            probe_of_round: Another public probe than the foundation's.
            on_round: Called after each committed round.
            members: What is known of nodes, where sites enrol.

        Raises:
            HomeError: the plan is for another foundation.
        """
        if plan.study.foundation != foundation.manifest.hash:
            raise HomeError(
                f"the plan wants foundation {plan.study.foundation[:16]}, this home has "
                f"{foundation.manifest.hash[:16]} ({foundation.manifest.name})"
            )
        self.plan = plan
        self._home = home
        self._foundation = foundation
        self._patience = patience or Patience()
        self._probe_size = probe_size or ProbeSize()
        self._rule = rule or rule_of(plan.aggregation)
        self._probe_of_round = probe_of_round
        self._on_round = on_round
        self._members = members or Members()
        self._signed_plan = home.sign_plan(plan)
        self._picked: RealTiles | None = None
        self._loss: PublicLoss | None = None

    @classmethod
    def open(
        cls,
        home_path: Path,
        plan_hash: str,
        *,
        on_round: OnRound = _ignore,
        patience: Patience | None = None,
        members: Members | None = None,
    ) -> Self:
        """From a home on disk and a plan that was signed in it.

        Raises:
            CraftsError: the home, the plan, its signature or the foundation is not in order, or the
                plan was signed by a version that reads it otherwise.
        """
        home = CoordinatorHome.open(home_path)
        with home.registry() as registry:
            record = registry.plan(plan_hash)
        verify(home.public_key, record.json.encode(), record.signature)
        plan = Plan.parse(json.loads(record.json))
        if plan.hash != record.hash:
            # Going on would sign another plan in this one's name, and start it from round 0.
            raise HomeError(
                f"plan {record.hash[:16]} was signed by a version that reads it otherwise; go on "
                "with that version, or sign the plan anew, which starts it over"
            )
        return cls(
            *(home, plan, load(home.foundation_path)),
            on_round=on_round,
            patience=patience,
            members=members,
        )

    def run(self, grid: Grid) -> Checkpoint:
        """Run the plan's rounds, or what an earlier call left of them.

        A plan that has finished in this home is not run again: its result comes back.

        Returns:
            The final checkpoint.

        Raises:
            AggregationError: too few sites; call again to go on.
            CheckpointError: the checkpoints are not what was committed.
            DivergedError: the plan's steps are too large; another plan is needed.
            HomeError: another coordinator runs in this home.
        """
        with self._home.exclusive():
            with self._home.registry() as registry:
                run_id = _open_run(registry, self.plan.hash)
                try:
                    last = run_rounds(
                        grid,
                        self._study(registry, run_id),
                        initial_state=self._initial_state,
                        on_round=self._on_round,
                    )
                except (CraftsError, KeyboardInterrupt):
                    with suppress(RegistryError):
                        registry.set_status(run_id, RunStatus.STOPPED)
                    raise
            shutil.rmtree(self._home.spool_path(run_id), ignore_errors=True)
            return last

    def chain(self) -> list[Checkpoint]:
        """What was committed so far, by whichever process; empty before the run is opened."""
        with self._home.registry() as registry:
            run_id = registry.newest_run(self.plan.hash)
            if run_id is None:
                return []
            store = self._home.checkpoints(run_id)
            return recover(store, registry, run_id=run_id, plan_hash=self.plan.hash)

    def _study(self, registry: Registry, run_id: str) -> Study:
        store = self._home.checkpoints(run_id)
        if self._contrasts:
            self._pick(retrieval_of(store.chain()))
        return Study(
            plan=self.plan,
            signed_plan=self._signed_plan,
            run_id=run_id,
            store=store,
            registry=registry,
            rule=self._rule,
            probe_of_round=self._probe(),
            spool_path=self._home.spool_path(run_id),
            patience=self._patience,
            members=self._members,
            noise_multiplier=plan_noise_multiplier(self.plan),
            agreed_patients=CohortSizes(registry).agreed,
            decode=self._decoded,
            retrieve=partial(self._retrieved, run_id),
            roster=lambda: Rosters(registry).fixed(self.plan),
        )

    def _probe(self) -> ProbeOfRound:
        if self._probe_of_round is not None:
            return self._probe_of_round
        plan = self.plan
        probe = FoundationProbe(
            self._foundation,
            plan.adapter,
            seed=plan.study.seed,
            size=self._probe_size,
            parts=plan.parts,
            told_loss=self._told_loss,
        )
        return probe.for_round

    def _told_loss(self, state: Mapping[str, Tensor]) -> PublicLoss | None:
        if self._loss is None and self._picked is not None:
            self._loss = PublicLoss(self._picked, self._foundation, self.plan, state)
        return self._loss

    @property
    def _contrasts(self) -> bool:
        """Whether the plan contrasts what is picked with what sites told."""
        return any(each.is_retrieval and each.lambda_align > 0 for each in self.plan.stage)

    def _pick(self, record: Retrieval | None) -> None:
        """Have ready what the alignment steps of later rounds are on."""
        if record is not None and record.num_tiles:
            self._picked = picked_tiles(self._pool(), record)

    def _initial_state(self) -> State:
        log.info("computing the public starting point of study %s", self.plan.study.name)
        plan = self.plan
        state = initial_state(self._foundation, plan.adapter, plan.study.seed, plan.parts)
        return state | release_schema(plan, self._foundation)

    def _retrieved(
        self, run_id: str, state: State, unknown: Sequence[bool], go_on: Callable[[], None]
    ) -> Retrieved:
        plan, foundation = self.plan, self._foundation
        unfinished = self._home.spool_path(run_id) / "public-steps.pt"
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        pool = self._pool()
        log.info("picking of %d public tiles for study %s", len(pool), plan.study.name)

        def look_up(_what: str, _done: int, _total: int) -> None:
            go_on()

        record = retrieve(pool, foundation, plan, state, unknown, look_up)
        log.info("training on %s", record.in_words)
        picked = picked_tiles(pool, record)
        trained = trained_on(picked, foundation, plan, state, unfinished, look_up)
        if self._contrasts:
            self._pick(record)
        return Retrieved(state=trained, record=record)

    def _pool(self) -> PublicPool:
        """The plan's.

        Raises:
            PoolError: it is not there, or of another scale than the foundation.
        """
        manifest = self._foundation.manifest
        assert self.plan.study.pool is not None
        pool = open_pool(self._home.pools, self.plan.study.pool)
        if (pool.tile_px, pool.mpp) != (manifest.tile_px, manifest.mpp):
            raise PoolError(
                f"the pool has {pool.tile_px} px at {pool.mpp:g} microns per pixel, the foundation "
                f"{manifest.tile_px} at {manifest.mpp:g}; add it again"
            )
        return pool

    def _decoded(self, factor: Factor, mean: Tensor, noise_std: float) -> Decoded:
        return decoded(factor, mean, noise_std, self._foundation, self.plan)


def _open_run(registry: Registry, plan_hash: str) -> str:
    """The plan's run in this home; there is one, so that running again never spends again."""
    run_id = registry.newest_run(plan_hash)
    if run_id is None:
        run_id = secrets.token_hex(8)
        registry.start_run(run_id, plan_hash)
    return run_id
