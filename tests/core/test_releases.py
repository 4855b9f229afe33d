"""What a patient adds to a release, and what a noised sum means, against slow loops."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crafts_core.foundation import Foundation
from crafts_core.plan import Plan, PlanError
from crafts_core.releases import (
    ANCHORS,
    COLOUR,
    anchor_vector,
    class_anchors,
    colour_vector,
    decoded_anchors,
    decoded_colour,
    release_schema,
)
from crafts_core.state import factor_names, generator_state, weights_of
from support.sites import plan_values, without_privacy

CAPTIONS = ("tissue with glands", "tissue with sheets", "tissue with spindle cells")


def release_values(**stages: float | None) -> dict:
    """The small plan with releases before its stages, by name and noise."""
    values = plan_values("a" * 64)
    told = [{"name": name, "noise_multiplier": noise} for name, noise in stages.items()]
    study = {**values["study"], "captions": list(CAPTIONS)}
    return values | {"study": study, "stage": [*told, *values["stage"]]}


@given(seed=st.integers(0, 2**16), count=st.integers(0, 6))
def test_a_class_without_tiles_is_zero_and_others_are_means(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embedding_BD = torch.randn(count, 5, generator=generator)
    class_B = torch.randint(-1, 3, (count,), generator=generator)
    expected = torch.zeros(3, 5)
    for number in range(3):
        rows = [embedding_BD[row] for row in range(count) if int(class_B[row]) == number]
        if rows:
            expected[number] = torch.stack(rows).mean(dim=0)
    assert torch.allclose(anchor_vector(embedding_BD, class_B, 3), expected.flatten(), atol=1e-6)


def test_colour_is_one_and_the_patients_pixels_in_bounds() -> None:
    images = np.random.default_rng(0).integers(20, 250, (3, 8, 8, 3), dtype=np.uint8)
    density = -np.log((images.astype(np.float64) + 1) / 256).reshape(-1, 3)
    numbers = [*density.mean(axis=0) / 0.8 - 1, *(np.log(density.std(axis=0)) + 1.75) / 1.75]
    expected = np.array([1.0, *numbers]) / 1.6
    assert np.allclose(colour_vector(images).numpy(), expected, atol=1e-5)


def test_a_patient_without_tiles_adds_nothing() -> None:
    assert not colour_vector(np.zeros((0, 8, 8, 3), dtype=np.uint8)).any()
    assert not anchor_vector(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 3).any()


@pytest.mark.parametrize("value", [0, 255])
def test_colour_of_any_tile_is_finite_and_bounded(value: int) -> None:
    vector = colour_vector(np.full((2, 8, 8, 3), value, dtype=np.uint8))
    assert vector.isfinite().all()
    assert vector.norm() <= math.sqrt(7) / 1.6 + 1e-6


def test_an_anchor_in_its_noise_is_the_captions_text() -> None:
    text_KD = torch.nn.functional.normalize(torch.arange(8.0).reshape(2, 4) + 1, dim=1)
    mean_KD = torch.tensor([[0.3, 0.0, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0]])
    told = decoded_anchors(mean_KD, 0.1, text_KD)  # noise alone is 0.2 long
    assert told.is_public == (False, True)
    assert told.signal == pytest.approx((1.25, 0.0), abs=1e-6)
    assert torch.equal(told.values[0], torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert torch.equal(told.values[1], text_KD[1])


def test_noise_alone_gives_no_anchor() -> None:
    noise_KD = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    assert all(decoded_anchors(noise_KD, 1.0, torch.ones(100, 64)).is_public)


def test_colour_comes_back_whatever_number_of_patients_was_declared(
    foundation: Foundation,
) -> None:
    images = np.random.default_rng(0).integers(20, 250, (2, 8, 8, 3), dtype=np.uint8)
    told = decoded_colour(0.7 * colour_vector(images)[None], 1e-3, foundation)
    density = -np.log((images.astype(np.float64) + 1) / 256).reshape(-1, 3)
    expected = [1.0, *density.mean(axis=0), *np.log(density.std(axis=0))]
    assert told.is_public == (False,)
    assert told.values[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_colour_in_its_noise_is_the_probes(foundation: Foundation) -> None:
    pixels = foundation.probe.tiles_NCHW.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    told = decoded_colour(torch.full((1, 7), 0.01), 0.01, foundation)
    density = -np.log((pixels.astype(np.float64) + 1) / 256)
    assert told.is_public == (True,)
    assert told.values[0, 1:4].tolist() == pytest.approx(density.mean(axis=0).tolist(), abs=1e-4)


def test_released_anchors_go_before_the_text(foundation: Foundation) -> None:
    text_KD = foundation.aligner.embed_captions(list(CAPTIONS))
    released = 2.0 * text_KD.flip(0).cpu()
    assert torch.equal(class_anchors(foundation, CAPTIONS, {}), text_KD)
    found = class_anchors(foundation, CAPTIONS, {ANCHORS: released})
    assert torch.allclose(found, text_KD.flip(0), atol=1e-6)


def test_what_is_told_travels_and_is_no_weight(foundation: Foundation) -> None:
    plan = Plan.parse(release_values(anchors=4.0, colour=5.0))
    state = release_schema(plan, foundation) | {"conv.second": torch.ones(1)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        ANCHORS: (3, foundation.aligner.embedding_dim),
        COLOUR: (1, 7),
        "conv.second": (1,),
    }
    assert list(generator_state(state)) == list(weights_of(state)) == ["conv.second"]
    assert factor_names(state, "anchors") == [ANCHORS]


def test_releases_are_the_first_rounds_and_leave_the_factors_turns_alone() -> None:
    with_one = Plan.parse(release_values(anchors=4.0))
    plain = Plan.parse(plan_values("a" * 64))
    first, *others = with_one.rounds()
    assert (first.stage.name, first.factor) == ("anchors", "anchors")
    assert [each.factor for each in others] == [each.factor for each in plain.rounds()]
    assert (with_one.num_rounds, with_one.total_steps) == (5, plain.total_steps)
    assert with_one.parts == plain.parts


def test_a_release_takes_every_patient_once_whatever_the_plan_says() -> None:
    plan = Plan.parse(release_values(anchors=4.0))
    privacy = plan.privacy_of(plan.stage[0])
    assert (privacy.sample_rate, privacy.max_grad_norm, privacy.clipping) == (1.0, 1.0, "flat")
    assert plan.privacy_of(plan.stage[1]) == plan.privacy


def test_a_plan_comes_back_from_its_own_json() -> None:
    plan = Plan.parse(release_values(anchors=4.0, colour=5.0))
    assert Plan.parse(json.loads(plan.to_json())).hash == plan.hash
    assert plan.hash != Plan.parse(release_values(anchors=4.0, colour=6.0)).hash


def anchors(**changes: object) -> dict:
    return {"name": "anchors", "noise_multiplier": 4.0} | changes


@pytest.mark.parametrize(
    ("stages", "what"),
    [
        ([anchors(), anchors()], "each once"),
        ([anchors(), anchors(name="colour"), anchors()], "each once"),
        ([anchors(rounds=2)], "no other key"),
        ([anchors(local_steps=2)], "no other key"),
        ([anchors(learning_rate=2.0)], "no other key"),
        ([anchors(optimizer="adam")], "no other key"),
        ([anchors(noise_multiplier=None)], "need noise_multiplier"),
        ([anchors(noise_multiplier=0.0)], "greater than or equal to 0.1"),
        ([anchors(name="pretraining", rounds=1, local_steps=1, learning_rate=1)], "belongs to"),
    ],
)
def test_no_plan_makes_a_release_into_something_else(stages: list[dict], what: str) -> None:
    values = release_values()
    with pytest.raises(PlanError, match=what):
        Plan.parse(values | {"stage": [*stages, *values["stage"]]})


@pytest.mark.parametrize(
    ("section", "changes", "what"),
    [
        ("study", {"captions": []}, "need captions"),
        ("study", {"captions": ["one"]}, "two or more"),
        ("study", {"captions": ["one", "one"]}, "each once"),
        ("study", {"captions": [f"{number}" for number in range(101)]}, "at most 100"),
    ],
)
def test_absurd_classes_are_refused(section: str, changes: dict, what: str) -> None:
    values = release_values(anchors=4.0)
    with pytest.raises(PlanError, match=what):
        Plan.parse(values | {section: {**values[section], **changes}})


def test_releases_come_before_training_and_not_alone() -> None:
    values = release_values()
    with pytest.raises(PlanError, match="come before all others"):
        Plan.parse(values | {"stage": [*values["stage"], anchors()]})
    with pytest.raises(PlanError, match="a stage that trains"):
        Plan.parse(values | {"stage": [anchors()]})


def test_without_privacy_a_release_has_no_noise() -> None:
    plan = Plan.parse(without_privacy(release_values(anchors=None)))
    assert plan.releases[0].noise_multiplier is None
    with pytest.raises(PlanError, match="have none otherwise"):
        Plan.parse(without_privacy(release_values(anchors=4.0)))


def test_the_contrast_is_of_stage_alignment_with_captions() -> None:
    values = release_values()
    pretraining, alignment = values["stage"]
    contrast = {"alignment_loss": "contrast"}
    assert Plan.parse(values | {"stage": [pretraining, alignment | contrast]}).stage[1].lambda_align
    with pytest.raises(PlanError, match="lambda_align above 0"):
        Plan.parse(values | {"stage": [pretraining | contrast]})
    study = plan_values("a" * 64)["study"]
    with pytest.raises(PlanError, match="need captions"):
        Plan.parse(values | {"study": study, "stage": [alignment | contrast]})
