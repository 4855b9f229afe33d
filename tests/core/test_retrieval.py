"""What is picked of a public pool, in which colours, and what training on it does; slow loops."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from crafts_core.adapters import Adapter
from crafts_core.evaluation.baselines import in_their_place
from crafts_core.evaluation.colour import colour_statistics
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.exchange import global_norm
from crafts_core.plan import Plan, PlanError
from crafts_core.public_pool import PoolError, PublicPool, open_pool, read_pool, table_fingerprint
from crafts_core.releases import ANCHORS, COLOUR, release_schema
from crafts_core.retrieval import (
    PublicLoss,
    colour_of_cases,
    nearest,
    picked_tiles,
    retrieve,
    trained_on,
    with_rows_as_before,
)
from crafts_core.retrieval_record import Retrieval
from crafts_core.stages.schedule import NoiseSchedule
from crafts_core.starting_point import initial_state
from crafts_core.state import FIRST, SECOND, State, add_delta, factor_names, generator_state
from crafts_core.study.lookalikes import alike_to, thumbnails_of
from support.open_tiles import open_table
from support.sites import plan_values

CAPTIONS = ("tissue with glands", "tissue with sheets", "tissue with spindle cells")
TOLD = (0.5, 0.9, 0.4, -1.2, -1.0, -1.6)
STEPS = 3


def retrieval_values(foundation_hash: str, **stage: object) -> dict:
    values = plan_values(foundation_hash)
    told = [{"name": name, "noise_multiplier": 8.0} for name in ("anchors", "colour")]
    picks = {"name": "retrieval", "learning_rate": 0.01, "public_steps": STEPS} | stage
    study = {**values["study"], "captions": list(CAPTIONS), "pool": "b" * 64}
    return values | {"study": study, "stage": [*told, picks, *values["stage"]]}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> PublicPool:
    return read_pool(open_table(tmp_path_factory.mktemp("open")), tile_px=32, mpp=1.0)


@pytest.fixture
def plan(foundation) -> Plan:
    return Plan.parse(retrieval_values(foundation.manifest.hash))


@pytest.fixture
def state(foundation, plan: Plan, pool: PublicPool) -> State:
    """As if releases had ended: the anchors are embeddings of tiles, the colour is any."""
    start = initial_state(foundation, plan.adapter, plan.study.seed)
    tiles = torch.from_numpy(np.array(pool.images_NHWC[[0, 6, 12]])).permute(0, 3, 1, 2)
    told = torch.tensor([[1.0, *TOLD]])
    return start | {ANCHORS: foundation.aligner.embed_images(tiles), COLOUR: told}


def test_a_pool_is_the_tables_tiles_but_for_held_out_rows(pool: PublicPool) -> None:
    assert len(pool) == 16, "four cases of four tiles; the fifth is held out"
    assert [each.file for each in pool.sources] == [f"images/{n}.png" for n in range(4)]
    assert {each.licence for each in pool.sources} == {"CC0", "CC BY 4.0"}
    assert pool.cases().tolist()[:5] == ["case-0"] * 4 + ["case-1"]


def test_a_pool_that_is_kept_is_the_same_or_refused(pool: PublicPool, tmp_path: Path) -> None:
    folder = pool.keep(tmp_path)
    again = open_pool(tmp_path, pool.hash)
    assert again.hash == pool.hash
    assert np.array_equal(again.images_NHWC, pool.images_NHWC)
    pixels = bytearray((folder / "tiles.npy").read_bytes())
    pixels[-1] ^= 1
    (folder / "tiles.npy").write_bytes(bytes(pixels))
    with pytest.raises(PoolError, match="not what it was"):
        open_pool(tmp_path, pool.hash)
    with pytest.raises(PoolError, match="pool add TABLE"):
        open_pool(tmp_path, "c" * 64)
    (folder / "pool.json").write_text("{}")
    with pytest.raises(PoolError, match="cannot read"):
        open_pool(tmp_path, pool.hash)


def test_what_is_said_of_tiles_is_in_the_hash(pool: PublicPool) -> None:
    other = [pool.sources[0].model_copy(update={"licence": "none"}), *pool.sources[1:]]
    assert PublicPool(pool.images_NHWC, pool.source_N, tuple(other), pool.mpp).hash != pool.hash


def test_a_table_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="no table of open tiles"):
        read_pool(tmp_path, tile_px=32, mpp=1.0)
    table = open_table(tmp_path)
    before = table_fingerprint(table)
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    assert table_fingerprint(table) != before
    with pytest.raises(PoolError, match="cannot read"):
        read_pool(table, tile_px=32, mpp=1.0)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    is_public=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    most=st.integers(1, 6),
)
def test_the_nearest_of_an_anchors_own_tiles(
    seed: int, is_public: tuple[bool, ...], most: int
) -> None:
    """Against a loop over tiles and captions."""
    source = torch.Generator().manual_seed(seed)
    tiles = functional.normalize(torch.randn(12, 5, generator=source), dim=1)
    anchors = functional.normalize(torch.randn(3, 5, generator=source), dim=1)
    expected: list[list[tuple[float, int]]] = [[], [], []]
    for row in range(12):
        marks = {k: float(tiles[row] @ anchors[k]) for k in range(3) if not is_public[k]}
        if marks:
            best = max(marks, key=marks.__getitem__)
            expected[best].append((-marks[best], row))
    wanted = tuple(tuple(row for _, row in sorted(each)[:most]) for each in expected)
    assert nearest(tiles, anchors, is_public, most=most) == wanted


def test_picked_tiles_have_the_colours_that_were_told(
    pool: PublicPool, foundation, plan: Plan, state: State
) -> None:
    record = retrieve(pool, foundation, plan, state, (False, False, True))
    picked = picked_tiles(pool, record)
    assert record.pool == pool.hash
    assert record.tiles[2] == (), "no patient stands for it"
    assert len(picked) == record.num_tiles > 0
    assert set(picked.captions) == {CAPTIONS[k] for k in range(3) if record.tiles[k]}
    rows = [row for tiles in record.tiles for row in tiles]
    assert [record.sources[k].case for ks in record.images for k in ks] == list(pool.cases()[rows])
    told = np.mean(
        [
            colour_statistics(picked.images_NHWC[picked.patients == case].reshape(1, -1, 32, 3))[0]
            for case in sorted(set(picked.patients.tolist()))
        ],
        axis=0,
    )
    assert np.allclose(told, TOLD, atol=0.03), "but for what a pixel rounds and cannot be"
    assert np.allclose(told, colour_of_cases(picked.images_NHWC, picked.patients))


def test_captions_without_patients_pick_nothing_and_train_nothing(
    pool: PublicPool, foundation, plan: Plan, state: State, tmp_path: Path
) -> None:
    record = retrieve(pool, foundation, plan, state, (True, True, True))
    assert record.num_tiles == 0
    assert "no tile for 3 captions" in record.in_words
    after = trained_on(picked_tiles(pool, record), foundation, plan, state, tmp_path / "state")
    assert all(torch.equal(after[name], state[name]) for name in state)


def some_tiles(pool: PublicPool) -> RealTiles:
    rows = np.arange(6)
    return RealTiles(
        images_NHWC=np.asarray(pool.images_NHWC[rows]),
        patients=pool.cases()[rows],
        captions=[CAPTIONS[row % 2] for row in rows],
    )


class StoppedError(Exception):
    pass


def test_public_steps_are_the_same_wherever_they_were_cut(
    pool: PublicPool, foundation, plan: Plan, state: State, tmp_path: Path, monkeypatch
) -> None:
    """Killed after every step, with its state written each time."""
    picked = some_tiles(pool)
    whole = trained_on(picked, foundation, plan, state, tmp_path / "whole")
    calls: list[int] = []

    def stop(_what: str, done: int, _total: int) -> None:
        calls.append(done)
        if len(calls) % 2:
            raise StoppedError

    monkeypatch.setattr(
        "crafts_core.foundation_build.training.time.monotonic", iter_time().__next__
    )
    for _ in range(2 * STEPS):
        try:
            cut = trained_on(picked, foundation, plan, state, tmp_path / "cut", stop)
            break
        except StoppedError:
            continue
    assert len(calls) > STEPS, "it was cut"
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    moved = [name for name in generator_state(whole) if not torch.equal(whole[name], state[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"first", "second"}
    assert torch.equal(whole[ANCHORS], state[ANCHORS])


def iter_time():
    """Hours between any two looks at the clock, so that every step is written down."""
    now = 0.0
    while True:
        now += 3600.0
        yield now


def test_rows_as_before_change_no_product() -> None:
    source = torch.Generator().manual_seed(2)
    before = {
        "a" + FIRST: torch.randn(2, 3, 3, 3, generator=source),
        "a" + SECOND: torch.zeros(5, 2, 1, 1),
    }
    after = {name: torch.randn(tensor.shape, generator=source) for name, tensor in before.items()}
    after["a" + FIRST][1] = 0.0
    found = with_rows_as_before(after, before)

    def product(state: State) -> torch.Tensor:
        return state["a" + SECOND].flatten(1) @ state["a" + FIRST].flatten(1)

    assert torch.allclose(product(found), product(after), atol=1e-5)
    lengths = [each["a" + FIRST].flatten(1).norm(dim=1) for each in (found, before)]
    assert torch.allclose(lengths[0][0], lengths[1][0])
    assert lengths[0][1] == 0, "a row of nothing stays so"


@pytest.mark.slow
def test_public_steps_lower_the_loss_on_what_was_picked(
    pool: PublicPool, foundation, state: State, tmp_path: Path
) -> None:
    plan = Plan.parse(
        retrieval_values(foundation.manifest.hash, public_steps=12, learning_rate=0.05)
    )
    picked = some_tiles(pool)

    def loss(of: State) -> float:
        public = PublicLoss(picked, foundation, plan, state)
        public.adapter.load_state(generator_state(of))
        rng = np.random.default_rng(5)
        with torch.no_grad():
            return float(np.mean([float(public.of_rows(np.arange(6), rng)) for _ in range(8)]))

    assert loss(trained_on(picked, foundation, plan, state, tmp_path / "s")) < 0.97 * loss(state)


@pytest.mark.slow
def test_with_alignment_picked_tiles_are_drawn_nearer_to_what_was_told_of_their_caption(
    pool: PublicPool, foundation, state: State, tmp_path: Path
) -> None:
    """By the contrast with the anchors told, each tile's written out; the text plays no part."""
    picked = some_tiles(pool)
    anchors_KD = functional.normalize(state[ANCHORS], dim=1)
    config = Plan.parse(retrieval_values(foundation.manifest.hash)).adapter
    steps = {"public_steps": 30, "learning_rate": 0.05}

    def contrast(of: State) -> np.ndarray:
        """Of either caption's tiles."""
        adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), config)
        adapter.load_state(generator_state(of))
        schedule, generator = NoiseSchedule.of(foundation.generator), foundation.generator
        tiles = torch.from_numpy(picked.images_NHWC).permute(0, 3, 1, 2) / 127.5 - 1.0
        latents, text = generator.encode_images(tiles), generator.encode_captions(picked.captions)
        source, marks = torch.Generator().manual_seed(3), []
        for _ in range(8):
            noise = torch.randn(latents.shape, generator=source)
            when = torch.randint(schedule.num_timesteps, (len(latents),), generator=source)
            noisy = schedule.noisy(latents, noise, when)
            with torch.no_grad():
                seen = schedule.denoised(noisy, adapter.predict(noisy, when, text), when)
                likeness = foundation.latent_aligner(seen) @ anchors_KD.T / 0.2
            for row, caption in enumerate(picked.captions):
                own = likeness[row, CAPTIONS.index(caption)]
                kept = float(schedule.alphas_cumprod_T[when[row]])
                marks.append(kept * float(likeness[row].logsumexp(0) - own))
        return np.reshape(marks, (-1, 2)).mean(axis=0)

    def aligned(weight: float, tiles: RealTiles) -> np.ndarray:
        stage = steps | {"lambda_align": weight}
        plan = Plan.parse(retrieval_values(foundation.manifest.hash, **stage))
        name = tmp_path / f"{weight} {tiles.captions[0]}"
        return contrast(trained_on(tiles, foundation, plan, state, name))

    swapped = replace(picked, captions=[*picked.captions[1:], picked.captions[0]])
    found = aligned(20.0, picked)
    assert (found < aligned(0.0, picked) - 0.02).all()
    assert (found < aligned(20.0, swapped) - 0.02).all(), "whose tile is whose decides"


