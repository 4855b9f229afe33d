"""A study without a generator: eight numbers travel, sites and probe are closed formulas."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from crafts_core.exchange import RoundReply, RoundRequest, SignedPlan, global_norm, schema_hash
from crafts_core.plan import Plan
from crafts_core.roster import Roster
from crafts_core.state import State
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.signing import create_signing_key, load_signing_key
from crafts_server.aggregation import AggregationRule, PublicProbe, rule_of
from crafts_server.checkpoints import CheckpointStore
from crafts_server.collection import Members, Patience
from crafts_server.registry import PlanRecord, Registry
from crafts_server.study import Study
from support.fake_grid import SiteFunction
from support.wire import as_record, from_record

FACTORS = {"second": (".second",), "first": (".first",), "both": (".first", ".second")}
RUN_ID = "run-of-a-test"
SITES = ("aachen", "bern", "coimbra", "solo", *(f"site-{number}" for number in range(1, 5)))
"""Each has agreed on 100 patients, unless a test says otherwise."""


def small_plan(*, rounds: int = 2, **aggregation: object) -> Plan:
    """Two stages of ``rounds`` each; alternating factors; float32 on the wire; no privacy."""
    return Plan.parse(
        {
            "study": {"name": "small", "foundation": "0" * 64, "seed": 7},
            "adapter": {"kind": "lora", "rank": 1},
            "stage": [
                {"name": "pretraining", "rounds": rounds, "local_steps": 3, "learning_rate": 0.1},
                {
                    "name": "alignment",
                    "rounds": rounds,
                    "local_steps": 3,
                    "learning_rate": 0.1,
                    "lambda_align": 0.5,
                    "lambda_drift": 0.1,
                },
            ],
            "privacy": {
                "mechanism": "none",
                "max_grad_norm": 1.0,
                "sample_rate": 0.5,
                "tiles_per_patient": 4,
                "draws_per_tile": 1,
            },
            "aggregation": {"rule": "alignment_regularized", "min_sites": 2} | aggregation,
            "transport": {"wire_dtype": "float32"},
        }
    )


def small_state() -> State:
    generator = torch.Generator().manual_seed(3)
    return {
        "layer.first": torch.randn(1, 4, generator=generator),
        "layer.second": torch.randn(4, 1, generator=generator),
    }


class QuadraticProbe:
    """Margin ``1 - |state - best|^2 / 100``; the gradient is that of the loss it comes from."""

    def __init__(self) -> None:
        self.best = {name: torch.ones_like(tensor) for name, tensor in small_state().items()}
        self.num_margins = self.num_slopes = 0

    def margin(self, state: Mapping[str, Tensor]) -> float:
        self.num_margins += 1
        gap = {name: tensor - self.best[name] for name, tensor in state.items()}
        return 1.0 - global_norm(gap) ** 2 / 100.0

    def margin_gradient(self, state: Mapping[str, Tensor], factor: str) -> State:
        self.num_slopes += 1
        return {n: -slope for n, slope in self.alignment_gradient(state, factor).items()}

    def alignment_gradient(self, state: Mapping[str, Tensor], factor: str) -> State:
        return {
            name: (tensor - self.best[name]) / 50.0
            for name, tensor in state.items()
            if name.endswith(FACTORS[factor])
        }

    def for_round(self, _number: int) -> PublicProbe:
        return self


def small_study(
    directory: Path,
    *,
    plan: Plan | None = None,
    rule: AggregationRule | None = None,
    patience: Patience | None = None,
    patients: Mapping[str, int] | None = None,
    roster: Roster | None = None,
) -> Study:
    """Opened in ``directory``; opened again, it is the same study after a restart."""
    plan = plan or small_plan()
    directory.mkdir(exist_ok=True)
    if not (directory / "key").exists():
        create_signing_key(directory / "key")
    registry = Registry(f"sqlite:///{directory / 'registry.db'}")
    registry.add_plan(
        PlanRecord(
            hash=plan.hash, study="small", json=plan.to_json(), signature="s", public_key="k"
        )
    )
    if registry.newest_run(plan.hash) is None:
        registry.start_run(RUN_ID, plan.hash)
    return Study(
        members=Members(),
        plan=plan,
        signed_plan=SignedPlan(json=plan.to_json(), signature="s", public_key="k"),
        run_id=RUN_ID,
        store=CheckpointStore(directory / "checkpoints", load_signing_key(directory / "key")),
        registry=registry,
        rule=rule or rule_of(plan.aggregation),
        probe_of_round=QuadraticProbe().for_round,
        spool_path=directory / "spool",
        patience=patience or Patience(poll_s=0.001, join_wait_s=0.0),
        noise_multiplier=plan_noise_multiplier(plan),
        decode=_no_release,
        retrieve=_no_release,
        roster=lambda: roster or Roster.of(plan.hash, dict.fromkeys(SITES, 100)),
        agreed_patients=lambda: dict.fromkeys(SITES, 100) if patients is None else patients,
    )


def _no_release(*_: object) -> NoReturn:
    raise AssertionError("the small plan has no release")


def received(arrays: ArrayRecord, like: State | None = None) -> State:
    """An adapter of the small study, or what has other tensors."""
    return from_record(arrays, like or small_state())


def honest_site(name: str, goal: float, *, declared_patients: int = 100) -> SiteFunction:
    """Moves the trained factor a tenth of the way to ``goal``; no noise, no memory."""

    def answer(content: RecordDict) -> RecordDict:
        request = RoundRequest.from_scalars(dict(content["request"]))
        state = received(content["adapter"])
        delta = {
            key: (goal - tensor) / 10.0
            for key, tensor in state.items()
            if key.endswith(FACTORS[request.factor])
        }
        return reply_with(request, name, delta, declared_patients=declared_patients)

    return answer


def reply_with(request: RoundRequest, name: str, delta: State, **changes: object) -> RecordDict:
    """A well-formed reply, with what a test wants to be otherwise."""
    values = {
        "site": name,
        "run_id": request.run_id,
        "plan_hash": request.plan_hash,
        "round": request.round,
        "checkpoint_hash": request.checkpoint_hash,
        "schema_hash": schema_hash(delta),
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "steps": 3,
        "sample_rate": 0.5,
        "declared_patients": 100,
        "update_norm": global_norm(delta),
    }
    norm = values["update_norm"]
    assert isinstance(norm, float)
    if not math.isfinite(norm):
        values["update_norm"] = 1.0
    reply = RoundReply.from_scalars(values | changes)
    return RecordDict(
        {
            "reply": ConfigRecord(dict(reply.to_scalars())),
            "delta": as_record(delta),
        }
    )


def silent_site(_content: RecordDict) -> None:
    """Takes the request and is never heard of again."""


def three_sites() -> dict[int, SiteFunction]:
    return {
        11: honest_site("aachen", 2.0),
        22: honest_site("bern", 1.0),
        33: honest_site("coimbra", -1.0),
    }
