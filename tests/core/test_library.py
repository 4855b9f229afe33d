"""``import crafts``: takes what people pass, and draws what the program draws."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import crafts
from crafts_core.cli import app
from crafts_core.foundation import Foundation
from crafts_core.sampler_config import SamplerConfig


@pytest.fixture(scope="module")
def generator(foundation: Foundation) -> crafts.Generator:
    return crafts.Generator.load(str(foundation.path))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@contextmanager
def told() -> Iterator[list[tuple[str, str]]]:
    """User warnings and where they point; pytest's own way also minds what libraries warn of."""
    lines: list[tuple[str, str]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
    lines += [(str(each.message), each.filename) for each in caught if each.category is UserWarning]


def draw(generator: crafts.Generator, prompts: object, **options: object) -> list[np.ndarray]:
    drawn = generator.sample(prompts, num_inference_steps=1, **options)  # type: ignore[arg-type]
    return [np.asarray(each.image) for each in drawn]


def test_one_string_is_one_prompt(generator: crafts.Generator) -> None:
    """Once, "H&E" drew three images, one a letter."""
    drawn = generator.sample("H&E", num_inference_steps=1)
    assert [each.provenance.prompts for each in drawn] == [("H&E",)]


def test_it_draws_what_the_program_draws(
    generator: crafts.Generator, foundation: Foundation, tmp_path: Path
) -> None:
    words = ["sample", str(foundation.path), "-p", "lung", "-p", "colon", "--num", "2"]
    result = CliRunner().invoke(
        app, [*words, "--steps", "1", "--seed", "6", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    drawn = generator.sample(["lung", "colon"], num=2, seed=6, num_inference_steps=1)
    for place, each in enumerate(drawn):
        path = tmp_path / f"tile-{place:04d}.png"
        assert np.array_equal(pixels(path), np.asarray(each.image))
        assert crafts.read_provenance(path) == each.provenance


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_are_strings_or_paths(
    generator: crafts.Generator, tmp_path: Path, kind: type
) -> None:
    (drawn,) = generator.sample("lung", num_inference_steps=1)
    drawn.save(kind(tmp_path / "x.png"))
    assert crafts.read_provenance(tmp_path / "x.png") == drawn.provenance
    with told() as lines:
        made = generator.dataset(
            kind(tmp_path / "set"), "LUAD", per_type=1, splits={"train": 1},
            config=SamplerConfig(num_inference_steps=1),
        )  # fmt: skip
    assert "longer than the generator reads" in lines[0][0]
    assert len(crafts.Dataset.open(kind(tmp_path / "set"))) == len(made) == 1


def test_batches_change_nothing(generator: crafts.Generator) -> None:
    one, other = (draw(generator, "lung", num=3, batch_size=size) for size in (1, 3))
    assert np.abs(np.stack(one).astype(int) - np.stack(other)).max() <= 1


def test_what_is_not_drawn_as_asked_is_a_warning(generator: crafts.Generator) -> None:
    with told() as lines:
        draw(generator, "a dog")
        draw(generator, "lung")
    ((line, file),) = lines
    assert line.startswith("no word of 'a dog' is one")
    assert file == __file__


@pytest.mark.parametrize(
    "options", [{"num": 0}, {"guidance_scale": float("nan")}, {"control": "nuclei"}]
)
def test_impossible_settings_are_value_errors(
    generator: crafts.Generator, options: dict[str, object]
) -> None:
    with pytest.raises(ValueError):
        draw(generator, "lung", **options)


def test_what_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(crafts.CraftsError, match="no generator"):
        crafts.Generator.load(tmp_path)


def test_it_tells_what_it_is(generator: crafts.Generator, foundation: Foundation) -> None:
    assert generator.origin.foundation_hash == foundation.manifest.hash
    assert generator.tile_px == 32
    assert foundation.prompt_bank[0].text in generator.captions


def test_the_documented_names_are_there() -> None:
    assert all(hasattr(crafts, name) for name in crafts.__all__)


PROGRAMS = ["crafts", "crafts_client", "crafts_server", "crafts_simulations"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["crafts_core", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in PROGRAMS)],
)
def test_programs_run_as_modules_and_tell_their_version(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--version"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == f"crafts-federated {crafts.__version__}"
