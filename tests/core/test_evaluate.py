"""One whole evaluation on a tiny foundation, beside its baselines, whatever the salt."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crafts_core.evaluation.baselines import recolour, recolour_by_caption, reconstruct
from crafts_core.evaluation.colour import ColourMoments, in_colours_of
from crafts_core.evaluation.discrepancy import Discrepancy
from crafts_core.evaluation.encoder import load_encoder
from crafts_core.evaluation.evaluate import EvaluationConfig, Evaluator
from crafts_core.evaluation.evaluation_page import headline
from crafts_core.evaluation.figures import Evaluation
from crafts_core.evaluation.neighbours import Coverage, measure_coverage
from crafts_core.evaluation.orthogonal_encoder import OrthogonalEncoder
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.evaluation.resampling import Interval, halves
from crafts_core.evaluation.table import markdown, remarks
from crafts_core.foundation import Foundation
from support.foundations import tiny_foundation
from support.salts import resalted

SMALL = EvaluationConfig(num_images=32, num_inference_steps=2, num_bootstrap=20, batch_size=32)
CAPTIONS = ("lung tissue with glands", "colon tissue with sheets")


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return tiny_foundation(tmp_path_factory.mktemp("foundation") / "f", seed=1)


def tissue(seed: int, *, patients: int = 10, prefix: str = "p", side: int = 32) -> RealTiles:
    """Two tiles of each patient; the two captions differ in colour and in grain."""
    rng = np.random.default_rng(seed)
    count = 2 * patients
    kind = np.arange(count) % 2
    grain = rng.normal(0, 25, (count, side, side, 1))
    smooth = grain.reshape(count, side // 4, 4, side // 4, 4, 1).mean((2, 4)) * 4
    smooth = smooth.repeat(4, axis=1).repeat(4, axis=2)
    base = np.array([[200, 120, 170], [140, 110, 190]])[kind][:, None, None]
    images = base + np.where(kind[:, None, None, None] == 0, grain, smooth)
    return RealTiles(
        images_NHWC=images.clip(0, 255).astype(np.uint8),
        patients=np.repeat([f"{prefix}{place:02}" for place in range(patients)], 2),
        captions=[CAPTIONS[each] for each in kind],
    )


def measured(foundation: Foundation, held_out: RealTiles, training: RealTiles | None) -> Evaluation:
    evaluator = Evaluator(foundation, held_out, SMALL, OrthogonalEncoder(), training=training)
    return evaluator.compare(foundation.generator, replace(foundation.generator))


@pytest.fixture(scope="module")
def evaluation(foundation: Foundation) -> Evaluation:
    return measured(foundation, tissue(0), tissue(1, prefix="t"))


def test_a_generator_compared_with_itself_has_moved_nowhere(evaluation: Evaluation) -> None:
    before, after = evaluation.arm("foundation"), evaluation.arm("generator")
    assert before is not None
    assert after is not None
    assert before.model_copy(update={"name": "generator"}) == after
    assert evaluation.distance_generator == evaluation.distance_foundation == after.mmd2
    assert evaluation.n == after.n == 32
    assert evaluation.heldout_patients == 10
    assert evaluation.distance_foundation > evaluation.floor
    for name in ("mmd2", "colour", "structure"):
        low, high = getattr(after, f"{name}_interval")
        assert low <= high


def test_every_baseline_stands_beside_the_generator(evaluation: Evaluation) -> None:
    assert [arm.name for arm in evaluation.arms] == [
        "real", "reconstruction", "foundation", "recoloured", "recoloured_by_caption", "generator",
    ]  # fmt: skip
    real, mapped, plain = (evaluation.arm(name) for name in ("real", "recoloured", "foundation"))
    assert real is not None
    assert mapped is not None
    assert plain is not None
    assert (real.mmd2, real.frechet) == (evaluation.floor, None)
    assert mapped.colour < plain.colour / 2
    assert mapped.structure == pytest.approx(plain.structure, rel=0.3)


def test_judges_and_examiner_say_what_real_tiles_score(evaluation: Evaluation) -> None:
    pytest.importorskip("sklearn", reason="pip install 'crafts-federated[evaluation]'")
    real, generated = evaluation.arm("real"), evaluation.arm("generator")
    assert real is not None
    assert generated is not None
    assert evaluation.judged_classes == tuple(sorted(CAPTIONS))
    assert real.shape_agreement == real.colour_agreement == 1.0
    assert generated.shape_agreement is not None
    assert generated.shape_agreement <= 0.75
    assert evaluation.gate is not None
    assert evaluation.gate.is_passed
    assert real.drift == pytest.approx(0.0, abs=1e-9)
    assert evaluation.drift_generator is not None
    # Random weights draw the same whatever is asked: of two captions, one in two is right.
    assert evaluation.drift_generator == pytest.approx(0.5, abs=0.2)


def test_coverage_is_of_one_half_of_the_patients_by_the_other(
    foundation: Foundation, evaluation: Evaluation
) -> None:
    """A tile among its own patient's tiles, or a reconstruction beside its tile, says nothing."""
    pytest.importorskip("prdc", reason="pip install 'crafts-federated[evaluation]'")
    reference = Evaluator(foundation, tissue(0), SMALL, OrthogonalEncoder()).reference
    first, second = halves(reference.patient_M, np.random.default_rng(SMALL.seed))
    expected = measure_coverage(reference.features_MD[second], reference.features_MD[first])
    real = evaluation.arm("real")
    assert real is not None
    assert real.model_dump(include=set(Coverage.model_fields)) == expected.model_dump()
    generated = evaluation.arm("generator")
    assert generated is not None
    assert generated.coverage is not None


