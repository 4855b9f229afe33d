"""After a run a folder holds its images and no others, whatever ended the runs before."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from crafts_core import image_folder
from crafts_core.cli import app
from crafts_core.errors import CraftsError
from crafts_core.foundation import Foundation
from crafts_core.image_folder import (
    ImageFolderError,
    ImagePlan,
    check_space,
    draw_into,
    write_conditions,
    write_sheet,
)
from crafts_core.image_requests import ImageRequest
from crafts_core.provenance import read_provenance
from crafts_core.sampler_config import SamplerConfig
from crafts_core.sampling import Sampler, SamplingError, sample_images
from crafts_core.studio import Studio, fitting_batch

CONFIG = SamplerConfig(num_inference_steps=1, guidance_scale=2.0)


@pytest.fixture(scope="module")
def studio(foundation: Foundation) -> Studio:
    return Studio.open(foundation.path)


def plan(studio: Studio, *requests: ImageRequest, seed: int = 3) -> ImagePlan:
    return ImagePlan(requests, studio.provenance(CONFIG), seed=seed)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_each_file_is_the_image_of_its_request(studio: Studio, tmp_path: Path) -> None:
    asked = plan(studio, ImageRequest(prompt="lung", count=2), ImageRequest(prompt="colon"))
    files = draw_into(tmp_path, asked, studio, CONFIG, batch_size=2)
    expected = sample_images(
        studio.generator, ["lung", "lung", "colon"], scheduler="unipc", num_inference_steps=1,
        guidance_scale=2.0, seed=3,
    )  # fmt: skip
    found = np.stack([pixels(path) for path in files])
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert [read_provenance(path).prompts[0] for path in files] == ["lung", "lung", "colon"]
    assert [read_provenance(path).index for path in files] == [0, 1, 2]


def test_a_seed_of_its_own_makes_a_row_independent_of_the_others(studio: Studio) -> None:
    row = ImageRequest(prompt="lung", count=2, seed=9)
    alone, later = plan(studio, row), plan(studio, ImageRequest(prompt="colon", count=5), row)
    assert [alone[place].drawing for place in range(2)] == [later[5].drawing, later[6].drawing]
    assert plan(studio, row, seed=4)[1].drawing == alone[1].drawing


def test_what_is_missing_is_drawn_as_it_would_have_been(studio: Studio, tmp_path: Path) -> None:
    asked = plan(studio, ImageRequest(prompt="lung", count=4))
    draw_into(tmp_path, asked, studio, CONFIG, batch_size=1)
    before = bytes_in(tmp_path)
    (tmp_path / "tile-0002.png").unlink()
    (tmp_path / ".tile-0002.png.writing").write_bytes(b"half of")
    drawn: list[int] = []
    draw_into(
        tmp_path, asked, studio, CONFIG, batch_size=1,
        progress=lambda done, total: drawn.append(done),
    )  # fmt: skip
    assert drawn == [4]
    assert bytes_in(tmp_path) == before


@pytest.mark.parametrize("left", [0, 100, -1], ids=["nothing", "a piece", "all but a byte"])
def test_a_torn_image_is_drawn_again(studio: Studio, tmp_path: Path, left: int) -> None:
    asked = plan(studio, ImageRequest(prompt="lung", count=3))
    draw_into(tmp_path, asked, studio, CONFIG, batch_size=1)
    before = bytes_in(tmp_path)
    torn = tmp_path / "tile-0002.png"
    torn.write_bytes(torn.read_bytes()[:left])
    draw_into(tmp_path, asked, studio, CONFIG, batch_size=1)
    assert bytes_in(tmp_path) == before


@pytest.mark.parametrize("changed", ["fewer", "prompt", "seed", "steps"])
def test_another_run_leaves_nothing_of_the_first(
    studio: Studio, tmp_path: Path, changed: str
) -> None:
    draw_into(
        tmp_path, plan(studio, ImageRequest(prompt="lung", count=3)), studio, CONFIG, batch_size=3
    )
    config = SamplerConfig(num_inference_steps=2 if changed == "steps" else 1, guidance_scale=2.0)
    request = ImageRequest(prompt="colon" if changed == "prompt" else "lung", count=2)
    second = ImagePlan([request], studio.provenance(config), seed=5 if changed == "seed" else 3)
    draw_into(tmp_path, second, studio, config, batch_size=3)
    clean = tmp_path / "clean"
    draw_into(clean, second, studio, config, batch_size=3)
    found = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert found == bytes_in(clean)


@pytest.mark.parametrize("reason", ["no ControlNet", "not finite", "no room"])
def test_a_run_that_cannot_draw_costs_nobody_their_images(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    first = plan(studio, ImageRequest(prompt="lung", count=3))
    draw_into(tmp_path / "images", first, studio, CONFIG)
    before = bytes_in(tmp_path / "images")
    mask = tmp_path / "mask.png"
    Image.new("L", (32, 32), 1).save(mask)
    asked = [ImageRequest(prompt="colon")]
    if reason == "no ControlNet":  # for the second row alone
        asked.append(ImageRequest(prompt="colon", control="nuclei", mask=mask))
    elif reason == "not finite":
        monkeypatch.setattr(Sampler, "draw", lambda *_: raises(SamplingError("an image is NaN")))
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    changes: list[None] = []
    with pytest.raises(CraftsError):
        draw_into(
            tmp_path / "images", plan(studio, *asked), studio, CONFIG,
            before_change=lambda: changes.append(None),
        )  # fmt: skip
    assert (bytes_in(tmp_path / "images"), changes) == (before, [])


def raises(error: Exception) -> None:
    raise error


def test_what_steered_is_not_called_synthetic(studio: Studio, tmp_path: Path) -> None:
    """Of fluorescence it is a patient's own picture."""
    mask = tmp_path / "dapi.png"
    Image.new("L", (32, 32), 90).save(mask)
    steered = plan(studio, ImageRequest(prompt="lung", control="fluorescence", mask=mask))
    (path,) = write_conditions(tmp_path, steered, studio)
    said = read_provenance(path)
    assert (said.synthetic, said.kind) == (False, "condition")
    with Image.open(path) as image:
        told = " ".join(str(value) for value in image.info.values())
    assert "trainedAlgorithmicMedia" not in told
    assert image.info["Synthetic"] == "false"
    result = CliRunner().invoke(app, ["provenance", str(path)])
    assert "dapi" not in result.stdout
    assert "Not synthetic" in result.stdout


