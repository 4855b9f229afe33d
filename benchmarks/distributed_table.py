"""What one private step over many small hospitals is worth, on a folder of real tiles.

    OMP_NUM_THREADS=1 python benchmarks/distributed_table.py --tiles DIR --labels FILE --out DIR
        [--seeds 5 6 7] [--epsilons 1 3] [--num-sites 10] [--sizes 20 100] [--rates 0.5 2]
        [--images]

Each round every site takes one step of SGD without momentum from the same adapter. The mean of
their steps, weighted by patients, then *is* the step over everybody's patients together, so arms
differ in nothing but the noise and the weights:

| arm | noise of each site, over max_grad_norm | weights |
|---|---|---|
| distributed | sigma / sqrt(sites - colluding) | patients |
| site trust, by patients | sigma | patients |
| site trust, by precision | sigma | the plan's default rule |
| pooled, same epsilon | sigma / sqrt(sites) | patients |
| pooled, not private | 0 | patients |

That a distributed study is pooled training with that noise, to the bit, is a test
(``tests/simulations/test_federated_equals_pooled.py``), so no protocol runs here. Patients, tiles,
diffusion draws and directions of noise are the same in all arms of a seed. Measured is the
denoising loss on patients of no site with fixed draws, over all of them and as the smallest third
of the hospitals would meet it (each class as often as among a hospital's own patients), and with
``--images`` the evaluator's distances of colour and of structure. Every arm trains at every rate
and is shown at its best: a choice that is made on the test set, for all arms alike. ``--program``
measures the generator of a ``crafts-sim run many-small`` by the same ruler, to compare with the
arm. Interrupted, the same command goes on.

Precision against patients, the default rule's question: ``--arms "site trust, by patients" "site
trust, by precision" --num-sites 5 --sizes 20 300 --epsilons 8 --seeds 5 6 7 8 9``.
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from crafts_client.ingest.table import TableColumns
from crafts_client.patients import PatientTiles
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, TrainingTask
from crafts_core.adapters import Adapter, merged_denoiser
from crafts_core.durable import append_line
from crafts_core.evaluation.encoder import load_encoder
from crafts_core.evaluation.evaluate import Evaluator, RealTiles
from crafts_core.exchange import RoundReply, global_norm, schema_hash
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.plan import Plan
from crafts_core.plan_sections import AggregationConfig
from crafts_core.stages.batch import TileBatch
from crafts_core.stages.objective import Objective
from crafts_core.starting_point import initial_state
from crafts_core.state import State, add_delta
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.declared_noise import noise_variance
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.ranks import Ranks
from crafts_server.aggregation import (
    AlignmentRegularized,
    ByPatients,
    PublicProbe,
    RoundState,
    ServerStep,
    SiteEvidence,
    SiteUpdate,
    aggregate,
    with_momentum,
)
from crafts_server.export import averaged
from crafts_server.home import CoordinatorHome
from crafts_server.probe import FoundationProbe, ProbeSize
from crafts_simulations.hospital import round_size
from crafts_simulations.processes import loopback_config
from crafts_simulations.scenario import Scenario, load_scenario, parse_scenario
from crafts_simulations.sites import TileSource, heldout_store, make_sites
from crafts_simulations.study import LocalStudy
from crafts_simulations.workspace import Workspace

IMAGES = ("colour", "structure")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Who adds how much noise, and how sites are weighed."""

    noise: Literal["share", "site", "pooled", "none"]
    by_precision: bool = False

    def noise_multiplier(self, sigma: float, num_sites: int, colluding: int) -> float:
        """Of each site, over max_grad_norm."""
        parts = {"share": num_sites - colluding, "site": 1, "pooled": num_sites, "none": math.inf}
        return sigma / math.sqrt(parts[self.noise])


