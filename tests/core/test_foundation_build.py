"""The foundation's build, small enough to run: whole, resumable, and refused when mixed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crafts_core.foundation import embedded_path, load, verify
from crafts_core.foundation_build import BuildConfig, build, read_table
from crafts_core.foundation_build.aligner_training import train_tokenizer
from crafts_core.foundation_build.assembly import _claim
from crafts_core.foundation_build.decoder_training import CRITIC_SHARE, balance
from crafts_core.foundation_build.diffusion_training import (
    new_scheduler,
    spread_timesteps,
    timestep_shares,
)
from crafts_core.foundation_build.measured import measure, steady_phrases
from crafts_core.foundation_build.public_tiles import compose, drawn_types, probe_of, public_tiles
from crafts_core.foundation_build.tiles_table import TableRow, read_open_tiles
from crafts_core.foundation_build.training import Recipe, train
from crafts_core.foundation_build.views import other_stains
from crafts_core.foundation_manifest import FoundationError
from crafts_core.pixels import to_pixels, to_uint8
from crafts_core.procedural import phenotype, random_stain, render_region
from crafts_core.progress import Progress
from crafts_core.sampling import sample_images
from crafts_core.vocabulary import (
    CANCER_TYPES,
    cancer_type,
    compose_caption,
    corpus,
    sample_attributes,
)

SMALL = BuildConfig(
    tile_px=64,
    num_regions=16,
    captions_per_tile=3,
    num_probe=4,
    open_probe=True,
    structure_batch=4,
    structure_steps=2,
    text_width=32,
    vision_width=32,
    embedding_dim=16,
    aligner_batch=16,
    aligner_steps=2,
    vae_channels=(8, 16, 16),
    vae_batch=4,
    vae_steps=2,
    decoder_steps=2,
    latent_channels=4,
    vae_crop_px=32,
    unet_channels=(32, 32, 64, 64),
    unet_batch=4,
    unet_steps=2,
    unet_views=2,
    latent_aligner_steps=2,
)
HEADER = "file,case,organ,type,caption,mpp,licence,source,split"


def write_table(folder: Path, *lines: str, header: str = HEADER) -> Path:
    path = folder / "tiles.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def write_tile(path: Path, *, side_px: int = 96, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    look = phenotype(sample_attributes(rng, cancer_type("COAD")))
    region = render_region(
        rng, width_px=side_px, height_px=side_px, mpp=1.0, phenotype=look, stain=random_stain(rng)
    )
    Image.fromarray(region.image).save(path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[TableRow, ...]:
    folder = tmp_path_factory.mktemp("open")
    lines = []
    kinds = [
        ("colon", "COAD", "build"),
        ("colon", "COAD", "build"),
        ("colon", "COAD", "held-out"),
        ("liver", "normal", "build"),
        ("liver", "", "held-out"),
    ]
    for index, (organ, code, split) in enumerate(kinds):
        write_tile(folder / f"{index}.png", side_px=160, seed=index)
        lines.append(
            f"{index}.png,case-{index},{organ},{code},steatosis,0.9,CC BY 4.0,An atlas,{split}"
        )
    return read_table(write_table(folder, *lines))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def built(work: Path, rows: tuple[TableRow, ...]) -> Path:
    build(work / "foundation", work=work / "parts", rows=rows, config=SMALL, name="open")
    return work / "foundation"


@pytest.mark.slow
def test_what_is_built_verifies_loads_and_draws(built: Path) -> None:
    foundation = load(built)
    assert foundation.manifest.latent_shape == (4, 16, 16)
    assert len(foundation.probe.captions) == 4
    images = sample_images(foundation.generator, ["H&E, sarcoma"], num_inference_steps=1)
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_the_card_credits_every_source_and_says_what_each_type_was_built_from(built: Path) -> None:
    card = (built / "README.md").read_text()
    assert "| An atlas | CC BY 4.0 | 5 |" in card, "the probe shows held-out cases, too"
    assert "| COAD colon adenocarcinoma | 2 open cases |" in card
    assert "| UVM uveal melanoma | drawings |" in card
    assert "2 cases were held out" in card


def test_no_open_tile_is_in_a_foundation_unless_asked_for(rows: tuple[TableRow, ...]) -> None:
    def seen_in(table: tuple[TableRow, ...], *, open_probe: bool) -> torch.Tensor:
        config = SMALL.model_copy(update={"open_probe": open_probe})
        return probe_of(table, config).tiles_NCHW

    assert torch.equal(seen_in(rows, open_probe=False), seen_in(
        tuple(row for row in rows if row.split == "build"), open_probe=True
    )), "drawings only"  # fmt: skip
    assert not torch.equal(seen_in(rows, open_probe=False), seen_in(rows, open_probe=True))


@pytest.mark.slow
def test_the_decoder_is_trained_on_and_the_encoder_stays(built: Path, work: Path) -> None:
    first, last = (
        load_file(work / "parts" / name / "diffusion_pytorch_model.safetensors")
        for name in ("vae", "sharp_vae")
    )
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed, "the decoder"
    assert all(name.startswith(("decoder", "post_quant_conv")) for name in changed)
    shipped = load(built).generator.vae.decoder.conv_out.weight
    assert torch.allclose(shipped, last["decoder.conv_out.weight"], atol=1e-3)


def test_the_critic_has_its_share_of_the_last_layers_gradient() -> None:
    last = torch.randn(4, 3, requires_grad=True)
    distance, doubt = (last @ torch.randn(3)).square().mean(), last.sum()
    weight = balance(distance, doubt, last)
    (wanted,) = torch.autograd.grad(distance, last, retain_graph=True)
    (asked,) = torch.autograd.grad(weight * doubt, last)
    assert float(asked.norm() / wanted.norm()) == pytest.approx(CRITIC_SHARE, rel=1e-2)


@pytest.mark.slow
def test_finished_parts_are_used_again_and_give_the_same_weights(
    built: Path, work: Path, rows: tuple[TableRow, ...]
) -> None:
    seen: list[str] = []
    again = build(
        work / "again",
        work=work / "parts",
        rows=rows,
        config=SMALL,
        name="open",
        progress=lambda what, _done, _total: seen.append(what),
    )
    assert again.files == verify(built).files
    assert not any(what.startswith(("open", "drawn", "aligner", "VAE", "UNet")) for what in seen)


@pytest.mark.slow
def test_parts_of_another_recipe_are_refused(
    built: Path, work: Path, rows: tuple[TableRow, ...]
) -> None:
    other = SMALL.model_copy(update={"unet_steps": 3})
    for given, config in ((rows, other), (rows[1:], SMALL)):
        with pytest.raises(FileExistsError, match="other tiles, settings or code"):
            build(work / "third", work=work / "parts", rows=given, config=config)
    with pytest.raises(FileExistsError, match="exists"):
        build(built, work=work / "parts", rows=rows, config=SMALL)


class KilledError(Exception):
    """Stands for a power cut between two steps."""


def run_line(folder: Path, progress: Progress) -> torch.Tensor:
    """A line fitted to noise, with every kind of state that a part has."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss_of(chosen: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        noise = torch.randn(len(chosen), 3) + float(rng.random())
        return (model(noise) - torch.from_numpy(chosen).float()[:, None]).square().mean()

    recipe = Recipe(
        name="line", state=folder / "line.state", seed=1, steps=12, batch=4, learning_rate=0.1,
        device=torch.device("cpu"), progress=progress, ema_decay=0.9, save_every_s=0.0,
    )  # fmt: skip
    train(model, loss_of, 10, recipe)
    assert (folder / "line.state").exists(), "kept until the model is stored"
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def test_a_training_that_was_killed_goes_on_and_gives_the_same_bits(tmp_path: Path) -> None:
    told: list[int] = []

    def kill(_what: str, done: int, _total: int) -> None:
        if done == 7:
            raise KilledError

    def tell(_what: str, done: int, _total: int) -> None:
        told.append(done)

    (tmp_path / "whole").mkdir()
    whole = run_line(tmp_path / "whole", tell)
    told.clear()
    with pytest.raises(KilledError):
        run_line(tmp_path, kill)
    assert torch.equal(run_line(tmp_path, tell), whole)
    assert told == [7, 8, 9, 10, 11, 12]
    assert torch.equal(run_line(tmp_path, tell), whole), "killed before the model was stored"
    assert told == [7, 8, 9, 10, 11, 12]