@pytest.mark.slow
def test_without_training_tiles_one_line_says_what_is_missing(foundation: Foundation) -> None:
    found = measured(foundation, tissue(0), None)
    assert found.arm("recoloured") is None
    assert found.arm("recoloured_by_caption") is None
    assert found.training_tiles is None
    (line,) = (line for line in found.not_measured if "training patients" in line)
    assert f"not measured: {line}" in remarks(found)


@pytest.mark.slow
def test_where_the_gate_fails_no_drift_is_given(foundation: Foundation) -> None:
    """The captions are dealt at random: nobody could tell which is right."""
    held_out = tissue(0, patients=12)
    captions = [CAPTIONS[each] for each in np.random.default_rng(1).integers(2, size=24)]
    found = measured(foundation, replace(held_out, captions=captions), None)
    assert found.gate is not None
    assert not found.gate.is_passed
    assert found.drift_foundation is None
    assert found.drift_generator is None
    assert any("drift: not measurable here" in line for line in found.not_measured)
    assert "drift D" not in markdown(found)


@pytest.mark.slow
def test_the_figures_are_the_same_whatever_the_sites_salt(
    foundation: Foundation, evaluation: Evaluation
) -> None:
    """Another salt: other pseudonyms, hence another order of patients and rows."""
    again = measured(foundation, resalted(tissue(0), 5), resalted(tissue(1, prefix="t"), 6))
    assert again == evaluation


