"""The latent cache: the foundation's own numbers, resumable, and only for these tiles."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from crafts_core.foundation import Foundation, FoundationError, load
from crafts_core.tiles import TileRecord, TileStore, TileStoreError, TileStoreWriter, encode_tile
from crafts_core.tiles import latents as latents_module
from crafts_core.tiles.cache_files import cache_folder, check_cache
from crafts_core.tiles.latents import LatentCache


def make_store(path: Path, tile_px: int, *, num_tiles: int = 7, seed: int = 0) -> TileStore:
    rng = np.random.default_rng(seed)
    with TileStoreWriter(path, cohort="x", tile_px=tile_px, mpp=1.0) as writer:
        for row in range(num_tiles):
            tile = TileRecord(
                tile_id=f"t{row}", patient=f"p{row // 3}", case="c", slide="s", x=row, y=0,
                level0_width=1, level0_height=1, mpp=1.0, caption=f"tissue {row % 2}", label="",
                tissue_fraction=1, sharpness=1,
            )  # fmt: skip
            pixels = rng.integers(0, 256, (tile_px, tile_px, 3), dtype=np.uint8)
            writer.add(tile, encode_tile(pixels))
    return TileStore.open(path)


@pytest.fixture
def store(tmp_path: Path, foundation: Foundation) -> TileStore:
    return make_store(tmp_path / "store", foundation.manifest.tile_px)


def test_rows_are_what_the_foundation_computes(store: TileStore, foundation: Foundation) -> None:
    cache = LatentCache.build(store, foundation, batch_size=3)
    images = torch.from_numpy(store.read_images([5, 2])).permute(0, 3, 1, 2) / 127.5 - 1
    expected = foundation.generator.encode_images(images)
    embedded = foundation.aligner.embed_images(images)
    torch.testing.assert_close(cache.latents([5, 2]), expected, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(cache.tile_embeddings([5, 2]), embedded, atol=2e-3, rtol=0)
    assert cache.latent_shape == tuple(expected.shape[1:])


@pytest.mark.gpu
def test_a_gpu_fills_the_cache_with_the_same_numbers(
    store: TileStore, foundation: Foundation
) -> None:
    wanted = LatentCache.build(store, foundation)
    rows = list(range(7))
    latents, embeddings = wanted.latents(rows), wanted.tile_embeddings(rows)
    shutil.rmtree(cache_folder(store, foundation.manifest.hash))
    found = LatentCache.build(store, load(foundation.path, device="cuda"), batch_size=3)
    torch.testing.assert_close(found.latents(rows), latents, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(found.tile_embeddings(rows), embeddings, atol=5e-3, rtol=0)


def test_captions_are_what_the_foundation_computes(
    store: TileStore, foundation: Foundation
) -> None:
    cache = LatentCache.build(store, foundation)
    ids = store.caption_ids([0, 1])
    captions = [store.captions[place] for place in ids]
    text = foundation.generator.encode_captions(captions)
    torch.testing.assert_close(cache.text(ids), text, atol=5e-3, rtol=5e-3)
    embedded = foundation.aligner.embed_captions(captions)
    torch.testing.assert_close(cache.caption_embeddings(ids), embedded, atol=2e-3, rtol=0)


def test_interrupted_build_goes_on_where_it_was_committed(
    store: TileStore, foundation: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_module, "_BATCHES_PER_COMMIT", 1)
    LatentCache.build(store, foundation, batch_size=2)
    folder = cache_folder(store, foundation.manifest.hash)
    whole = {path.name: path.read_bytes() for path in folder.glob("*.f16")}
    for path in folder.iterdir():
        path.unlink()

    def stop_after_two(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LatentCache.build(store, foundation, batch_size=2, progress=stop_after_two)
    with pytest.raises(TileStoreError, match="no finished latent cache"):
        LatentCache.open(store, foundation.manifest.hash)
    # Whatever was half written after the last commit is cut away.
    with (folder / "latents.f16").open("ab") as file:
        file.write(b"torn")
    seen: list[int] = []
    LatentCache.build(
        store, foundation, batch_size=2, progress=lambda done, total: seen.append(done)
    )
    assert seen == [6, 7]
    assert {path.name: path.read_bytes() for path in folder.glob("*.f16")} == whole


def test_finished_cache_is_not_computed_again(
    store: TileStore, foundation: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    LatentCache.build(store, foundation)
    monkeypatch.setattr(TileStore, "read_images", None)
    LatentCache.build(store, foundation)


def test_torn_cache_is_refused_and_built_again(store: TileStore, foundation: Foundation) -> None:
    expected = LatentCache.build(store, foundation).latents([6]).clone()
    path = cache_folder(store, foundation.manifest.hash) / "latents.f16"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(TileStoreError, match="torn"):
        LatentCache.open(store, foundation.manifest.hash)
    assert torch.equal(LatentCache.build(store, foundation).latents([6]), expected)


def test_cache_of_other_tiles_is_refused(
    store: TileStore, foundation: Foundation, tmp_path: Path
) -> None:
    LatentCache.build(store, foundation)
    other = make_store(tmp_path / "other", store.tile_px, seed=1, num_tiles=8)
    (store.path / "latents").rename(other.path / "latents")
    with pytest.raises(TileStoreError, match="other tiles"):
        LatentCache.open(other, foundation.manifest.hash)
    assert len(LatentCache.build(other, foundation).latents(range(8))) == 8


def grow(store: TileStore, path: Path, *, without: str | None = None) -> TileStore:
    """The store's tiles without a patient's, and one tile more of a new patient."""
    rng = np.random.default_rng(9)
    with TileStoreWriter(path, cohort="x", tile_px=store.tile_px, mpp=1.0) as writer:
        rows = store.rows().to_pylist()
        for place, row in enumerate(rows):
            if row["patient"] != without:
                kept = {key: row[key] for key in TileRecord.__dataclass_fields__}
                writer.add(TileRecord(**kept), encode_tile(store.read_images([place])[0]))
        new = dict(rows[0], patient="new", tile_id="new", caption="tissue new")
        pixels = rng.integers(0, 256, (store.tile_px, store.tile_px, 3), dtype=np.uint8)
        writer.add(
            TileRecord(**{key: new[key] for key in TileRecord.__dataclass_fields__}),
            encode_tile(pixels),
        )
    return TileStore.open(path)


@pytest.mark.parametrize("views", [1, 3])
def test_only_new_tiles_are_computed(
    store: TileStore,
    foundation: Foundation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    views: int,
) -> None:
    """Keys name file and place of the pixels; both stores' are made equal for the shared tiles."""
    monkeypatch.setattr(
        latents_module,
        "tile_keys",
        lambda s: [f"{name:16}".encode() for name in s.index["tile_id"].to_pylist()],
    )
    before = LatentCache.build(store, foundation, views=views)
    wanted = [before.latents([row], [views - 1]) for row in (3, 4, 5, 6)]
    grown = grow(store, tmp_path / "grown", without="p0")
    (store.path / "latents").rename(grown.path / "latents")
    read: list[int] = []
    read_images = TileStore.read_images
    monkeypatch.setattr(
        TileStore, "read_images", lambda s, rows: (read.extend(rows), read_images(s, rows))[1]
    )
    cache = LatentCache.build(grown, foundation, views=views, batch_size=3)
    assert read == [4]
    for row, latents in enumerate(wanted):
        assert torch.equal(cache.latents([row], [views - 1]), latents)
    assert [path.name for path in (grown.path / "latents").iterdir()] == [
        cache_folder(grown, foundation.manifest.hash).name
    ], "rows of patients who left stay nowhere"
    fresh = foundation.generator.encode_images(
        torch.from_numpy(read_images(grown, [4])).permute(0, 3, 1, 2) / 127.5 - 1
    )
    torch.testing.assert_close(cache.latents([4]), fresh, atol=5e-3, rtol=5e-3)