@pytest.mark.parametrize("factor", ["first", "second"])
def test_the_gradient_of_the_public_loss_is_its_slope(
    pool: PublicPool, foundation, state: State, factor: str
) -> None:
    """By a difference, over tiles of more than one pass; draws are the seed's."""
    plan = Plan.parse(retrieval_values(foundation.manifest.hash, lambda_align=3.0))
    six = some_tiles(pool)
    twenty = RealTiles(
        images_NHWC=np.concatenate([six.images_NHWC] * 4)[:20],
        patients=np.concatenate([six.patients] * 4)[:20],
        captions=(six.captions * 4)[:20],
    )
    public = PublicLoss(twenty, foundation, plan, state)
    here = add_delta(state, {name: torch.full_like(state[name], 0.05) for name in state}, 1.0)
    slope = public.gradient(here, factor, num_tiles=20, seed=4)
    assert sorted(slope) == factor_names(generator_state(here), factor)

    def loss(at: State) -> float:
        public.adapter.load_state(generator_state(at))
        rng = np.random.default_rng(4)
        rows = rng.choice(20, 20, replace=False)
        with torch.no_grad():
            parts = [(part, public.of_rows(part, rng)) for part in (rows[:16], rows[16:])]
        return sum(float(mean) * len(part) / 20 for part, mean in parts)

    norm = global_norm(slope)
    ahead, behind = (loss(add_delta(here, slope, way * 3e-3 / norm)) for way in (1, -1))
    assert (ahead - behind) / 6e-3 == pytest.approx(norm, rel=3e-2)
    again, other = (public.gradient(here, factor, num_tiles=20, seed=seed) for seed in (4, 5))
    assert all(torch.equal(slope[name], again[name]) for name in slope)
    assert not all(torch.equal(slope[name], other[name]) for name in slope)


