"""What a federation gives on a folder of real tiles, beside everything it should be compared with.

    python benchmarks/federation_table.py --tiles DIR --labels FILE --out DIR [--seeds 5 6]

Arms: the shared generator at epsilon 8, at epsilon 1 and without privacy; each site alone; plain
federated averaging of both LoRA factors (FedIT) and of B with A frozen (FFA-LoRA, arXiv
2403.12313) at epsilon 8; pooled training without privacy. All arms train the same number of steps
on the same split and are measured on the same held-out patients. Each arm is one `crafts-sim`
run in its own folder: interrupted, the same command goes on.

The two baselines have a random A and no server momentum, so they got learning rates and a clipping
bound of their own: the best of 1, 3, 10 at the bound that is the median gradient norm, in a sweep
on these tiles.
"""

import argparse
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from crafts_client.ingest import TableColumns
from crafts_core.evaluation.baselines import ArmName
from crafts_core.evaluation.encoder import require_one_encoder
from crafts_core.evaluation.figures import Arm, Evaluation
from crafts_core.evaluation.table import COLUMNS, LABELS, remarks
from crafts_simulations.report import Report
from crafts_simulations.run import run_scenario
from crafts_simulations.scenario import Scenario, load_scenario, parse_scenario
from crafts_simulations.sites import TileSource

Changes = dict[str, dict[str, Any]]
NOT_PRIVATE = {"mechanism": "none", "target_epsilon": None, "delta": None}


def arms(scenario: Scenario) -> dict[str, Changes]:
    """Arm name to what it changes in the scenario."""
    plain, tuned = {"rule": "by_patients"}, {"learning_rate": 3.0}
    found: dict[str, Changes] = {
        "shared, epsilon 8": {"privacy": {"target_epsilon": 8.0}},
        "shared, epsilon 1": {"privacy": {"target_epsilon": 1.0}},
        "shared, not private": {"privacy": NOT_PRIVATE},
        "FedIT, epsilon 8": {
            "adapter": {"schedule": "both", "first_factor": "random"},
            "aggregation": plain,
            "stage": tuned,
            "privacy": {"target_epsilon": 8.0, "max_grad_norm": 0.05},
        },
        "FFA-LoRA, epsilon 8": {
            "adapter": {"schedule": "second_only", "first_factor": "random"},
            "aggregation": plain,
            "stage": tuned,
            "privacy": {"target_epsilon": 8.0, "max_grad_norm": 0.05},
        },
        "pooled, not private": {
            "tiles": {"num_sites": 1},
            "aggregation": {"min_sites": 1},
            "privacy": NOT_PRIVATE,
        },
    }
    for name in scenario.site_names:
        found[f"{name} alone, epsilon 8"] = {
            "scenario": {"participants": [name]},
            "aggregation": {"min_sites": 1},
            "privacy": {"target_epsilon": 8.0},
        }
    return found


def changed(scenario: Scenario, changes: Changes, seed: int) -> Scenario:
    """The scenario with an arm's changes and one seed for split, public draws and samples."""
    values = scenario.model_dump(mode="json")
    seeds: Changes = {
        "tiles": {"seed": seed},
        "study": {"seed": seed},
        "evaluation": {"seed": seed},
    }
    for each in (seeds, changes):
        for section, entries in each.items():
            parts = values[section] if section == "stage" else [values[section]]
            for part in parts:
                part |= entries
    return parse_scenario(values, "of the benchmark")


def row(arm: str, reports: list[Report]) -> dict[str, Any]:
    """One line of the table: means over seeds, and every seed's structure distance."""
    shared = [_arm(report.evaluation, "generator") for report in reports]
    foundation = [_arm(report.evaluation, "foundation") for report in reports]
    spent = [
        site.epsilon for report in reports for site in report.sites if site.epsilon is not None
    ]
    return {
        "arm": arm,
        "structures": [round(each.structure, 4) for each in shared],
        "intervals": [[round(v, 4) for v in each.structure_interval] for each in shared],
        "ratio": mean(
            after.structure / before.structure
            for after, before in zip(shared, foundation, strict=True)
        ),
        **means(shared),
        "epsilon": max(spent) if spent else None,
    }