def test_a_tile_cut_anew_is_computed_anew(store: TileStore, foundation: Foundation) -> None:
    keys = latents_module.tile_keys(store)
    assert len(set(keys)) == store.num_tiles
    other = make_store(store.path.with_name("other"), store.tile_px, seed=1)
    assert set(keys).isdisjoint(latents_module.tile_keys(other)), "same ids, other pixels"


def test_views_are_the_tile_itself_and_others(store: TileStore, foundation: Foundation) -> None:
    cache = LatentCache.build(store, foundation, views=3)
    plain = LatentCache.build(store, foundation, views=1)
    assert not torch.equal(cache.latents([2], [1]), cache.latents([2], [2]))
    torch.testing.assert_close(cache.latents([2, 6]), plain.latents([2, 6]), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["latents.f16", "keys.bin"])
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_damage_is_not_carried_on(
    store: TileStore, foundation: Foundation, tmp_path: Path, name: str, damage: str
) -> None:
    LatentCache.build(store, foundation)
    path = cache_folder(store, foundation.manifest.hash) / name
    if damage == "changed":
        path.write_bytes(path.read_bytes()[16:] + path.read_bytes()[:16])
    else:
        path.unlink()
    with pytest.raises(TileStoreError, match=r"was changed|torn"):
        check_cache(store, foundation.manifest.hash)
    grown = grow(store, tmp_path / "grown")
    (store.path / "latents").rename(grown.path / "latents")
    cache = LatentCache.build(grown, foundation)
    images = torch.from_numpy(grown.read_images(range(8))).permute(0, 3, 1, 2) / 127.5 - 1
    expected = foundation.generator.encode_images(images)
    torch.testing.assert_close(cache.latents(range(8)), expected, atol=5e-3, rtol=5e-3)
    check_cache(grown, foundation.manifest.hash)