def test_retrieved_tiles_stand_where_their_caption_was_asked() -> None:
    drawn = np.full((5, 4, 4, 3), 9, dtype=np.uint8)
    tiles = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 6, 6, 3), np.uint8)
    picked = RealTiles(
        images_NHWC=tiles,
        patients=np.array(["a", "b", "c"]),
        captions=[*CAPTIONS[:1] * 2, CAPTIONS[1]],
    )
    asked = [f"{CAPTIONS[0]}, dense", CAPTIONS[1], CAPTIONS[0], "other tissue", CAPTIONS[0]]
    found = in_their_place(drawn, asked, picked)
    assert found[:, 0, 0, 0].tolist() == [0, 2, 1, 9, 0]
    assert found.shape == drawn.shape
    assert (drawn == 9).all()


def test_tiles_that_are_anothers_are_known_turned_and_recoloured() -> None:
    rng = np.random.default_rng(1)
    grain = rng.integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    images = np.kron(grain, np.ones((1, 4, 4, 1), np.uint8))
    taken = np.rot90(images[7:9], 1, axes=(1, 2))[:, :, ::-1] // 2 + 20
    others = np.concatenate([images[20:25][:, ::-1, ::-1], taken])
    assert alike_to(thumbnails_of(images), thumbnails_of(others)).tolist() == [7, 8, *range(20, 25)]
    assert not len(alike_to(thumbnails_of(images[:5]), thumbnails_of(others)))