def test_nothing_is_trained_on_held_out_cases(rows: tuple[TableRow, ...], tmp_path: Path) -> None:
    tiles = public_tiles(rows, SMALL, tmp_path, lambda *_: None)
    kinds = set(tiles.kind_N.tolist())
    assert {"COAD|case-0", "COAD|case-1", "liver|case-3"} < kinds
    assert not any("case-2" in kind or "case-4" in kind for kind in kinds)
    assert cancer_type("COAD") not in drawn_types(rows)
    assert all(kind != "drawn|COAD" for kind in kinds)


def test_captions_say_only_what_is_known_of_their_tile(
    rows: tuple[TableRow, ...], tmp_path: Path
) -> None:
    tiles = public_tiles(rows, SMALL, tmp_path, lambda *_: None)
    fits = tiles.fits
    for row, known in enumerate(tiles.statements):
        for place, caption in enumerate(tiles.captions):
            assert fits[row, place] == (set(caption.split(", ")[1:]) <= set(known))
        assert fits[row, tiles.caption_NV[row]].all()


def test_the_first_caption_says_all_and_others_less() -> None:
    known = [("sarcoma", "soft tissue", "large nuclei", "open spaces")] * 50
    caption_NV, captions = compose(known, SMALL)
    assert captions[caption_NV[0, 0]] == "H&E, sarcoma, soft tissue, large nuclei, open spaces"
    others = [captions[place] for place in caption_NV[:, 1:].ravel()]
    assert 0.65 < np.mean(["sarcoma" in caption for caption in others]) < 0.95
    assert 0.3 < np.mean(["large nuclei" in caption for caption in others]) < 0.7


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a.png,c,colon,XXXX,,1.0,CC0,,build", "line 2: type"),
        ("a.png,c,colon,COAD,,0,CC0,,build", "line 2: mpp"),
        ("a.png,,colon,COAD,,1.0,CC0,,build", "line 2: case"),
        ("a.png,c,colon,COAD,,1.0,,,build", "line 2: licence"),
        ("a.png,c,colon,COAD,,1.0,CC0,,test", "line 2: split"),
        ("a.png,c,colon,COAD,a, b,1.0,CC0,,build", "line 2: other columns than the header"),
        ("a.png,c,colon", "line 2: other columns than the header"),
        ('a.png,c,colon,COAD,"a,1.0,CC0,,build\nb.png,d,colon,,,1.0,CC0,,build', "unexpected end"),
        (f'a.png,c,colon,COAD,"{"a" * 140_000}",1.0,CC0,,build', "field larger"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(FoundationError, match=says):
        read_table(write_table(tmp_path, line))


@pytest.mark.parametrize(
    ("organ", "code", "caption", "says"),
    [
        ("colon", "COAD", "", "H&E, colon adenocarcinoma, colon"),
        ("liver", "SARC", "metastatic sarcoma", "H&E, sarcoma, liver"),
        ("", "SARC", "", "H&E, sarcoma, soft tissue"),
        ("pancreas", "normal", "intrapancreatic spleen", "H&E, intrapancreatic spleen, pancreas"),
        ("colon", "normal", "", "H&E, normal colon, colon"),
        ("colon", "", "melanosis coli", "H&E, melanosis coli, colon"),
    ],
)
def test_a_description_says_what_the_source_says(
    organ: str, code: str, caption: str, says: str
) -> None:
    row = TableRow(
        file=Path("a.png"), case="c", organ=organ, type=code, caption=caption, mpp=1, licence="CC0"
    )
    assert row.description == says


def test_a_tile_without_nuclei_has_no_size_of_them() -> None:
    pale = np.full((128, 128, 3), (235, 190, 215), dtype=np.uint8)
    assert measure(pale, mpp=1.0).phrases() == ("few nuclei",)


def test_an_image_that_changed_is_not_mixed_with_parts_of_the_old_one(tmp_path: Path) -> None:
    write_tile(tmp_path / "a.png", seed=1)
    rows = read_table(write_table(tmp_path, "a.png,c,colon,COAD,,1.0,CC0,,build"))
    _claim(tmp_path / "work", rows, SMALL)
    write_tile(tmp_path / "a.png", seed=2)
    with pytest.raises(FileExistsError, match="other tiles"):
        _claim(tmp_path / "work", rows, SMALL)


def test_a_case_on_both_sides_of_the_split_is_refused(tmp_path: Path) -> None:
    lines = [f"a.png,case-7,colon,COAD,,1.0,CC0,,{split}" for split in ("build", "held-out")]
    with pytest.raises(FoundationError, match="case-7"):
        read_table(write_table(tmp_path, *lines))
    for other in ("a.png,CASE-7", "./b.png,case-8"):
        lines = [f"b.png,case-7{lines[0][12:]}", f"{other}{lines[1][12:]}"]
        with pytest.raises(FoundationError, match="in build and in held-out"):
            read_table(write_table(tmp_path, *lines))


def test_a_caption_of_several_lines_is_one_caption(tmp_path: Path) -> None:
    lines = ['a.png,c,colon,,"melanosis\ncoli\u2028mild",1.0,CC0,,build']
    [row] = read_table(write_table(tmp_path, *lines))
    assert row.description == "H&E, melanosis coli mild, colon"


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not an image")
    rows = read_table(write_table(tmp_path, "a.png,c,colon,COAD,,1.0,CC0,,build"))
    with pytest.raises(FoundationError, match=r"a\.png"):
        read_open_tiles(rows, tile_px=64, mpp=1.0)


def test_an_image_that_would_be_black_or_huge_is_named(tmp_path: Path) -> None:
    """Twelve bits in sixteen have no tissue in their upper eight, and were left out in silence."""
    deep = np.full((96, 96), 4000, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    write_tile(tmp_path / "b.png", side_px=96)
    for line, told in (
        ("a.png,c,colon,COAD,,1.0,CC0,,build", "expected 8 bits"),
        ("b.png,c,colon,COAD,,20,CC0,,build", "is its mpp right"),
    ):
        with pytest.raises(FoundationError, match=told):
            read_open_tiles(read_table(write_table(tmp_path, line)), tile_px=64, mpp=0.05)


@pytest.mark.parametrize(
    ("side_px", "mpp", "count"), [(256, 1.0, 4), (256, 0.5, 1), (224, 0.5, 1), (100, 1.0, 0)]
)
def test_images_are_brought_to_scale_and_cut(
    tmp_path: Path, side_px: int, mpp: float, count: int
) -> None:
    write_tile(tmp_path / "a.png", side_px=side_px)
    write_tile(tmp_path / "b.png", side_px=128)
    rows = read_table(
        write_table(
            tmp_path, f"a.png,c,colon,COAD,,{mpp},CC0,,build", "b.png,d,colon,COAD,,1.0,CC0,,build"
        )
    )
    tiles = read_open_tiles(rows, tile_px=128, mpp=1.0, min_tissue=0.0)
    assert tiles.image_NHWC.shape[1:] == (128, 128, 3)
    assert (tiles.row_N == 0).sum() == count


def test_measured_words_follow_what_is_there() -> None:
    rng = np.random.default_rng(0)
    pale = np.full((128, 128, 3), (235, 190, 215), dtype=np.uint8)
    pale = (pale - rng.integers(0, 6, pale.shape)).astype(np.uint8)

    def with_nuclei(radius: int, pitch: int) -> np.ndarray:
        y, x = np.mgrid[:128, :128]
        centre = pitch // 2
        inside = (y % pitch - centre) ** 2 + (x % pitch - centre) ** 2 <= radius**2
        tile = pale.copy()
        tile[inside] = (90, 60, 140)
        return tile

    few, crowded = measure(with_nuclei(3, 20), mpp=1.0), measure(with_nuclei(4, 11), mpp=1.0)
    assert few.nuclear_share == pytest.approx(29 / 400, rel=0.4)
    assert "few nuclei" in few.phrases()
    assert "crowded nuclei" in crowded.phrases()
    assert "large nuclei" in crowded.phrases()
    assert measure(with_nuclei(3, 20), mpp=0.5).nuclear_area_um2 == pytest.approx(
        few.nuclear_area_um2 / 4, rel=0.3
    )
    hollow = with_nuclei(3, 20)
    hollow[:, :64] = 245
    assert "open spaces" in measure(hollow, mpp=1.0).phrases()


def test_words_of_a_tile_do_not_tell_its_stain() -> None:
    """Of words that are said, how many are gone when the tile is stained otherwise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    tiles = []
    for pitch in range(8, 16):
        for radius in (2.3, 2.6, 2.9, 3.2):
            near = ((y % pitch - pitch // 2) ** 2 + (x % pitch - pitch // 2) ** 2) ** 0.5
            dark_HW1 = np.exp(-((near / radius) ** 2))[..., None]
            eosin_HW1 = rng.uniform(0, 1, (16, 16)).repeat(8, 0).repeat(8, 1)[..., None]
            colour_HWC = np.array([235, 190, 215]) - eosin_HW1 * (60, 110, 70)
            tiles.append(colour_HWC * (1 - dark_HW1) + dark_HW1 * (90, 60, 140))
    tiles_NHWC = np.stack(tiles).astype(np.uint8)
    torch.manual_seed(1)
    others_NHWC = to_uint8(other_stains(to_pixels(tiles_NHWC)))

    def lost(said: list[tuple[str, ...]]) -> float:
        true = [set(measure(tile, mpp=1.0).phrases()) for tile in others_NHWC]
        kept = [word in now for words, now in zip(said, true, strict=True) for word in words]
        return 1 - float(np.mean(kept))

    steady = steady_phrases(tiles_NHWC, mpp=1.0, seed=0)
    assert steady == steady_phrases(tiles_NHWC, mpp=1.0, seed=0)
    plain = [measure(tile, mpp=1.0).phrases() for tile in tiles_NHWC]
    assert 2 * lost(steady) < lost(plain)


def test_timesteps_are_drawn_as_often_as_they_weigh() -> None:
    scheduler = new_scheduler()
    share_T = timestep_shares(scheduler)
    weights = []
    for kept in scheduler.alphas_cumprod.double().tolist():
        snr = kept / (1 - kept)
        weights.append(max(0.1, min(snr, 5.0) / (snr + 1)))
    np.testing.assert_allclose(share_T, np.asarray(weights) / sum(weights), rtol=1e-4)

    rng = np.random.default_rng(0)
    drawn_NB = np.stack([spread_timesteps(share_T, 32, rng) for _ in range(3000)])
    found_T = np.bincount(drawn_NB.ravel(), minlength=1000) / drawn_NB.size
    assert np.abs(found_T - share_T).sum() < 0.1
    halves = [(drawn_NB < place).mean(axis=1) for place in (250, 500)]
    assert max(half.std() for half in halves) < 0.02, "each batch covers the whole schedule"


def test_corpus_words_are_single_tokens_and_any_text_is_accepted() -> None:
    tokenizer = train_tokenizer(sorted(corpus()), BuildConfig())
    caption = compose_caption(CANCER_TYPES[9], None)
    assert len(tokenizer.tokenize(caption)) == len(caption.replace(",", " ,").split()) + 2
    strange = tokenizer("Zyxqv 42 \u00e9", truncation=True, max_length=32).input_ids
    assert tokenizer.eos_token_id not in strange[1:-1]


def test_other_stains_change_colour_and_stay_images() -> None:
    torch.manual_seed(0)
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (4, 3, 8, 8))).float()
    shifted = other_stains(pixels)
    assert shifted.min() >= -1.01
    assert shifted.max() <= 1.01
    assert (shifted - pixels).abs().mean() > 0.02
    grey = other_stains(pixels, grey=1.0)
    assert torch.allclose(grey[:, 0], grey[:, 1], atol=1e-6)


def test_the_shipped_foundation_verifies_and_is_small() -> None:
    verify(embedded_path())
    size = sum(file.stat().st_size for file in embedded_path().rglob("*") if file.is_file())
    assert size <= 40 * 2**20
