"""What one private step over many small hospitals is worth, on a folder of real tiles.

    OMP_NUM_THREADS=1 python benchmarks/distributed_table.py --tiles DIR --labels FILE --out DIR
        [--seeds 5 6 7] [--epsilons 1 3] [--sizes 20 100] [--rates 1 0.4] [--images]

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
``--images`` the evaluator's distance. Every arm trains at every rate and is shown at its best: a
choice that is made on the test set, for all arms alike. ``--program`` measures the generator of a
``crafts-sim run many-small`` by the same ruler, to compare with the arm. Interrupted, the same
command goes on.

Precision against patients, the default rule's question: ``--arms "site trust, by patients" "site
trust, by precision" --sizes 20 300 --epsilons 8 --seeds 5 6 7 8 9``.
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import torch
from federation_table import commit
from numpy.typing import NDArray
from torch import Tensor

from crafts_client.ingest import TableColumns
from crafts_client.patients import PatientTiles
from crafts_client.speed import Speed
from crafts_client.trainer import Randomness, Trainer, TrainingTask
from crafts_core.adapters import Adapter, State, merged_unet
from crafts_core.durable import append_line
from crafts_core.evaluation.evaluate import Evaluator, RealTiles
from crafts_core.exchange import RoundReply, global_norm, schema_hash
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.plan import Plan
from crafts_core.stages.batch import TileBatch
from crafts_core.stages.objective import Objective
from crafts_core.starting_point import initial_state
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.patient_sgd import Mechanism
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.ranks import Ranks
from crafts_server.aggregation import (
    AlignmentRegularized,
    ByPatients,
    RoundState,
    SiteEvidence,
    SiteUpdate,
    aggregate,
)
from crafts_server.declared_noise import noise_variance
from crafts_server.export import averaged
from crafts_server.home import CoordinatorHome
from crafts_server.probe import FoundationProbe, ProbeSize
from crafts_simulations.processes import loopback_config
from crafts_simulations.scenario import Scenario, load_scenario, parse_scenario
from crafts_simulations.sites import TileSource, heldout_store, make_sites
from crafts_simulations.study import LocalStudy
from crafts_simulations.tile_split import round_size
from crafts_simulations.workspace import Workspace

ROWS = "rows.jsonl"


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


class PatientsCount(AlignmentRegularized):
    """The default rule's step, with every patient counting the same."""

    needs_gain = False

    def weights(self, evidence: Sequence[SiteEvidence]) -> list[float]:
        return ByPatients().weights(evidence)


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
        rule = AlignmentRegularized(config) if arm.by_precision else PatientsCount(config)
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
            start = RoundState(
                state=state, server_state=kept, factor=planned.factor, margin=probe.margin(state)
            )
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
        adapter = Adapter.attach(
            merged_unet(self.foundation.generator.unet, self.plan.adapter, state),
            self.plan.adapter,
            self.plan.parts,
        )
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

    def measure(self, state: State, most_patients: int, *, images: bool) -> dict[str, Any]:
        """The numbers of a row."""
        losses = self.losses(state, most_patients=most_patients)
        return {
            "loss": losses[""],
            "smallest_third": self.smallest_third(losses),
            "distance": self.distance(state) if images else None,
        }

    def distance(self, state: State) -> float:
        """The evaluator's, of generated images to the held-out tiles."""
        store = self.heldout_store
        tiles = RealTiles.read(store, np.arange(store.num_tiles))
        evaluator = Evaluator(self.foundation, tiles, self.scenario.evaluation)
        unet = merged_unet(self.foundation.generator.unet, self.plan.adapter, state)
        return evaluator.fidelity(replace(self.foundation.generator, unet=unet)).mmd2


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


def _of_seed(scenario: Scenario, seed: int, sizes: Sequence[int], factor: int) -> Scenario:
    values = scenario.model_dump(mode="json")
    values["tiles"] |= {"seed": seed, "patients": list(sizes)}
    for section in ("study", "evaluation"):
        values[section]["seed"] = seed
    for stage in values["stage"]:
        stage["rounds"] = max(1, stage["rounds"] // factor)
    return parse_scenario(values, "of the benchmark")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: every arm at its best rate, and what distributed gains over each, paired."""
    lines = [
        "| epsilon | arm | rate | held-out loss, per seed | mean | smallest third | distance | "
        "distributed minus this, per seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for epsilon in sorted({row["epsilon"] for row in rows}):
        mine = {
            arm: best
            for arm in ARMS
            if (best := _best([r for r in rows if (r["arm"], r["epsilon"]) == (arm, epsilon)]))
        }
        for arm, best in mine.items():
            lines.append(_line(epsilon, arm, best, mine.get("distributed", {})))
    starts = {row["seed"]: row["start"] for row in rows}
    lines.append(f"| | public foundation | | {_numbers(starts.values())} | | | | |")
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
    distances = [row["distance"] for row in rows if row["distance"] is not None]
    return (
        f"| {epsilon:g} | {arm} | {rows[0]['rate']:g} | {_numbers(r['loss'] for r in rows)} | "
        f"{mean(r['loss'] for r in rows):.5f} | {mean(r['smallest_third'] for r in rows):.5f} | "
        f"{_numbers(distances)} | {_numbers(gains, '+')}{spread} |"
    )


def _numbers(values: Any, sign: str = "") -> str:
    return ", ".join(f"{value:{sign}.5f}" for value in values)


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
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.4], help="factors")
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
    kept = wanted.out / ROWS
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["seed"], row["arm"], row["epsilon"], row["rate"]) for row in rows}
    for seed in wanted.seeds:
        scenario = _of_seed(load_scenario(wanted.scenario), seed, wanted.sizes, wanted.fewer_rounds)
        bench = Bench(scenario, source, wanted.out / f"seed-{seed}", foundation)
        start = initial_state(foundation, bench.plan.adapter, seed, bench.plan.parts)
        at_start = bench.losses(start, most_patients=wanted.heldout)[""]
        if wanted.program is not None and seed == wanted.seeds[0]:
            state = exported(wanted.program, bench.plan.aggregation.ema_decay)
            told = bench.measure(state, wanted.heldout, images=wanted.images)
            print(json.dumps({"program": str(wanted.program), **told}), file=sys.stderr, flush=True)
        for epsilon in wanted.epsilons:
            for arm in wanted.arms:
                for rate in wanted.rates:
                    if (seed, arm, epsilon, rate) in done:
                        continue
                    same = [
                        r for r in rows if (r["seed"], r["arm"], r["rate"]) == (seed, arm, rate)
                    ]
                    if arm == NOT_PRIVATE and same:  # it knows no epsilon
                        row = {**same[0], "epsilon": epsilon}
                    else:
                        state = bench.train(ARMS[arm], epsilon, rate)
                        told = bench.measure(state, wanted.heldout, images=wanted.images)
                        which = {"seed": seed, "arm": arm, "epsilon": epsilon, "rate": rate}
                        row = {**which, "start": at_start, **told}
                    append_line(kept, json.dumps(row))
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
    print(f"Measured {datetime.now(UTC):%Y-%m-%d}, commit {commit()}, seeds {wanted.seeds},")
    print(f"{len(bench.sites)} hospitals of {wanted.sizes[0]} to {wanted.sizes[1]} patients.\n")
    print(table(rows))


if __name__ == "__main__":
    main()
