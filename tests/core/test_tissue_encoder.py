"""The embedded encoder: sees structure, hardly stain, and can be trained again."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from crafts_core.evaluation import changes, tissue_training
from crafts_core.evaluation.encoder import load_encoder
from crafts_core.evaluation.tissue_encoder import TissueEncoder
from crafts_core.evaluation.tissue_network import TissueNetwork, standard_density
from crafts_core.evaluation.tissue_training import (
    TissueTrainingConfig,
    disarranged,
    recoloured,
    train,
    write_weights,
)
from crafts_core.foundation_manifest import FoundationError
from crafts_core.procedural import phenotype, random_stain, render_region
from crafts_core.vocabulary import CANCER_TYPES, sample_attributes


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """Drawn tissue, 128 px at one micron per pixel."""
    rng, images = np.random.default_rng(0), []
    for cancer in CANCER_TYPES[:8]:
        look = phenotype(sample_attributes(rng, cancer))
        stain = random_stain(rng)
        region = render_region(
            rng, width_px=128, height_px=128, mpp=1.0, phenotype=look, stain=stain
        )
        images.append(region.image)
    return np.stack(images)


class TestEncoder:
    def test_it_is_the_embedded_one_and_small(self) -> None:
        encoder = load_encoder("embedded")
        assert isinstance(encoder, TissueEncoder)
        assert encoder.path.stat().st_size <= 4_000_000
        assert encoder.hash == hashlib.sha256(encoder.path.read_bytes()).hexdigest()

    def test_images_are_brought_to_one_micron_per_pixel(self, tiles: np.ndarray) -> None:
        encoder = TissueEncoder.embedded()
        fine = tiles.repeat(2, axis=1).repeat(2, axis=2)
        pixels = torch.from_numpy(fine).permute(0, 3, 1, 2).float()
        small = nn.functional.interpolate(pixels, (128, 128), mode="bilinear", antialias=True)
        found = encoder.embed(fine, mpp=0.5)
        assert found.shape == (8, 312)
        np.testing.assert_allclose(found, encoder.network(small).numpy(), atol=1e-4)
        np.testing.assert_allclose(
            encoder.embed(fine, mpp=1.0), encoder.network(pixels).numpy(), atol=1e-4
        )
        with pytest.raises(ValueError, match="at least 32 microns, got 16"):
            encoder.embed(tiles[:, :64, :64], mpp=0.25)

    def test_shuffled_tissue_is_further_than_restained(self, tiles: np.ndarray) -> None:
        encoder = TissueEncoder.embedded()
        real = encoder.embed(tiles, mpp=1.0)

        def gap(changed: np.ndarray) -> float:
            found = encoder.embed(changed, mpp=1.0)
            spread = real.std(axis=0).clip(1e-6)
            return float(np.linalg.norm((found - real) / spread, axis=1).mean())

        stain = max(gap(changes.recoloured(tiles)), gap(changes.restained(tiles)))
        assert stain < gap(changes.shuffled(tiles, 32, np.random.default_rng(0)))

    def test_damaged_weights_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "tissue.safetensors"
        path.write_bytes(TissueEncoder.embedded().path.read_bytes()[:-8])
        with pytest.raises(FoundationError, match="cannot be read"):
            TissueEncoder(path=path).embed(np.zeros((1, 64, 64, 3), np.uint8), mpp=1.0)


class TestNetwork:
    def test_density_has_one_mean_and_spread_whatever_the_stain(self, tiles: np.ndarray) -> None:
        found = standard_density(torch.from_numpy(tiles).permute(0, 3, 1, 2))
        torch.testing.assert_close(found.mean((2, 3)), torch.zeros(8, 3), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.std((2, 3)), torch.ones(8, 3), atol=1e-3, rtol=0)

    def test_glass_is_not_amplified(self) -> None:
        glass = torch.full((1, 3, 32, 32), 240.0) + torch.randn(1, 3, 32, 32)
        assert standard_density(glass).std() < 0.2

    def test_folding_changes_nothing(self, tiles: np.ndarray) -> None:
        torch.manual_seed(0)
        network = TissueNetwork(is_trained=False)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                nn.init.normal_(module.bias)
        images = torch.from_numpy(tiles[:2]).permute(0, 3, 1, 2)
        expected = network.eval()(images)
        torch.testing.assert_close(network.folded()(images), expected, atol=1e-4, rtol=1e-4)


CONFIG = TissueTrainingConfig(steps=3, batch_size=4, crop_px=32)


def _train(tiles: np.ndarray) -> TissueNetwork:
    images = tiles[np.arange(40) % 8, :48, :48]
    cases = np.array(["one"] * 20 + ["two"] * 20)
    organs = np.array(["lung", "colon"] * 20)
    losses: list[float] = []
    network = train(images, cases, [organs, cases], CONFIG, lambda _, loss: losses.append(loss))
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    return network


@pytest.fixture(scope="module")
def network(tiles: np.ndarray) -> TissueNetwork:
    return _train(tiles)


class TestTraining:
    def test_a_seed_gives_one_network(self, tiles: np.ndarray, network: TissueNetwork) -> None:
        again = _train(tiles).state_dict()
        for name, weights in network.state_dict().items():
            assert torch.equal(weights, again[name]), name

    def test_what_is_written_is_what_the_encoder_reads(
        self, tiles: np.ndarray, network: TissueNetwork, tmp_path: Path
    ) -> None:
        encoder = TissueEncoder(path=write_weights(network, tmp_path / "out"))
        images = torch.from_numpy(tiles).permute(0, 3, 1, 2)
        expected = network(images).double().numpy()
        np.testing.assert_allclose(encoder.embed(tiles, mpp=1.0), expected, rtol=0.02, atol=0.02)

    def test_the_command_trains_on_build_cases_alone(
        self, tiles: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = ["file,case,organ,type,caption,mpp,licence,split"]
        for row, tile in enumerate(tiles[np.arange(44) % 8]):
            Image.fromarray(tile).resize((128, 128)).save(tmp_path / f"{row}.png")
            case = "other" if row >= 40 else ("one", "two")[row % 2]
            split = "held-out" if row >= 40 else "build"
            lines.append(f"{row}.png,{case},{case},,{case},1.0,CC0,{split}")
        (tmp_path / "tiles.csv").write_text("\n".join(lines))
        seen: list[set[str]] = []

        def spied(images: np.ndarray, groups: np.ndarray, *rest: object) -> TissueNetwork:
            seen.append(set(groups))
            return train(images, groups, *rest)

        monkeypatch.setattr(tissue_training, "train", spied)
        arguments = ["--tiles", str(tmp_path / "tiles.csv"), "--out", str(tmp_path), "--steps", "1"]
        monkeypatch.setattr("sys.argv", ["tissue_training", *arguments])
        tissue_training.main()
        assert seen == [{"one", "two"}]
        assert TissueEncoder(path=tmp_path / "tissue.safetensors").hash

    def test_questions_without_classes_are_refused(self, tiles: np.ndarray) -> None:
        """Nineteen tiles of each are too few."""
        names = np.array(["one"] * 19 + ["two"] * 19)
        with pytest.raises(ValueError, match="at least 20 tiles"):
            train(tiles[np.arange(38) % 8], names, [names], CONFIG)

    def test_disarranged_tissue_is_made_of_itself(self) -> None:
        """Every pixel lies between its own value and that of one and the same turn."""
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        mixed = disarranged(images, torch.Generator().manual_seed(2))
        is_between = [
            ((mixed - images) * (turned - mixed) >= -1e-6).all()
            for turned in (torch.rot90(images, turns, (2, 3)) for turns in (1, 2, 3))
        ]
        assert sum(map(bool, is_between)) == 1
        assert not torch.allclose(mixed, images)

    def test_recolouring_moves_no_edge_and_is_drawn_for_each_image(self) -> None:
        """Pixels that were equal stay equal; the same image twice becomes two."""
        image = torch.randint(0, 4, (1, 3, 8, 8)).float() * 60
        twice = recoloured(image.repeat(2, 1, 1, 1), torch.Generator().manual_seed(1))
        assert not torch.allclose(twice[0], twice[1])
        flat = image[0].flatten(1).T
        for changed in twice:
            found = changed.flatten(1).T
            for colour in flat.unique(dim=0):
                same = found[(flat == colour).all(1)]
                torch.testing.assert_close(same, same[:1].expand_as(same))
