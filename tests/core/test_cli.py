"""The ``crafts`` program."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from crafts_core.cli import app
from crafts_core.foundation import Foundation
from crafts_core.tiles import TileRecord, TileStoreWriter, encode_tile
from support.foundations import write_tiny_pipeline


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24 tiles of six patients."""
    path: Path = tmp_path_factory.mktemp("tiles") / "store"
    rng = np.random.default_rng(0)
    with TileStoreWriter(path, cohort="x", tile_px=32, mpp=1.0) as writer:
        for row in range(24):
            tile = TileRecord(
                tile_id=f"t{row}", patient=f"p{row // 4}", case="c", slide="s", x=row, y=0,
                level0_width=1, level0_height=1, mpp=1.0, caption=f"tissue {row % 2}", label="",
                tissue_fraction=1, sharpness=1,
            )  # fmt: skip
            writer.add(tile, encode_tile(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
    return path


def test_sample_command_writes_marked_images(foundation: Foundation, tmp_path: Path) -> None:
    arguments = [
        "sample", str(foundation.path), "--prompt", "tissue with glands", "--prompt", "lung",
        "--out", str(tmp_path / "out"), "--num", "2", "--steps", "2",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["sheet.png", *(f"tile-{index:04d}.png" for index in range(4))]
    with Image.open(tmp_path / "out/tile-0003.png") as stored:
        assert stored.size == (32, 32)
        assert stored.text["Synthetic"] == "true"
        assert "lung" in stored.text["Description"]


def test_sample_command_fails_on_one_line_without_a_generator(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(
        app, ["sample", str(tmp_path / "empty"), "--prompt", "x", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "no generator" in result.stderr


def test_wrong_use_exits_with_two(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sample", str(tmp_path), "--prompt", "x", "--steps", "0"])
    assert result.exit_code == 2


@pytest.mark.slow
def test_evaluate_command_measures_foundation_and_generator(
    foundation: Foundation, held_out: Path
) -> None:
    directory = str(foundation.path)
    arguments = ["evaluate", directory, "--tiles", str(held_out), "--foundation", directory]
    result = CliRunner().invoke(app, [*arguments, "--num", "16", "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["distance_generator"] == values["distance_foundation"]
    assert values["n"] == 16
    assert values["heldout_patients"] == 6


@pytest.mark.slow
def test_compare_command_measures_every_generator(
    foundation: Foundation, held_out: Path, tmp_path: Path
) -> None:
    first = str(foundation.path)
    second = str(write_tiny_pipeline(tmp_path / "other", seed=9))
    arguments = ["compare", first, second, "--tiles", str(held_out), "--foundation", first]
    result = CliRunner().invoke(app, [*arguments, "--num", "16", "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values.keys() == {first, second}
    assert values[first]["mmd2"] != values[second]["mmd2"]


def test_evaluate_command_refuses_tiles_of_another_size(
    foundation: Foundation, tmp_path: Path
) -> None:
    with TileStoreWriter(tmp_path / "store", cohort="x", tile_px=16, mpp=1.0) as writer:
        tile = TileRecord(
            tile_id="t", patient="p", case="c", slide="s", x=0, y=0, level0_width=1,
            level0_height=1, mpp=1.0, caption="tissue", label="", tissue_fraction=1, sharpness=1,
        )  # fmt: skip
        writer.add(tile, encode_tile(np.zeros((16, 16, 3), np.uint8)))
    directory = str(foundation.path)
    arguments = ["evaluate", directory, "--tiles", str(tmp_path / "store")]
    result = CliRunner().invoke(app, [*arguments, "--foundation", directory])
    assert result.exit_code == 1
    assert "expected tiles of 32 px, got 16" in result.stderr