def test_a_changed_row_is_found(store: TileStore, foundation: Foundation) -> None:
    LatentCache.build(store, foundation)
    check_cache(store, foundation.manifest.hash)
    path = cache_folder(store, foundation.manifest.hash) / "latents.f16"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(TileStoreError, match=r"latents.f16 was changed"):
        check_cache(store, foundation.manifest.hash)


def test_tiles_of_another_size_are_refused(foundation: Foundation, tmp_path: Path) -> None:
    small = make_store(tmp_path / "small", 8, num_tiles=1)
    with pytest.raises(TileStoreError, match="tiles of 8 px, the foundation takes"):
        LatentCache.build(small, foundation)


def test_overflow_of_half_precision_is_refused(store: TileStore, foundation: Foundation) -> None:
    class Overflowing:
        def encode_captions(self, captions: list[str]) -> Tensor:
            return foundation.generator.encode_captions(captions)

        def encode_images(self, images_BCHW: Tensor) -> Tensor:
            return foundation.generator.encode_images(images_BCHW) + 1e6

    broken = SimpleNamespace(
        **{f.name: getattr(foundation, f.name) for f in dataclasses.fields(foundation)}
    )
    broken.generator = Overflowing()
    with pytest.raises(FoundationError, match=r"NaN or infinity for latents of public tiles"):
        LatentCache.build(store, broken)  # type: ignore[arg-type]


