"""What is said of a plan's targets without loading a model is what attaching them would say."""

import copy

import pytest

from crafts_core.adapters import Adapter
from crafts_core.control_net import num_halvings_of
from crafts_core.foundation import Foundation, embedded_path
from crafts_core.foundation_manifest import FoundationError
from crafts_core.plan import Plan
from crafts_core.plan_sections import AdapterConfig
from crafts_core.plan_targets import SUGGESTED, suggested_adapter, target_problems
from crafts_core.state import AdapterError
from crafts_simulations.scenario import load_scenario
from support.sites import control_values, plan_values


def attaches(plan: Plan, foundation: Foundation) -> bool:
    unet = copy.deepcopy(foundation.generator.denoiser)
    halvings = num_halvings_of(foundation.generator)
    try:
        Adapter.attach(unet, plan.adapter, plan.parts, num_halvings=halvings)
    except AdapterError:
        return False
    return True


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"targets": ("to_q", "conv1", "conv_in", "linear_1")}, None),
        ({"targets": ("to_q", "to_nothing")}, "adapter.targets: 'to_nothing' matches no"),
        ({"targets": ("o_q",)}, "adapter.targets: 'o_q' matches no"),
        ({"targets": ("norm1",)}, "adapter.targets: 'norm1' matches no"),
        ({"rank": 200}, "adapter.rank: 200 is more than the "),
        ({"control_targets": ("nowhere",)}, "adapter.control_targets: 'nowhere'"),
        ({"kind": "full", "targets": ("to_nothing",)}, None),
    ],
)
def test_headers_and_modules_say_the_same(foundation, control: bool, change, said) -> None:
    make = control_values if control else plan_values
    values = make(foundation.manifest.hash)
    plan = Plan.parse(values | {"adapter": {"kind": "lora", "rank": 2, **change}})
    problems = list(target_problems(plan, foundation.path))
    assert (problems == []) == attaches(plan, foundation)
    concerns = said is not None and (("control" in said) == control or "rank" in said)
    assert all(said is not None and said in text for text in problems)
    assert bool(problems) == concerns


def test_a_first_plan_trains_what_the_shipped_studies_do(foundation) -> None:
    """Where the denoiser has those layers; else what the schema says."""
    assert suggested_adapter(embedded_path())["targets"] == list(SUGGESTED)
    assert suggested_adapter(foundation.path) == {"kind": "lora"}
    for name in ("quickstart", "real-tiles", "many-small", "hundred"):
        shipped = load_scenario(name).adapter
        assert shipped.targets == SUGGESTED, name
        assert AdapterConfig.model_validate(suggested_adapter(embedded_path())) == shipped


def test_weights_that_are_none_are_an_error(foundation, tmp_path) -> None:
    plan = Plan.parse(plan_values(foundation.manifest.hash))
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    for content in (b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b'\x08\0\0\0\0\0\0\0{"a": 1}'):
        weights.write_bytes(content)
        with pytest.raises(FoundationError, match="cannot read"):
            list(target_problems(plan, tmp_path))