FIGURES = (
    "colour", "structure", "mmd2", "shape_agreement", "colour_agreement", "drift", "recall",
    "coverage",
)  # fmt: skip
"""Columns of the table, as fields of ``figures.Arm``."""


def means(arms: list[Arm]) -> dict[str, float | None]:
    """Mean of each figure over seeds, as far as all of them have it."""
    return {
        field: None if None in values else mean(values)
        for field in FIGURES
        for values in [[getattr(arm, field) for arm in arms]]
    }


def baseline(evaluations: list[Evaluation], name: ArmName) -> dict[str, Any]:
    """A row that is the same for every arm: nothing was trained for it."""
    measured = [arm for arm in (each.arm(name) for each in evaluations) if arm is not None]
    return {"arm": LABELS[name], **means(measured)} if measured else {}


def _arm(evaluation: Evaluation, name: ArmName) -> Arm:
    arm = evaluation.arm(name)
    assert arm is not None
    return arm


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = {field: heading for heading, field in COLUMNS}
    names = ["arm", *(heads[field] for field in FIGURES), "structure per seed", "epsilon"]
    lines = [_line(names), "|---" * len(names) + "|"]
    for line in rows:
        figures = ["" if line[field] is None else f"{line[field]:.4f}" for field in FIGURES]
        seeds = ", ".join(
            f"{value} [{low}, {high}]"
            for value, (low, high) in zip(
                line.get("structures", []), line.get("intervals", []), strict=True
            )
        )
        epsilon = line.get("epsilon")
        lines.append(
            _line([line["arm"], *figures, seeds, "none" if epsilon is None else f"{epsilon:.2f}"])
        )
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def commit() -> str:
    """The commit that was measured, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=Path, required=True, help="folder of tiles")
    parser.add_argument("--labels", type=Path, required=True, help="CSV or TSV of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--scenario", default="real-tiles", help="shipped name or TOML file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5])
    parser.add_argument("--arms", nargs="+", help="only arms that begin with one of these words")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    source = TileSource(folder=arguments.tiles, labels=arguments.labels, columns=TableColumns())
    scenario = load_scenario(arguments.scenario)
    rows, evaluations = [], []
    for arm, changes in arms(scenario).items():
        if arguments.arms and not any(arm.startswith(word) for word in arguments.arms):
            continue
        reports = []
        for seed in arguments.seeds:
            name = arm.replace(", ", "-").replace(" ", "-").lower()
            out = arguments.out / f"{name}-seed{seed}"
            out.parent.mkdir(parents=True, exist_ok=True)
            scenario_of_arm = changed(scenario, changes, seed)
            reports.append(
                run_scenario(scenario_of_arm, out, source=source, device=arguments.device)
            )
        rows.append(row(arm, reports))
        evaluations += [report.evaluation for report in reports]
        require_one_encoder(evaluations)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    beside: tuple[ArmName, ...] = (
        "real", "reconstruction", "foundation", "recoloured", "recoloured_by_caption",
    )  # fmt: skip
    baselines = [baseline(evaluations, name) for name in beside]
    first = evaluations[0]
    print(f"Measured {datetime.now(UTC):%Y-%m-%d}, commit {commit()}, seeds {arguments.seeds},")
    print(f"{platform.machine()}, Python {platform.python_version()}, {arguments.device}; metric")
    print(f"{first.metric} in {first.encoder}, n {first.n}, {first.heldout_patients} held-out")
    print("patients, 90 % intervals over patients; what each column is: ")
    print("docs/evaluation.md. Baselines are means over all runs.\n")
    print(table([line for line in baselines if line] + rows))
    print("\n" + "\n".join(f"- {remark}" for remark in remarks(first)))


if __name__ == "__main__":
    main()