def test_a_record_is_a_table_of_harmless_lines(pool: PublicPool) -> None:
    evil = pool.sources[0].model_copy(update={"file": "a\tb\nc.png"})
    record = Retrieval(
        pool=pool.hash, num_pool_tiles=16, captions=CAPTIONS, tiles=((1, 0), (5,), ()),
        images=((0, 0), (1,), ()), sources=(evil, pool.sources[1]),
        scale=(1.0, 1.0, 1.0), shift=(0.0, 0.0, 0.0),
    )  # fmt: skip
    lines = record.as_table().splitlines()
    assert len(lines) == 3
    assert all(line.count("\t") == 6 for line in lines)
    assert lines[1].startswith("tissue with glands\t2\ta\\tb\\nc.png\t")
    assert Retrieval.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ((0, 2, 3), "right after stages anchors and colour"),
        ((0, 1, 3, 2), "right after stages anchors and colour"),
        ((0, 1, 2, 2, 3), "comes once"),
        ((0, 1, 2), "expected a stage that trains"),
        ((0, 1, 3), "without that stage there is none"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages: tuple[int, ...], complaint: str) -> None:
    values = retrieval_values("a" * 64)
    values["stage"] = [values["stage"][place] for place in stages]
    with pytest.raises(PlanError, match=complaint):
        Plan.parse(values)