def test_a_tile_that_cannot_be_read_is_nan_until_it_can(
    store: TileStore, foundation: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error: whether a cohort can be encoded would tell who is in it."""
    whole = LatentCache.build(store, foundation, views=2)
    expected = [whole.latents(range(7), [1] * 7), whole.tile_embeddings(range(7))]
    shutil.rmtree(store.path / "latents")
    shard = next(store.path.glob("shards/*.tar"))
    written, place = shard.read_bytes(), store.index["offset"][3].as_py()
    shard.write_bytes(written[:place] + b"?" * 16 + written[place + 16 :])

    damaged = LatentCache.build(store, foundation, views=2)
    found = [damaged.latents(range(7), [1] * 7), damaged.tile_embeddings(range(7))]
    assert damaged.unusable == (3,)
    others = [0, 1, 2, 4, 5, 6]
    for now, then in zip(found, expected, strict=True):
        assert now[3].isnan().all()
        assert torch.equal(now[others], then[others])

    shard.write_bytes(written)
    read: list[int] = []
    read_images = TileStore.read_images
    monkeypatch.setattr(
        TileStore, "read_images", lambda s, rows: (read.extend(rows), read_images(s, rows))[1]
    )
    mended = LatentCache.build(store, foundation, views=2)
    assert (read, mended.unusable) == ([3], ())
    assert torch.equal(mended.latents(range(7), [1] * 7), expected[0])


def test_a_build_goes_on_knowing_what_it_could_not_read(
    store: TileStore, foundation: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_module, "_BATCHES_PER_COMMIT", 1)
    shard = next(store.path.glob("shards/*.tar"))
    written, place = shard.read_bytes(), store.index["offset"][1].as_py()
    shard.write_bytes(written[:place] + b"?" * 16 + written[place + 16 :])

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LatentCache.build(store, foundation, batch_size=2, progress=stop)
    assert LatentCache.build(store, foundation, batch_size=2).unusable == (1,)


def test_a_caption_that_no_tokenizer_takes_makes_its_tiles_unusable(
    store: TileStore, foundation: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = type(foundation.generator).encode_captions

    def stumbles(self: object, captions: list[str]) -> Tensor:
        if "tissue 1" in captions:
            raise IndexError("no such token")
        return encode(self, captions)  # type: ignore[arg-type]

    expected = LatentCache.build(store, foundation).text(store.caption_ids([0]))
    shutil.rmtree(store.path / "latents")
    monkeypatch.setattr(type(foundation.generator), "encode_captions", stumbles)
    cache = LatentCache.build(store, foundation)
    assert cache.unusable == (1, 3, 5)
    assert cache.text(store.caption_ids([1])).isnan().all()
    assert torch.equal(cache.text(store.caption_ids([0])), expected)


def test_a_device_that_fails_is_not_taken_for_captions(
    store: TileStore, foundation: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails for public rows as well is no patient's: else everybody would count as zero."""
    encode, calls = type(foundation.aligner).embed_captions, []

    def dies(self: object, captions: list[str]) -> Tensor:
        calls.append(captions)
        if len(calls) > 1:  # after the check of public rows
            raise RuntimeError("the device is gone")
        return encode(self, captions)  # type: ignore[arg-type]

    monkeypatch.setattr(type(foundation.aligner), "embed_captions", dies)
    with pytest.raises(RuntimeError, match="gone"):
        LatentCache.build(store, foundation)


def test_a_row_is_the_same_whoever_else_is_there(
    store: TileStore, foundation: Foundation, tmp_path: Path
) -> None:
    """To the last bit: passes of one shape, so that a neighbour moves no rounding."""
    few = make_store(tmp_path / "few", store.tile_px, num_tiles=2)
    shapes = set()
    encode = foundation.generator.vae.encode

    def seen(images: Tensor) -> object:
        shapes.add(tuple(images.shape))
        return encode(images)

    foundation.generator.vae.encode = seen  # type: ignore[method-assign]
    try:
        caches = [LatentCache.build(each, foundation, batch_size=4) for each in (store, few)]
    finally:
        foundation.generator.vae.encode = encode  # type: ignore[method-assign]
    assert shapes == {(4, 3, 32, 32)}, "public tiles, whole passes and filled ones alike"
    for read in (LatentCache.latents, LatentCache.tile_embeddings):
        assert torch.equal(read(caches[0], [0, 1]), read(caches[1], [0, 1]))
    texts = [
        cache.text(each.caption_ids([0, 1]))
        for cache, each in zip(caches, (store, few), strict=True)
    ]
    assert torch.equal(*texts)


def test_rows_that_a_disk_cannot_give_are_nan(
    store: TileStore, foundation: Foundation, tmp_path: Path
) -> None:
    cache = LatentCache.build(store, foundation)
    wanted = cache.latents([0, 6])
    path = cache_folder(store, foundation.manifest.hash) / "latents.f16"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    found = cache.latents([0, 6])
    assert torch.equal(found[0], wanted[0])
    assert found[1].isnan().all()
    path.unlink()
    assert torch.equal(cache.latents([0]), wanted[:1]), "a site reads what it opened"