ARMS = {
    "distributed": Arm(noise="share"),
    "site trust, by patients": Arm(noise="site"),
    "site trust, by precision": Arm(noise="site", by_precision=True),
    "pooled, same epsilon": Arm(noise="pooled"),
    "pooled, not private": Arm(noise="none"),
}
NOT_PRIVATE = "pooled, not private"
START = "public foundation"


class WholeSteps(AlignmentRegularized):
    """The default rule without what public pairs decide: no gate, every step is taken whole.

    What public pairs allow turns on thresholds, and two arms must not differ by which of them
    happened to pass one.
    """

    needs_gain = False

    def __init__(self, config: AggregationConfig, *, by_precision: bool) -> None:
        super().__init__(config)
        self._momentum, self._by_precision = config.server_momentum, by_precision

    def weights(self, evidence: Sequence[SiteEvidence]) -> list[float]:
        return super().weights(evidence) if self._by_precision else ByPatients().weights(evidence)

    def move(self, start: RoundState, delta: State, probe: PublicProbe) -> ServerStep:  # noqa: ARG002
        velocity = with_momentum(start.server_state, delta, self._momentum)
        return ServerStep(
            state=add_delta(start.state, velocity),
            server_state={**start.server_state, **velocity},
            margin_after=start.margin,
            step_norm=global_norm(velocity),
            trust_norm=0.0,
            step_scale=1.0,
        )


class Turn(PatientTiles):
    """The patients of the site whose turn it is, so that one trainer serves all of them."""

    def __init__(self, sites: Mapping[str, PatientTiles], seed: int) -> None:
        self.sites, self.seed = sites, seed
        self.round, self.site = 0, next(iter(sites))

    def words(self, *what: object) -> torch.Generator:
        """Fixed by the seed, the round and what it is for."""
        text = " ".join(map(str, (self.seed, self.round, *what)))
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def leave_out(self, withdrawn: Collection[str]) -> None:
        assert not withdrawn

    @property
    def num_patients(self) -> int:
        return self.sites[self.site].num_patients

    def of_rank(self, ranks: Ranks) -> Sequence[int]:
        return self.sites[self.site].of_rank(ranks)

    def pseudonym(self, patient: int) -> str:
        return self.sites[self.site].pseudonym(patient)

    def batch(self, patient: int, **options: Any) -> TileBatch:
        return self.sites[self.site].batch(patient, **options)

    # What the engine asks of noise and of sampling.

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        """The same direction for every arm; rounded to the grid."""
        generator = self.words("noise", self.site)
        unit_D = torch.randn(grid_sum_D.shape, dtype=torch.float64, generator=generator)
        grid_sum_D += (unit_D * std).round()

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        """The same patients for every arm."""
        drawn = torch.rand(num_patients, generator=self.words("sample", self.site))
        return np.flatnonzero((drawn < sample_rate).numpy()).astype(np.int64)


