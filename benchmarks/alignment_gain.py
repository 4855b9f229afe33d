"""What an update does to the margin: a margin for each site, or one gradient for all of them.

    OMP_NUM_THREADS=1 python benchmarks/alignment_gain.py --tiles DIR --labels FILE --out DIR
        [--seeds 5 6 7] [--num-sites 6] [--patients 15 40]

Hospitals of real tiles, each with two thirds of its patients from one class, take one private step
of ``many-small`` with the real denoiser, in a round of pretraining and in one of alignment behind
it: without noise, and with what epsilon 8 and epsilon 1 take when every site adds its own. Each
update's gain on the public probe is measured by a margin of its own (as rounds did before) and by
its product with the margin's gradient where the round starts.

Told are the correlation of ranks within a round, the mean difference, and the weights that follow:
how far those of a margin each are from those of the gradient (half the sum of their differences),
and how far the gate moves either from what precision alone says; all for sites of equal noise. What
a round costs at the coordinator is told by ``round_at_coordinator.py``. Interrupted, the same
command goes on.
"""

import argparse
import csv
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from distributed_table import commit
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from crafts_core.adapters import Adapter
from crafts_core.durable import append_line
from crafts_core.exchange import global_norm, inner_product
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.plan import Plan
from crafts_core.plan_sections import StageConfig
from crafts_core.public_update import PublicUpdateConfig
from crafts_core.stages.batch import TileBatch
from crafts_core.stages.objective import Objective
from crafts_core.starting_point import initial_state
from crafts_core.state import State, add_delta
from crafts_core.vocabulary import label_caption
from crafts_core.weighting import log_gate, normalised
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_server.aggregation import weighted_sum
from crafts_server.probe import FoundationProbe, ProbeSize
from crafts_simulations.scenario import load_scenario, parse_scenario

LABELS = {
    "colon_aca": "COAD",
    "colon_n": "normal colon",
    "lung_aca": "LUAD",
    "lung_n": "normal lung",
    "lung_scc": "LUSC",
}


class Hospital:
    """Patients with the tiles that their step takes."""

    def __init__(self, foundation: Foundation, patients: list[list[tuple[Path, str]]]) -> None:
        self.declared = len(patients)
        self.batches = [self._batch(foundation, tiles) for tiles in patients]

    @staticmethod
    def _batch(foundation: Foundation, tiles: list[tuple[Path, str]]) -> TileBatch:
        side = foundation.manifest.tile_px
        images = [Image.open(path).convert("RGB").resize((side, side)) for path, _ in tiles]
        pixels = torch.tensor(np.stack([np.asarray(image) for image in images])).movedim(3, 1)
        captions = [label_caption(LABELS[label]) for _, label in tiles]
        return TileBatch(
            latents_BCHW=foundation.generator.encode_images(pixels / 127.5 - 1.0),
            text_BLD=foundation.generator.encode_captions(captions),
            null_text_LD=foundation.null_text_LD,
            weight_B=torch.full((len(tiles),), 1.0 / len(tiles)),
            tile_embedding_BD=foundation.aligner.embed_images(pixels),
            caption_embedding_BD=foundation.aligner.embed_captions(captions),
        )


def hospitals(
    foundation: Foundation, wanted: argparse.Namespace, seed: int, sample_rate: float
) -> list[Hospital]:
    """Each mostly of one class; only patients that its step draws are read."""
    of_patient = defaultdict(list)
    with wanted.labels.open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            key = (row["class"], row["source_tile_group"])
            of_patient[key].append((wanted.tiles / row["file"], row["class"]))
    draw = random.Random(seed)
    free = defaultdict(list)
    for (label, _), tiles in sorted(of_patient.items()):
        free[label].append(tiles)
    for patients in free.values():
        draw.shuffle(patients)
    found = []
    for number in range(wanted.num_sites):
        own = sorted(free)[number % len(free)]
        size = draw.randint(*wanted.patients)
        taken = []
        for place in range(size):
            label = own if place % 3 else draw.choice(sorted(free))
            tiles = free[label].pop()
            if draw.random() < sample_rate:
                taken.append(draw.sample(tiles, min(2, len(tiles))))
        hospital = Hospital(foundation, taken)
        hospital.declared = size
        found.append(hospital)
    return found


