"""Site homes with a few random patients, and coordinators (honest or not) that write to them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.metadata import Metadata

from crafts_client.home import SiteConfig, SiteHome
from crafts_client.messages import RoundMessage, read_message
from crafts_client.policy import Policy
from crafts_core.exchange import RoundRequest, state_hash
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.starting_point import initial_state
from crafts_core.state import State
from crafts_privacy import signing
from crafts_simulations.small_study import DECLARED_PATIENTS, NUM_PATIENTS, write_random_store
from support.toml_text import toml_text
from support.wire import as_record


def policy_of(signer: str, **changes: object) -> Policy:
    """A generous policy that trusts one signer."""
    values: dict[str, object] = {
        "allowed_signers": (signer,),
        "allowed_stages": ("pretraining", "alignment"),
        "max_epsilon": 20.0,
        "max_delta": 1e-3,
        "lifetime_filters": ("sums",),
        "min_noise_multiplier": 0.0,
        "max_sample_rate": 1.0,
        "min_patients": 1,
        "max_tiles_per_patient": 64,
        "max_draws_per_tile": 16,
        "max_local_steps": 100,
        "max_rounds": 100,
        "max_update_norm": 1e6,
        "max_adapter_norm": 1e6,
        "allow_non_private": False,
        "require_secure_aggregation": False,
        "require_approval": False,
    }
    return Policy.model_validate(values | changes)


def make_site_home(
    path: Path,
    foundation: Foundation,
    signer: str,
    *,
    name: str = "north",
    num_patients: int = NUM_PATIENTS,
    declared_patients: int = DECLARED_PATIENTS,
    seed: int = 0,
    microbatch_tiles: int = 64,
    num_steered: int = 0,
    answer_every_s: Literal["auto"] | float = 0.0,
    **policy: object,
) -> SiteHome:
    """A whole home, ready to answer; at once, unless the test is about that.

    What it declares is never its true number of patients.
    """
    assert declared_patients != num_patients, "a test could not tell one from the other"
    config = SiteConfig(
        name=name,
        cohort="main",
        declared_patients=declared_patients,
        device="cpu",
        foundation=str(foundation.path.resolve()),
        tile_store="tiles",
        microbatch_tiles=microbatch_tiles,
        answer_every_s=answer_every_s,
    )
    home = SiteHome.create(path, config, policy_of(signer, **policy))
    home.foundation_approvals.approve(foundation.manifest)
    write_random_store(
        home.tile_store_path,
        foundation,
        num_patients=num_patients,
        seed=seed,
        num_steered=num_steered,
    )
    return home


def plan_values(foundation_hash: str) -> dict[str, object]:
    """Two rounds of each stage over a small LoRA, private. Change what the test is about."""
    stage = {"rounds": 2, "local_steps": 2, "learning_rate": 0.05}
    return {
        "study": {"name": "tiny", "foundation": foundation_hash, "seed": 3},
        "adapter": {"kind": "lora", "rank": 2, "first_factor": "random"},
        "stage": [
            {"name": "pretraining", **stage},
            {"name": "alignment", **stage, "lambda_align": 0.1, "lambda_drift": 0.1},
        ],
        "privacy": {
            "mechanism": "patient_dp",
            "target_epsilon": 8.0,
            "delta": 1e-3,
            "max_grad_norm": 1.0,
            "sample_rate": 0.5,
            "tiles_per_patient": 2,
            "draws_per_tile": 2,
        },
        "aggregation": {"rule": "alignment_regularized", "min_sites": 1, "deadline_s": 600.0},
        "transport": {"wire_dtype": "float32"},
    }


def write_plan(folder: Path, values: Mapping[str, Any]) -> Path:
    """Such values as the file that people write."""
    path = folder / "plan.toml"
    path.write_text(toml_text(values))
    return path


def control_values(foundation_hash: str, **stage: object) -> dict[str, object]:
    """The same with a stage for nuclei as its only one."""
    control = {"name": "control", "modality": "nuclei", "rounds": 2, "local_steps": 2}
    return plan_values(foundation_hash) | {"stage": [control | {"learning_rate": 0.05} | stage]}


def without_privacy(values: dict[str, object], *, sample_rate: float = 1.0) -> dict[str, object]:
    """The same plan with no noise and a clip that never binds."""
    changed = copy.deepcopy(values)
    privacy = dict(changed["privacy"])  # type: ignore[call-overload]
    del privacy["target_epsilon"], privacy["delta"]
    privacy |= {"mechanism": "none", "sample_rate": sample_rate, "max_grad_norm": 1e9}
    return changed | {"privacy": privacy}


@dataclass
class Coordinator:
    """The far side of the wire: signs plans and writes requests, also ones it should not."""

    folder: Path
    foundation: Foundation
    key_name: str = "coordinator.pem"
    public_key: str = field(init=False)

    def __post_init__(self) -> None:
        path = self.folder / self.key_name
        self.public_key = signing.create_signing_key(path)
        self._key = signing.load_signing_key(path)

    def plan(self, **changes: object) -> Plan:
        return Plan.parse(plan_values(self.foundation.manifest.hash) | changes)

    def start(self, plan: Plan) -> State:
        return initial_state(self.foundation, plan.adapter, plan.study.seed, plan.parts)

    def request(
        self,
        plan: Plan,
        state: State,
        *,
        number: int = 1,
        run_id: str = "run-1",
        stage_start: State | None = None,
        **changes: object,
    ) -> RoundRequest:
        planned = list(plan.rounds())[min(number, plan.num_rounds) - 1]
        values: dict[str, object] = {
            "run_id": run_id,
            "plan_hash": plan.hash,
            "round": number,
            "stage_index": planned.stage_index,
            "factor": planned.factor,
            "checkpoint_hash": state_hash(state),
            "stage_start_hash": state_hash(stage_start or state),
        }
        return RoundRequest.model_validate(values | changes)

    def content(
        self,
        plan: Plan,
        state: State,
        request: RoundRequest | None = None,
        *,
        stage_start: State | None = None,
        signature: str | None = None,
    ) -> RecordDict:
        text = plan.to_json()
        records: dict[str, ArrayRecord | ConfigRecord] = {
            "request": ConfigRecord(dict((request or self.request(plan, state)).to_scalars())),
            "plan": ConfigRecord(
                {
                    "json": text,
                    "signature": signature or signing.sign(self._key, text.encode()),
                    "public_key": self.public_key,
                }
            ),
            "adapter": as_record(state),
        }
        if stage_start is not None:
            records["stage_start"] = as_record(stage_start)
        return RecordDict(records)  # type: ignore[arg-type]

    def message(self, plan: Plan, state: State, **options: object) -> RoundMessage:
        """What a site's ``answer`` gets."""
        return read_message(flower_message(self.content(plan, state, **options)))  # type: ignore[arg-type]


def flower_message(content: RecordDict, *, message_type: str = "train") -> Message:
    """A message as Flower delivers it, without a Flower runtime."""
    metadata = Metadata(
        run_id=1,
        message_id="1",
        src_node_id=0,
        dst_node_id=7,
        reply_to_message_id="",
        group_id="1",
        created_at=1.0,
        ttl=3600.0,
        message_type=message_type,
    )
    return Message(content, metadata=metadata)  # type: ignore[call-overload]