@pytest.mark.parametrize("name", ["tile-0000.png", "condition.png", "mine.png"])
def test_pictures_that_no_generator_drew_are_nobodys_to_remove(
    studio: Studio, tmp_path: Path, name: str
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    with pytest.raises(ImageFolderError, match="holds other images; name another folder"):
        draw_into(tmp_path, plan(studio, ImageRequest(prompt="lung")), studio, CONFIG)
    with Image.open(tmp_path / name) as image:
        assert image.size == (4, 4)


def test_a_mask_is_not_removed_with_an_earlier_runs_images(studio: Studio, tmp_path: Path) -> None:
    (mask,) = draw_into(tmp_path, plan(studio, ImageRequest(prompt="lung")), studio, CONFIG)
    steered = ImageRequest(prompt="colon", control="fluorescence", mask=mask)
    with pytest.raises(ImageFolderError, match="move it out"):
        draw_into(tmp_path, plan(studio, steered), studio, CONFIG)
    assert mask.exists()


def test_runs_in_folders_below_are_left_alone(studio: Studio, tmp_path: Path) -> None:
    asked = plan(studio, ImageRequest(prompt="lung"))
    draw_into(tmp_path / "below", asked, studio, CONFIG)
    draw_into(tmp_path, plan(studio, ImageRequest(prompt="colon")), studio, CONFIG)
    assert read_provenance(tmp_path / "below" / "tile-0000.png").prompts == ("lung",)


def test_what_is_left_of_a_run_needs_room_for_itself_alone(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn already is what fills the disk."""
    asked = plan(studio, ImageRequest(prompt="lung", count=3))
    draw_into(tmp_path, asked, studio, CONFIG)
    (tmp_path / asked.name(1)).unlink()
    rooms = []
    monkeypatch.setattr(image_folder, "check_space", lambda _, count, __: rooms.append(count))
    draw_into(tmp_path, asked, studio, CONFIG)
    assert rooms == [1]


@pytest.mark.parametrize("count", [3, 500])
def test_a_contact_sheet_is_capped(studio: Studio, tmp_path: Path, count: int) -> None:
    """500 images once gave a picture 33,000 pixels high."""
    files = [tmp_path / f"{place}.png" for place in range(count)]
    for path in files[:100]:
        Image.new("RGB", (256, 256)).save(path, compress_level=1)
    asked = plan(studio, ImageRequest(prompt="lung", count=count))
    with Image.open(write_sheet(tmp_path, files, asked, columns=4)) as sheet:
        assert max(sheet.size) <= 4096
    said = read_provenance(tmp_path / "sheet.png")
    assert (said.kind, said.prompts, said.origin) == ("contact sheet", ("lung",), studio.origin)


def test_what_cannot_fit_is_refused_before_it_is_drawn(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet", 10, 64)
    with pytest.raises(ImageFolderError, match="GB free; ask for fewer"):
        check_space(tmp_path / "not" / "yet", 10**6, 10**6)


@pytest.mark.parametrize(
    ("free", "each", "expected"),
    [(80 * 2**30, 2**29, 128), (80 * 2**30, 2**20, 256), (2**20, 2**29, 1), (2**30, 0, 256)],
)
def test_a_batch_leaves_a_fifth_of_the_memory(free: int, each: int, expected: int) -> None:
    batch = fitting_batch(free, bytes_per_image=each)
    assert batch == expected
    assert batch == 1 or batch * each <= 0.8 * free


@pytest.mark.gpu
def test_a_gpu_fills_its_memory_and_draws_in_bfloat16(foundation: Foundation) -> None:
    studio = Studio.open(foundation.path, device="cuda")
    assert studio.provenance(CONFIG).dtype == "bfloat16"
    assert studio.batch_size(CONFIG, is_steered=False) >= 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.exhaustive)]
)
def test_the_same_command_goes_on_after_any_end(
    foundation: Foundation, tmp_path: Path, number: signal.Signals
) -> None:
    command = ["sample", str(foundation.path), "-p", "lung", "--num", "40", "--steps", "2"]
    command += ["--batch-size", "1", "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    # A shell starts background jobs with SIGINT ignored, and they pass that on.
    with subprocess.Popen(
        [sys.executable, "-c", "from crafts_core.cli import app; app()", *command],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as first:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "tile-0005.png").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(first.pid, number)
        _, told = first.communicate(timeout=60)
    partial = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("tile-*.png")}
    assert 5 < len(partial) < 40
    if number == signal.SIGINT:
        assert told.strip() == "crafts: interrupted; the same command goes on"
    assert CliRunner().invoke(app, command).exit_code == 0
    done = bytes_in(tmp_path / "out")
    assert len(done) == 41
    assert partial.items() <= done.items()