@pytest.mark.parametrize("key", ["rounds", "local_steps", "caption_dropout", "optimizer"])
def test_retrieval_takes_its_own_keys_alone(key: str) -> None:
    value = {"optimizer": "adam", "caption_dropout": 0.5}.get(key, 2)
    with pytest.raises(PlanError, match="takes learning_rate, tiles_per_caption, public_steps"):
        Plan.parse(retrieval_values("a" * 64, **{key: value}))


def test_it_aligns_by_the_contrast_and_a_plan_that_does_not_is_the_plan_it_was() -> None:
    aligned = Plan.parse(retrieval_values("a" * 64, lambda_align=0.1))
    (stage,) = (each for each in aligned.stage if each.is_retrieval)
    assert stage.alignment_loss == "contrast"
    assert Plan.parse(aligned.model_dump(mode="json")) == aligned
    plain, zero = (
        Plan.parse(retrieval_values("a" * 64, **keys)) for keys in ({}, {"lambda_align": 0.0})
    )
    assert plain.hash == zero.hash != aligned.hash
    assert "lambda_align" not in plain.model_dump(mode="json")["stage"][2]
    for keys in ({"lambda_align": 0.1, "alignment_loss": "correlation"}, {"lambda_drift": 1.0}):
        with pytest.raises(PlanError, match="retrieval"):
            Plan.parse(retrieval_values("a" * 64, **keys))


def test_its_keys_are_no_other_stages_and_a_pool_is_needed() -> None:
    values = retrieval_values("a" * 64)
    values["stage"][3] = values["stage"][3] | {"public_steps": 7}
    with pytest.raises(PlanError, match="belong to stage retrieval only"):
        Plan.parse(values)
    values = retrieval_values("a" * 64)
    del values["study"]["pool"]
    with pytest.raises(PlanError, match=r"needs pool in \[study\]"):
        Plan.parse(values)


def test_no_step_of_a_site_is_more_and_none_is_cheaper() -> None:
    """The plan without it has as many private steps, trained by the same factors in turn."""
    with_it = Plan.parse(retrieval_values("a" * 64))
    values = retrieval_values("a" * 64)
    del values["study"]["pool"], values["stage"][2]
    without = Plan.parse(values)
    assert with_it.total_steps == without.total_steps
    assert with_it.num_rounds == without.num_rounds + 1
    assert [each.factor for each in with_it.rounds()][2] == "both"
    assert [each.factor for each in with_it.rounds()][3:] == [
        each.factor for each in without.rounds()
    ][2:]
    assert Plan.parse(with_it.model_dump(mode="json")).hash == with_it.hash != without.hash
    assert set(release_schema_names(with_it)) == set(release_schema_names(without))


def release_schema_names(plan: Plan) -> list[str]:
    class Aligner:
        embedding_dim = 4

    class Public:
        aligner = Aligner()

    return list(release_schema(plan, Public()))  # type: ignore[arg-type]
