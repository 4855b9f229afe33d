"""The ``crafts`` program."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from crafts_core.cli import app
from crafts_core.evaluation.bench import Bench
from crafts_core.evaluation.figures import Fidelity
from crafts_core.foundation import Foundation
from crafts_core.tiles import TileRecord, TileStoreWriter, encode_tile
from support.foundations import write_tiny_pipeline


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24 tiles of six patients."""
    path: Path = tmp_path_factory.mktemp("tiles") / "store"
    write_store(path, num_tiles=24, tiles_per_patient=4)
    return path


def write_store(
    path: Path,
    *,
    num_tiles: int,
    tiles_per_patient: int,
    rng: np.random.Generator | None = None,
    prefix: str = "p",
) -> None:
    rng = rng or np.random.default_rng(0)
    with TileStoreWriter(path, cohort="x", tile_px=32, mpp=1.0) as writer:
        for row in range(num_tiles):
            tile = TileRecord(
                tile_id=f"t{row}", patient=f"{prefix}{row // tiles_per_patient}", case="c",
                slide="s", x=row, y=0, level0_width=1, level0_height=1, mpp=1.0,
                caption=f"tissue {row % 2}", label="", tissue_fraction=1, sharpness=1,
            )  # fmt: skip
            writer.add(tile, encode_tile(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)))


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
    said = CliRunner().invoke(app, ["provenance", str(tmp_path / "out" / "sheet.png"), "--json"])
    (sheet,) = json.loads(said.stdout).values()
    assert (sheet["kind"], sheet["prompts"]) == ("contact sheet", ["tissue with glands", "lung"])