def summed_gradient(
    hospital: Hospital, objective: Objective, adapter: Adapter, state: State, plan: Plan, seed: int
) -> State:
    """Of a step: the sum of its patients' clipped gradients."""
    adapter.load_state(state)
    parameters = adapter.trainable("second")
    total = {name: torch.zeros(value.shape) for name, value in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    for batch in hospital.batches:
        loss = batch.mean(objective.loss_per_tile(batch, objective.draw(batch, generator)))
        parts = torch.autograd.grad(loss, tuple(parameters.values()))
        own = dict(zip(parameters, parts, strict=True))
        scale = min(1.0, plan.privacy.max_grad_norm / global_norm(own))
        total = add_delta(total, own, scale)
    return total


def updates(
    sums: Sequence[State],
    sites: Sequence[Hospital],
    plan: Plan,
    stage: StageConfig,
    sigma: float,
    seed: int,
) -> list[State]:
    """Each site's step with its own noise; the same directions for every sigma."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for total, site in zip(sums, sites, strict=True):
        noise = {
            name: torch.randn(value.shape, generator=generator) for name, value in total.items()
        }
        noisy = add_delta(total, noise, sigma * plan.privacy.max_grad_norm)
        rate = -stage.learning_rate / (plan.privacy.sample_rate * site.declared)
        found.append({name: rate * value for name, value in noisy.items()})
    return found


def measure(foundation: Foundation, wanted: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """A row for each round and kind of update."""
    scenario = load_scenario("many-small").model_dump(mode="json")
    sums = ("trust", "colluding_sites", "sum_grid_bits")
    plans = {}
    for epsilon in (8.0, 1.0):
        values = scenario | {"aggregation": {"rule": "alignment_regularized", "min_sites": 1}}
        kept = {k: v for k, v in scenario["privacy"].items() if k not in sums}
        values["privacy"] = kept | {"target_epsilon": epsilon}
        plans[epsilon] = parse_scenario(values, "of the benchmark").plan(foundation.manifest.hash)
    plan = plans[1.0]
    sigmas = {f"epsilon {e:g}": plan_noise_multiplier(each) for e, each in plans.items()}
    start = wanted.out / "start.safetensors"
    if not start.exists():
        work = PublicUpdateConfig(num_shifts=2, max_tiles=32, num_projections=1)
        save_file(initial_state(foundation, plan.adapter, 7, public_work=work), start)
    state = load_file(start)
    sites = hospitals(foundation, wanted, seed, plan.privacy.sample_rate)
    unet = load(embedded_path()).generator.denoiser
    adapter = Adapter.attach(unet, plan.adapter)
    probe = FoundationProbe(foundation, plan.adapter, seed=seed, size=ProbeSize())._margin_probe
    rows = []
    for number, stage in enumerate(plan.stage, start=1):
        objective = Objective(foundation, adapter, stage, state)
        found = [
            summed_gradient(site, objective, adapter, state, plan, seed + number) for site in sites
        ]
        without = updates(found, sites, plan, stage, 0.0, seed)
        of_kind = {
            "no noise": without,
            **{k: updates(found, sites, plan, stage, s, seed) for k, s in sigmas.items()},
        }
        before = probe.margin(state)
        _, slope = probe.margin_gradient(state, "second")
        for kind, deltas in of_kind.items():
            # Of each coordinate; without noise nothing softens the gate.
            scale = sigmas.get(kind, 0.0) * plan.privacy.max_grad_norm * stage.learning_rate
            stds = [scale / (plan.privacy.sample_rate * site.declared) for site in sites]
            rows.append(
                {
                    "seed": seed,
                    "stage": stage.name,
                    "kind": kind,
                    "margin each": [probe.margin(add_delta(state, d)) - before for d in deltas],
                    "gradient": [inner_product(slope, delta) for delta in deltas],
                    "gain_noise": [global_norm(slope) * std for std in stds],
                    "norms": [global_norm(delta) for delta in deltas],
                    "patients": [site.declared for site in sites],
                }
            )
        state = add_delta(state, weighted_sum((1.0 / len(sites), lambda d=d: d) for d in without))
    return rows


def weights(row: Mapping[str, Any], way: str, *, softened: bool) -> list[float]:
    """Of the default gate alone."""
    softness = [math.hypot(0.05, 2 * noise) if softened else 0.05 for noise in row["gain_noise"]]
    return normalised([log_gate(g, s) for g, s in zip(row[way], softness, strict=True)])


def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Half the sum of the differences: 0 the same, 1 nothing in common."""
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / 2


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: how well the two agree, and how far either moves the weights."""
    lines = [
        "| updates | stage | gain of a margin each: lowest, highest | ranks: mean (lowest) | mean "
        "difference | noise of the gain | weights apart | moved by a margin each | by the "
        "gradient, as it is | by the gradient, softened |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, stage in dict.fromkeys((row["kind"], row["stage"]) for row in rows):
        mine = [row for row in rows if (row["kind"], row["stage"]) == (kind, stage)]
        true = [gain for row in mine for gain in row["margin each"]]
        pairs = [(row["gradient"], row["margin each"]) for row in mine]
        ranks = [float(spearmanr(*pair).statistic) for pair in pairs]
        off = mean(float(np.abs(np.subtract(*pair)).mean()) for pair in pairs)
        equal = [1.0 / len(mine[0]["patients"])] * len(mine[0]["patients"])
        old = [weights(row, "margin each", softened=False) for row in mine]
        plain = [weights(row, "gradient", softened=False) for row in mine]
        new = [weights(row, "gradient", softened=True) for row in mine]
        numbers = [
            mean(map(apart, new, old)),
            *(mean(apart(each, equal) for each in which) for which in (old, plain, new)),
        ]
        noise = mean(mean(row["gain_noise"]) for row in mine)
        lines.append(
            f"| {kind} | {stage} | {min(true):+.4f}, {max(true):+.4f} | "
            f"{mean(ranks):.2f} ({min(ranks):.2f}) | {off:.4f} | {noise:.4f} | "
            f"{' | '.join(f'{number:.3f}' for number in numbers)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiles", type=Path, required=True, help="folder of tiles")
    parser.add_argument("--labels", type=Path, required=True, help="TSV of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7])
    parser.add_argument("--patients", type=int, nargs=2, default=[15, 40], help="of a hospital")
    parser.add_argument("--num-sites", type=int, default=6, help="hospitals")
    wanted = parser.parse_args()
    wanted.out.mkdir(parents=True, exist_ok=True)
    path = wanted.out / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    foundation = load(embedded_path())
    for seed in wanted.seeds:
        if not any(row["seed"] == seed for row in rows):
            for row in measure(foundation, wanted, seed):
                rows.append(row)
                append_line(path, json.dumps(row))
                print(json.dumps(row), file=sys.stderr, flush=True)
    fewest, most = wanted.patients
    print(f"Measured {datetime.now(UTC):%Y-%m-%d}, commit {commit()}, seeds {wanted.seeds},")
    print(f"{wanted.num_sites} hospitals of {fewest} to {most} patients.\n")
    print(table(rows))


if __name__ == "__main__":
    main()