def test_the_colour_map_is_fitted_to_training_tiles_and_moves_colour_alone() -> None:
    images, training = tissue(2).images_NHWC, tissue(3)
    pale = (images // 2 + 127).astype(np.uint8)
    target = ColourMoments.of(training.images_NHWC)
    assert ColourMoments.of(recolour(pale, training)).mean_C == pytest.approx(
        target.mean_C, abs=0.05
    )


def test_each_caption_has_a_colour_map_of_its_own() -> None:
    """A generator that stains both tissues alike: one map cannot part them, two can."""
    training = tissue(3)
    drawn = np.random.default_rng(5).integers(90, 190, size=(12, 32, 32, 3), dtype=np.uint8)
    captions = [CAPTIONS[row % 2] for row in range(10)] + ["bone"] * 2
    whole, each = recolour(drawn, training), recolour_by_caption(drawn, captions, training)
    for place, caption in enumerate(CAPTIONS):
        own = training.images_NHWC[np.array(training.captions) == caption]
        target = ColourMoments.of(own)
        found, plain = (
            ColourMoments.of(images[place:10:2]).mean_C - target.mean_C for images in (each, whole)
        )
        assert np.abs(found).max() < 0.03 < np.abs(plain).max()
    assert np.array_equal(each[10:], whole[10:])


@pytest.mark.slow
def test_the_structure_floor_is_matched_in_colour_as_images_are(foundation: Foundation) -> None:
    """Two patients of another stain: their tiles are mapped like everything else."""
    held_out = tissue(0)
    images = held_out.images_NHWC.copy()
    images[:4] = images[:4] // 2 + 127
    evaluator = Evaluator(
        foundation, replace(held_out, images_NHWC=images), SMALL, OrthogonalEncoder()
    )
    real = evaluator.compare(foundation.generator, foundation.generator).arm("real")
    assert real is not None
    values, rng = [], np.random.default_rng(SMALL.seed)
    ordered, reference = (
        replace(held_out, images_NHWC=images).in_order_of_content(),
        evaluator.reference,
    )
    for _ in range(20):
        first, second = halves(reference.patient_M, rng)
        target = ColourMoments.of(ordered.images_NHWC[second])
        x = reference.scale(evaluator.embed(in_colours_of(ordered.images_NHWC[first], target)))
        y = reference.features_MD[second]
        kernels = reference.kernel(x, x), reference.kernel(y, y), reference.kernel(x, y)
        patients = reference.patient_M[first], reference.patient_M[second]
        values.append(Discrepancy.of(*kernels, *patients).squared())
    assert real.structure == pytest.approx(np.mean(values))
    assert real.structure != real.mmd2


def test_a_reconstruction_is_compared_with_other_patients_tiles_only(
    foundation: Foundation,
) -> None:
    """Of a tile that is given back as it was, one's own tile would be infinitely near."""
    held_out = tissue(0, patients=12).in_order_of_content()
    evaluator = Evaluator(foundation, held_out, SMALL, OrthogonalEncoder())
    features = evaluator.embed(held_out.images_NHWC)
    same = evaluator.distances(held_out.images_NHWC, features, held_out.patients)
    assert same.mmd2 == pytest.approx(0.0, abs=1e-9)
    assert same.mmd2_interval == pytest.approx((0.0, 0.0), abs=1e-9)


def test_a_reconstruction_is_what_encoder_and_decoder_make_of_a_tile(
    foundation: Foundation,
) -> None:
    images = tissue(4, patients=20).images_NHWC
    found = reconstruct(foundation.generator, images)
    tile = torch.from_numpy(images[35:36]).permute(0, 3, 1, 2) / 127.5 - 1
    slow = foundation.generator.decode_latents(foundation.generator.encode_images(tile))
    pixels = ((slow[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    assert np.abs(found[35].astype(float) - pixels).max() <= 1
    assert found.shape == images.shape


def test_the_table_has_a_row_for_each_arm_and_no_empty_column(evaluation: Evaluation) -> None:
    lines = markdown(evaluation).splitlines()
    assert len(lines) == 2 + len(evaluation.arms)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "shared generator" in lines[-1]
    bare = evaluation.model_copy(
        update={"arms": tuple(arm.model_copy(update={"recall": None}) for arm in evaluation.arms)}
    )
    assert "recall" not in markdown(bare)


def test_copies_are_looked_for_where_there_are_tiles_that_were_trained_on(
    foundation: Foundation,
) -> None:
    """The search is that of the attacks; here only that both sides are asked, and as many."""
    evaluator = Evaluator(
        foundation, tissue(0), SMALL, OrthogonalEncoder(), training=tissue(1, prefix="t")
    )
    found = evaluator.memorisation(foundation.generator)
    assert found.interval.low <= found.share_nearer_members <= found.interval.high
    few = Evaluator(
        foundation, tissue(0), SMALL, OrthogonalEncoder(), training=tissue(1, patients=7)
    )
    with pytest.raises(ValueError, match="at least 8 patients on each side, got 7"):
        few.memorisation(foundation.generator)


def test_cmmd_is_told_of_a_clip_alone(foundation: Foundation, tmp_path: Path) -> None:
    clip = Path(shutil.copytree(foundation.path / "aligner", tmp_path / "clip"))
    prepared = {"size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (clip / "preprocessor_config.json").write_text(json.dumps(prepared))
    for encoder, is_told in ((load_encoder(str(clip)), True), (OrthogonalEncoder(), False)):
        found = Evaluator(foundation, tissue(0), SMALL, encoder).fidelity_of(tissue(5, prefix="x"))
        assert found.kid_interval is not None
        assert (found.cmmd is not None) == (found.cmmd_interval is not None) == is_told


@pytest.mark.parametrize(
    ("value", "interval", "floor", "told"),
    [
        (0.05, (-0.02, 0.06), (-0.10, 0.06), "are no farther from"),
        (0.05, (-0.02, 0.40), (-0.10, 0.06), "are not seen to be farther from"),
        (0.08, (-0.02, 0.40), (-0.10, 0.06), "are perhaps farther from"),
        (0.20, (0.07, 0.40), (-0.10, 0.06), "are farther from"),
    ],
)
def test_a_wide_interval_is_no_praise(
    evaluation: Evaluation,
    value: float,
    interval: tuple[float, float],
    floor: tuple[float, float],
    told: str,
) -> None:
    real, *between, subject = evaluation.arms
    arms = (
        real.model_copy(update={"structure_interval": Interval(*floor)}),
        *between,
        subject.model_copy(update={"structure": value, "structure_interval": Interval(*interval)}),
    )
    found = headline(evaluation.model_copy(update={"arms": arms}))
    assert f"In structure the images {told} the real tiles" in found