def test_sample_command_fails_on_one_line_without_a_generator(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(
        app, ["sample", str(tmp_path / "empty"), "--prompt", "x", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "no generator" in result.stderr


def draw(generator: Path, out: Path, *options: str) -> Result:
    words = ["sample", str(generator), "-p", "tissue", "--num", "1", "--steps", "2"]
    return CliRunner().invoke(app, [*words, "--out", str(out), *options])


def one_line(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)
    assert code == 2 or len(result.stderr.strip().splitlines()) == 1
    return result.stderr


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("fault", ["hole", "nan", "shape", "torn", "config"])
def test_broken_weights_draw_nothing(
    foundation: Foundation, tmp_path: Path, part: str, fault: str
) -> None:
    """A library fills a hole with random numbers: another picture each time, exit status 0."""
    copy = Path(shutil.copytree(foundation.path, tmp_path / "copy"))
    (path,) = (copy / part).glob("*.safetensors")
    weights = load_file(path)
    name = next(name for name in sorted(weights) if weights[name].ndim > 1)
    if fault == "hole":
        del weights[name]
    elif fault == "nan":
        weights[name] = torch.full_like(weights[name], torch.nan)
    elif fault == "shape":
        weights[name] = weights[name][:1]
    save_file(weights, path, metadata={"format": "pt"})
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:-64])
    elif fault == "config":
        (copy / part / "config.json").write_text("{")
    assert part in one_line(draw(copy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_numbers_that_overflow_draw_nothing(foundation: Foundation, tmp_path: Path) -> None:
    result = draw(foundation.path, tmp_path / "out", "--guidance", "1e30")
    assert "NaN or infinity; lower the guidance" in one_line(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("guidance", ["nan", "inf", "0.5"])
def test_guidance_that_is_no_number_is_wrong_use(
    foundation: Foundation, tmp_path: Path, guidance: str
) -> None:
    one_line(draw(foundation.path, tmp_path / "out", "--guidance", guidance), code=2)


@pytest.mark.parametrize("device", ["cuda:99", "warp", "xpu", "meta"])
def test_a_device_that_is_not_there_is_one_line(
    foundation: Foundation, tmp_path: Path, device: str
) -> None:
    assert device in one_line(draw(foundation.path, tmp_path / "out", "--device", device))


def test_what_a_prompt_is_too_long_for_is_told(foundation: Foundation, tmp_path: Path) -> None:
    words = " ".join(["tissue with glands"] * 20)
    result = draw(foundation.path, tmp_path / "out", "-p", f"{words} necrosis", "-p", "lung")
    assert result.exit_code == 0
    (told,) = result.stderr.strip().splitlines()
    assert told.startswith("crafts: a prompt is longer than the generator reads; left out: ")
    assert "necrosis" in told


def test_a_prompt_of_unknown_words_is_named(foundation: Foundation, tmp_path: Path) -> None:
    """It drew lymphoid tissue without a word."""
    result = draw(foundation.path, tmp_path / "out", "-p", "a dog")
    assert result.exit_code == 0
    (told,) = result.stderr.strip().splitlines()
    assert told.startswith("crafts: no word of 'a dog' is one that this generator")


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    "words", [["prompts"], ["sample", "-p", "lung", "--out", "OUT"]], ids=lambda words: words[0]
)
def test_brackets_in_brackets_are_one_line(
    foundation: Foundation, tmp_path: Path, words: list[str]
) -> None:
    """In files of a generator that came from somebody: they were tracebacks."""
    copy = Path(shutil.copytree(foundation.path, tmp_path / "copy"))
    for name in ("prompt_bank.json", "model_index.json"):
        (copy / name).write_text(NESTED)
    words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    result = CliRunner().invoke(app, [words[0], str(copy), *words[1:]])
    assert "cannot" in one_line(result)


def test_images_that_will_name_no_study_are_told(foundation: Foundation, tmp_path: Path) -> None:
    """A copy without its record drew as somebody's stock model, and nobody was told."""
    copy = Path(shutil.copytree(foundation.path, tmp_path / "copy"))
    (copy / "foundation.json").unlink()
    result = draw(copy, tmp_path / "out")
    assert result.exit_code == 0
    (told,) = result.stderr.strip().splitlines()
    assert told.endswith(
        "copy has no generator.json, so its images name no study and no promise "
        "to patients; if it was exported by one, copy it again"
    )


def test_a_table_draws_one_kind_of_image_a_row(foundation: Foundation, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("type,features,count,seed\nLUAD,necrosis,2,5\nCOAD,,,\n")
    result = CliRunner().invoke(
        app,
        ["sample", str(foundation.path), "--prompts", str(tmp_path / "rows.csv"), "--steps", "1",
         "--num", "1", "--out", str(tmp_path / "out"), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    *files, _ = json.loads(result.stdout)["files"]
    said = json.loads(CliRunner().invoke(app, ["provenance", *files, "--json"]).stdout)
    drawn = [(each["prompts"][0], each["seed"], each["index"]) for each in said.values()]
    luad = "H&E, lung adenocarcinoma, lung, necrosis"
    assert drawn == [(luad, 5, 0), (luad, 5, 1), ("H&E, colon adenocarcinoma, colon", 0, 2)]


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--num", "100000000"], 2, "100000000 is not in the range"),
        (["--num", "1000000", "-p", "lung"], 1, "more than one run draws"),
        (["--scheduler", "pndm"], 2, "'pndm' is not one of"),
        (["--dtype", "float8"], 2, "'float8' is not one of"),
        (["--dtype", "float16"], 1, "float16 is for GPUs"),
        (["--control", "nuclei"], 2, "belong together"),
        (["--batch-size", "0"], 2, "is not in the range"),
    ],
)
def test_what_cannot_be_drawn_is_told(
    foundation: Foundation, tmp_path: Path, options: list[str], code: int, told: str
) -> None:
    result = draw(foundation.path, tmp_path / "out", *options)
    assert told in " ".join(one_line(result, code).replace("│", "").split())
    assert not (tmp_path / "out").exists()


def test_a_caption_is_needed(foundation: Foundation, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sample", str(foundation.path)])
    assert result.exit_code == 2
    (tmp_path / "p.txt").write_text("lung\n")
    words = ["sample", str(foundation.path), "--prompts", str(tmp_path / "p.txt")]
    assert CliRunner().invoke(app, [*words, "--negative", "x"]).exit_code == 2


def test_what_it_was_trained_to_draw_is_listed(foundation: Foundation) -> None:
    text = CliRunner().invoke(app, ["prompts"]).stdout
    assert "LUAD  lung adenocarcinoma, lung" in text
    assert "normal colon" in text
    listed = json.loads(CliRunner().invoke(app, ["prompts", str(foundation.path), "--json"]).stdout)
    assert listed["captions"] == [prompt.text for prompt in foundation.prompt_bank]
    assert "papillae" in listed["attributes"]["growth_pattern"]


def test_an_image_of_unknown_origin_is_exit_code_1(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert "carries no provenance" in one_line(
        CliRunner().invoke(app, ["provenance", str(tmp_path / "x.png")])
    )


def test_four_patients_of_one_tile_are_enough(foundation: Foundation, tmp_path: Path) -> None:
    """``test_fidelity.py`` has their bootstrap."""
    write_store(tmp_path / "few", num_tiles=4, tiles_per_patient=1)
    result = CliRunner().invoke(
        app,
        ["compare", str(foundation.path), "--real", str(tmp_path / "few"), "--num", "16",
         "--foundation", str(foundation.path), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (fidelity,) = json.loads(result.stdout).values()
    assert all(np.isfinite(fidelity["mmd2_interval"]))


def test_wrong_use_exits_with_two(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sample", str(tmp_path), "--prompt", "x", "--steps", "0"])
    assert result.exit_code == 2


@pytest.mark.slow
def test_evaluate_command_measures_foundation_and_generator(
    foundation: Foundation, held_out: Path, tmp_path: Path
) -> None:
    directory = str(foundation.path)
    arguments = ["evaluate", directory, "--real", str(held_out), "--foundation", directory]
    arguments += ["--num", "16"]
    rng = np.random.default_rng(1)
    write_store(tmp_path / "training", num_tiles=24, tiles_per_patient=4, rng=rng, prefix="t")
    training = ["--training", str(tmp_path / "training"), "--json"]
    result = CliRunner().invoke(app, [*arguments, *training])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["distance_generator"] == values["distance_foundation"]
    assert values["n"] == 16
    assert values["heldout_patients"] == 6
    assert [arm["name"] for arm in values["arms"]].count("recoloured") == 1
    assert values["training_tiles"] == 24
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert "\n  shared generator  " in told.stdout
    assert max(map(len, told.stdout[: told.stdout.index("16 images")].splitlines())) <= 80
    assert "foundation, recoloured" not in told.stdout
    assert "(crafts evaluate --training)" in told.stdout


@pytest.mark.parametrize(
    "rng, prefix, words",
    [(0, "t", "24 tiles and 0 patients"), (1, "p", "0 tiles and 6 patients")],
)
def test_evaluate_command_refuses_to_measure_on_what_was_trained_on(
    foundation: Foundation, held_out: Path, tmp_path: Path, rng: int, prefix: str, words: str
) -> None:
    """Known by its pixels, or by its patient, among however many others."""
    write_store(
        tmp_path / "training", num_tiles=40, tiles_per_patient=4,
        rng=np.random.default_rng(rng), prefix=prefix,
    )  # fmt: skip
    directory = str(foundation.path)
    arguments = ["evaluate", directory, "--real", str(held_out), "--foundation", directory]
    result = CliRunner().invoke(app, [*arguments, "--training", str(tmp_path / "training")])
    assert f"have {words} in common" in one_line(result)


def test_evaluate_command_judges_no_encoder_on_tiles_too_small(
    foundation: Foundation, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    write_store(small, num_tiles=40, tiles_per_patient=2)
    arguments = ["evaluate", "--validate", "--real", str(small), "--encoder", "orthogonal"]
    result = CliRunner().invoke(app, [*arguments, "--foundation", str(foundation.path)])
    assert result.exit_code == 1
    assert "at least two patches of 32 px, got 32 px" in result.stderr
    assert result.stderr.count("\n") == 1


def test_evaluate_command_wants_a_generator_or_an_encoder_to_judge(held_out: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", "--real", str(held_out)])
    assert result.exit_code == 2
    assert "--validate" in result.stderr


@pytest.mark.slow
def test_compare_command_measures_every_generator(
    foundation: Foundation, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = str(foundation.path)
    second = str(write_tiny_pipeline(tmp_path / "other", seed=9))
    arguments = ["compare", first, second, "--real", str(held_out), "--foundation", first]
    arguments += ["--encoder", "orthogonal"]
    result = CliRunner().invoke(app, [*arguments, "--num", "16", "--json"])
    assert result.exit_code == 0, result.output
    assert "should not give the main figure" in result.stderr
    values = json.loads(result.stdout)
    assert values.keys() == {first, second}
    assert values[first]["encoder"] == "embedded-orthogonal-256"
    known = {Path(path): Fidelity.model_validate(value) for path, value in values.items()}
    monkeypatch.setattr(Bench, "fidelity", lambda _, path, __: known[path])  # not drawn twice
    told = CliRunner().invoke(app, [*arguments, "--num", "16"])
    ranked = sorted(values, key=lambda path: values[path]["structure"])
    head, floor, *lines = told.stdout.splitlines()
    assert head.split() == ["structure", "colour", "smaller", "is", "nearer"]
    assert floor.endswith("real tiles of other patients")
    for line, path in zip(lines, ranked, strict=True):
        told = line.split()
        assert told[-2] == path
        numbers = [float(word.strip("()")) for word in told[:-2] if word != "to"]
        expected = [
            number
            for what in ("structure", "colour")
            for number in (values[path][what], *values[path][f"{what}_interval"])
        ]
        assert numbers == pytest.approx(expected, abs=1e-4)


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
    arguments = ["evaluate", directory, "--real", str(tmp_path / "store")]
    result = CliRunner().invoke(app, [*arguments, "--foundation", directory])
    assert result.exit_code == 1
    assert "expected tiles of 32 px, got 16" in result.stderr