class Bench:
    """The hospitals of one seed, made once, and what every arm of it shares."""

    def __init__(
        self, scenario: Scenario, source: TileSource, out: Path, foundation: Foundation
    ) -> None:
        self.scenario, self.foundation = scenario, foundation
        self.plan = scenario.plan(foundation.manifest.hash)
        workspace = Workspace.claim(out, {"scenario": scenario.model_dump(mode="json")})
        home = CoordinatorHome.create(workspace.coordinator, loopback_config(foundation.path))
        study = LocalStudy(
            workspace=workspace,
            scenario=scenario,
            plan=self.plan,
            foundation=foundation,
            signer=home.public_key,
            num_workers=0,
            real_processes=False,
            progress=lambda _what, _done, _total: None,
        )
        make_sites(study, source)
        stores = {name: TileStore.open(workspace.site(name) / "tiles") for name in self.sites}
        self.mixes = {name: Counter(_classes(store)) for name, store in stores.items()}
        self.cohort = Turn(
            {name: self._tiles(store) for name, store in stores.items()}, scenario.study.seed
        )
        self.declared = {name: round_size(store.num_patients) for name, store in stores.items()}
        self.heldout_store = heldout_store(workspace)
        LatentCache.build(self.heldout_store, foundation)
        self.heldout = self._tiles(self.heldout_store)
        self.trainer = Trainer(
            foundation,
            self.plan.adapter,
            self.cohort,
            parts=self.plan.parts,
            randomness=Randomness(
                noise=self.cohort,
                sampler=self.cohort,
                generator=lambda step, patient: self.cohort.words(self.cohort.site, step, patient),
            ),
            speed=Speed(microbatch_tiles=64),
        )

    @property
    def sites(self) -> tuple[str, ...]:
        return self.scenario.site_names

    def _tiles(self, store: TileStore) -> PatientTiles:
        cache = LatentCache.open(store, self.foundation.manifest.hash)
        return PatientTiles(store, cache, self.foundation)

    def train(self, arm: Arm, epsilon: float, rate: float) -> State:
        """The moving average that a study of this arm would export."""
        plan = _at_rate(self.scenario, epsilon, rate).plan(self.foundation.manifest.hash)
        sigma = 0.0 if arm.noise == "none" else plan_noise_multiplier(plan)
        own = arm.noise_multiplier(sigma, len(self.sites), plan.privacy.colluding_sites or 0)
        config = plan.aggregation
        rule = WholeSteps(config, by_precision=arm.by_precision)
        probes = FoundationProbe(
            *(self.foundation, plan.adapter),
            seed=plan.study.seed,
            size=ProbeSize(),
            parts=plan.parts,
        )
        state = initial_state(self.foundation, plan.adapter, plan.study.seed, plan.parts)
        total: State = {}
        kept: State = {}
        weight_sum = 0.0
        for planned in plan.rounds():
            if planned.starts_stage:
                stage_start, kept = state, rule.begin_stage(kept)
            self.cohort.round = planned.round
            probe = probes.for_round(planned.round)
            updates = []
            for name in self.sites:
                self.cohort.site = name
                mechanism = _mechanism(plan, own, self.declared[name])
                delta = self.trainer.train(
                    TrainingTask(
                        stage=planned.stage,
                        factor=planned.factor,
                        privacy=plan.privacy,
                        mechanism=mechanism,
                        charged=mechanism.event(1),
                        state=state,
                        stage_start=stage_start if planned.stage.lambda_drift > 0 else None,
                    )
                )
                reply = _reply(plan, planned.round, name, delta, mechanism, self.declared[name])
                updates.append(SiteUpdate.of(reply, noise_variance(reply, planned.stage), delta))
            start = RoundState(state=state, server_state=kept, factor=planned.factor, margin=0.0)
            step = aggregate(
                *(rule, start, updates, probe), max_weight_per_share=config.max_weight_per_share
            ).step
            state, kept = step.state, step.server_state
            total = {k: config.ema_decay * total.get(k, 0.0) + v for k, v in state.items()}
            weight_sum = config.ema_decay * weight_sum + 1.0
        return {name: tensor / weight_sum for name, tensor in total.items()}

    @torch.no_grad()
    def losses(self, state: State, *, most_patients: int) -> dict[str, float]:
        """Mean held-out denoising loss of each class and of all, over fixed draws."""
        unet = copy.deepcopy(self.foundation.generator.denoiser)
        adapter = Adapter.attach(unet, self.plan.adapter, self.plan.parts)
        adapter.load_state(state)  # what was attached is random
        objective = Objective(self.foundation, adapter, self.plan.stage[0])
        of_class: dict[str, list[float]] = {}
        classes = list(_classes(self.heldout_store))
        for patient in range(min(most_patients, self.heldout.num_patients)):
            generator = torch.Generator().manual_seed(patient)
            batch = self.heldout.batch(patient, max_tiles=4, generator=generator)
            loss = objective.loss_per_tile(batch, objective.draw(batch, generator)).mean()
            of_class.setdefault(classes[patient], []).append(float(loss))
        means = {name: mean(values) for name, values in of_class.items()}
        everybody = [value for values in of_class.values() for value in values]
        return {**means, "": mean(everybody)}

    def smallest_third(self, losses: Mapping[str, float]) -> float:
        """The mean over the smallest hospitals of what each would meet."""
        by_size = sorted(self.sites, key=lambda name: self.declared[name])
        small = by_size[: max(1, len(by_size) // 3)]
        return mean(
            sum(
                number * losses.get(which, losses[""]) for which, number in self.mixes[name].items()
            )
            / sum(self.mixes[name].values())
            for name in small
        )

    def measure(self, state: State, most_patients: int) -> dict[str, float]:
        """The numbers of a row."""
        losses = self.losses(state, most_patients=most_patients)
        return {"loss": losses[""], "smallest_third": self.smallest_third(losses)}

    @cached_property
    def evaluator(self) -> Evaluator:
        tiles = RealTiles.read(self.heldout_store, np.arange(self.heldout_store.num_tiles))
        config = self.scenario.evaluation
        return Evaluator(self.foundation, tiles, config, load_encoder(config.encoder))

    def distances(self, state: State) -> dict[str, float]:
        """The evaluator's, of generated images to the held-out tiles."""
        unet = merged_denoiser(self.foundation.generator.denoiser, self.plan.adapter, state)
        found = self.evaluator.fidelity(replace(self.foundation.generator, denoiser=unet))
        return {"colour": found.colour, "structure": found.structure}


def exported(run: Path, decay: float) -> State:
    """What the programs of a ``crafts-sim run`` ended with."""
    home = CoordinatorHome.open(run / "coordinator")
    registry = home.registry()
    try:
        (found,) = registry.runs()
    finally:
        registry.close()
    return averaged(home.checkpoints(found.run_id).chain(), decay=decay)


def _classes(store: TileStore) -> Sequence[str]:
    """Each patient's caption, in the order of ``patients``."""
    return [
        store.captions[int(store.caption_ids(store.tile_rows_of(patient)[:1])[0])]
        for patient in range(store.num_patients)
    ]


def _mechanism(plan: Plan, own: float, declared_patients: int) -> Mechanism:
    privacy = plan.privacy
    expected = privacy.sample_rate * declared_patients
    if own == 0:
        return Mechanism.without_privacy(
            sample_rate=privacy.sample_rate,
            expected_patients=expected,
            max_grad_norm=privacy.max_grad_norm,
        )
    return Mechanism(
        noise_multiplier=own,
        max_grad_norm=privacy.max_grad_norm,
        sample_rate=privacy.sample_rate,
        expected_patients=expected,
    )


def _reply(
    plan: Plan, number: int, site: str, delta: State, mechanism: Mechanism, declared_patients: int
) -> RoundReply:
    return RoundReply(
        site=site,
        run_id="benchmark",
        plan_hash=plan.hash,
        round=number,
        checkpoint_hash="0" * 64,
        schema_hash=schema_hash(delta),
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        steps=1,
        sample_rate=mechanism.sample_rate,
        declared_patients=declared_patients,
        update_norm=global_norm(delta),
    )


def _at_rate(scenario: Scenario, epsilon: float, rate: float) -> Scenario:
    values = scenario.model_dump(mode="json")
    values["privacy"]["target_epsilon"] = epsilon
    for stage in values["stage"]:
        assert (stage["local_steps"], stage["momentum"], stage["optimizer"]) == (1, 0.0, "sgd")
        stage["learning_rate"] *= rate
    return parse_scenario(values, "of the benchmark")


def _of_seed(scenario: Scenario, seed: int, wanted: argparse.Namespace) -> Scenario:
    values = scenario.model_dump(mode="json")
    values["tiles"] |= {
        "seed": seed,
        "patients": list(wanted.sizes),
        "num_sites": wanted.num_sites,
    }
    values["aggregation"]["min_sites"] = min(wanted.num_sites, scenario.aggregation.min_sites)
    for section in ("study", "evaluation"):
        values[section]["seed"] = seed
    for stage in values["stage"]:
        stage["rounds"] = max(1, stage["rounds"] // wanted.fewer_rounds)
    return parse_scenario(values, "of the benchmark")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: every arm at its best rate, and what distributed gains over each, paired."""
    lines = [
        "| epsilon | arm | rate | held-out loss, per seed | mean | smallest third | colour | "
        "structure | distributed minus this, per seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    starts = _best([row for row in rows if row["arm"] == START])
    for epsilon in sorted({row["epsilon"] for row in rows if row["arm"] != START}):
        mine = {
            arm: best
            for arm in ARMS
            if (best := _best([r for r in rows if (r["arm"], r["epsilon"]) == (arm, epsilon)]))
        }
        for arm, best in mine.items():
            lines.append(_line(epsilon, arm, best, mine.get("distributed", {})))
    if starts:
        lines.append(_line(0.0, START, starts, {}))
    return "\n".join(lines)


def _best(rows: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Seed to row, at the rate with the lowest mean."""
    of_rate: dict[float, list[Mapping[str, Any]]] = {}
    for row in rows:
        of_rate.setdefault(row["rate"], []).append(row)
    most = max(map(len, of_rate.values()), default=0)
    whole = [found for found in of_rate.values() if len(found) == most]
    best = min(whole, key=lambda found: mean(row["loss"] for row in found), default=[])
    return {row["seed"]: row for row in best}


def _line(
    epsilon: float,
    arm: str,
    best: Mapping[int, Mapping[str, Any]],
    ours: Mapping[int, Mapping[str, Any]],
) -> str:
    seeds = sorted(best)
    rows = [best[seed] for seed in seeds]
    gains = [ours[seed]["loss"] - best[seed]["loss"] for seed in seeds if seed in ours]
    spread = f" ({mean(gains):+.5f} +- {stdev(gains) / len(gains) ** 0.5:.5f})" if gains[1:] else ""
    images = [_numbers(row[what] for row in rows if what in row) for what in IMAGES]
    return (
        f"| {epsilon:g} | {arm} | {rows[0]['rate']:g} | {_numbers(r['loss'] for r in rows)} | "
        f"{mean(r['loss'] for r in rows):.5f} | {mean(r['smallest_third'] for r in rows):.5f} | "
        f"{' | '.join(images)} | {_numbers(gains, '+')}{spread} |"
    )


def _numbers(values: Any, sign: str = "") -> str:
    return ", ".join(f"{value:{sign}.5f}" for value in values)


class Rows:
    """What was measured, a line each, and the states that it was measured on."""

    def __init__(self, folder: Path) -> None:
        self._path, self._states = folder / "rows.jsonl", folder / "states"
        self._states.mkdir(exist_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        of_key = {_key(row): row for row in map(json.loads, lines)}  # a later line is fuller
        self.found: list[dict[str, Any]] = list(of_key.values())

    def add(self, row: dict[str, Any], state: State | None = None) -> None:
        """Keep it; it takes the place of a row of the same run."""
        if state is not None:
            save_file(state, self._path_of(row))
        append_line(self._path, json.dumps(row))
        self.found = [*(r for r in self.found if _key(r) != _key(row)), row]
        print(json.dumps(row), file=sys.stderr, flush=True)

    def state(self, row: Mapping[str, Any]) -> State:
        """What the run of this row ended with."""
        return load_file(self._path_of(row))

    def _path_of(self, row: Mapping[str, Any]) -> Path:
        name = " ".join(map(str, _key(row)))
        return self._states / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"


def _key(row: Mapping[str, Any]) -> tuple[int, str, float, float]:
    return row["seed"], row["arm"], row["epsilon"], row["rate"]


def train_missing(wanted: argparse.Namespace, benches: Mapping[int, Bench], rows: Rows) -> None:
    """Every arm of every seed, at every epsilon and rate."""
    for seed, bench in benches.items():
        start = {"seed": seed, "arm": START, "epsilon": 0.0, "rate": 0.0}
        if not any(_key(row) == _key(start) for row in rows.found):
            state = initial_state(bench.foundation, bench.plan.adapter, seed, bench.plan.parts)
            rows.add(start | bench.measure(state, wanted.heldout), state)
    runs = itertools.product(wanted.epsilons, wanted.seeds, wanted.arms, wanted.rates)
    for epsilon, seed, arm, rate in runs:
        which = {"seed": seed, "arm": arm, "epsilon": epsilon, "rate": rate}
        if any(_key(row) == _key(which) for row in rows.found):
            continue
        same = [r for r in rows.found if (r["seed"], r["arm"], r["rate"]) == (seed, arm, rate)]
        if arm == NOT_PRIVATE and same:  # it knows no epsilon
            rows.add({**same[0], "epsilon": epsilon}, rows.state(same[0]))
            continue
        state = benches[seed].train(ARMS[arm], epsilon, rate)
        rows.add(which | benches[seed].measure(state, wanted.heldout), state)


def draw_best(epsilons: Sequence[float], benches: Mapping[int, Bench], rows: Rows) -> None:
    """Distances of images, for the foundation and for every arm at its best rate."""
    for epsilon, arm in [(0.0, START), *itertools.product(epsilons, ARMS)]:
        of_arm = [r for r in rows.found if (r["arm"], r["epsilon"]) == (arm, epsilon)]
        for seed, row in _best(of_arm).items():
            if not set(IMAGES) <= row.keys():
                rows.add({**row, **benches[seed].distances(rows.state(row))})


def commit() -> str:
    """The commit that was measured, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiles", type=Path, required=True, help="folder of tiles")
    parser.add_argument("--labels", type=Path, required=True, help="CSV or TSV of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for hospitals and rows")
    parser.add_argument("--scenario", default="many-small", help="shipped name or TOML file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--sizes", type=int, nargs=2, default=[20, 100], help="patients of sites")
    parser.add_argument("--num-sites", type=int, default=10, help="hospitals")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 2.0], help="factors")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--heldout", type=int, default=120, help="patients that are measured")
    parser.add_argument("--fewer-rounds", type=int, default=1, help="divide each stage's rounds")
    parser.add_argument("--images", action="store_true", help="measure images, too")
    parser.add_argument(
        "--program",
        type=Path,
        help="measure what this `crafts-sim run` of the first seed gave, too",
    )
    wanted = parser.parse_args()
    source = TileSource(folder=wanted.tiles, labels=wanted.labels, columns=TableColumns())
    foundation = load(embedded_path())
    wanted.out.mkdir(parents=True, exist_ok=True)
    benches = {}
    for seed in wanted.seeds:
        scenario = _of_seed(load_scenario(wanted.scenario), seed, wanted)
        benches[seed] = Bench(scenario, source, wanted.out / f"seed-{seed}", foundation)
    if wanted.program is not None:
        bench = benches[wanted.seeds[0]]
        state = exported(wanted.program, bench.plan.aggregation.ema_decay)
        told = bench.measure(state, wanted.heldout)
        images = bench.distances(state) if wanted.images else {}
        print(json.dumps({"program": str(wanted.program), **told, **images}), file=sys.stderr)
    rows = Rows(wanted.out)
    train_missing(wanted, benches, rows)
    if wanted.images:
        draw_best(wanted.epsilons, benches, rows)
    print(f"Measured {datetime.now(UTC):%Y-%m-%d}, commit {commit()}, seeds {wanted.seeds},")
    num_sites, (fewest, most) = len(benches[wanted.seeds[0]].sites), wanted.sizes
    print(f"{num_sites} hospitals of {fewest} to {most} patients.\n")
    print(table(rows.found))


if __name__ == "__main__":
    main()
