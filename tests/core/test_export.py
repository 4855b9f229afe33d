"""What is exported loads with stock diffusers and nothing of ours."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from crafts_core.adapters import merged_denoiser
from crafts_core.errors import CraftsError
from crafts_core.export import hub_licence, model_card, save_lora, save_pipeline
from crafts_core.foundation import Foundation, FoundationError, embedded_path
from crafts_core.generator import Generator
from crafts_core.generator_record import (
    GeneratorRecord,
    parts_hash,
    read_origin,
    trained_prompts,
)
from crafts_core.plan_sections import AdapterConfig
from crafts_core.starting_point import initial_state
from crafts_core.state import AdapterError

CONFIG = AdapterConfig(
    kind="lora", rank=2, targets=("to_q", "to_out.0", "conv1", "conv_in"), first_factor="random"
)
STRANGER = """
import importlib.util, sys
assert importlib.util.find_spec("crafts_core") is None, "the project must not be importable"
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipeline("tissue with glands", num_inference_steps=2, guidance_scale=2.0).images[0]
image.save(sys.argv[2])
"""


@pytest.fixture(scope="module")
def state(foundation: Foundation) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in initial_state(foundation, CONFIG, 0).items()
    }


@pytest.fixture(scope="module")
def exported(
    foundation: Foundation, state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory: Path = tmp_path_factory.mktemp("export") / "generator"
    save_pipeline(directory, foundation, adapter=CONFIG, state=state, card="# card\n")
    return directory


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return latents, torch.tensor([3, 600]), torch.randn(2, 16, 32, generator=generator)


@pytest.mark.slow
def test_stranger_makes_an_image_with_stock_diffusers(exported: Path, tmp_path: Path) -> None:
    """A fresh process, another folder, no path to this project; editable installs are hidden."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH",)}
    hide = (
        "import sys; sys.path[:] = [p for p in sys.path if not p.rstrip('/').endswith("
        "('crafts_core', 'privacy', 'client', 'server', 'simulations'))]; "
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]"
    )
    subprocess.run(
        [sys.executable, "-I", "-c", hide + "\n" + STRANGER, str(exported), "image.png"],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=300,
    )
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (32, 32)
        assert np.asarray(image).std() > 0


CONDITIONING = """
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
hidden, _ = pipeline.encode_prompt(sys.argv[2].split("|"), torch.device("cpu"), 1, False)
torch.save(hidden.detach(), "hidden.pt")
"""
CAPTIONS = ["H&E, colon adenocarcinoma", "lung, Gleason 4+3; PD-L1 \N{MICRO SIGN}", "", "tissue"]


@pytest.mark.exhaustive
@pytest.mark.network
def test_libraries_of_last_year_condition_alike(
    foundation: Foundation, exported: Path, tmp_path: Path
) -> None:
    """diffusers 0.35.2 with transformers 4.57.3, in front of what is installed here."""
    older = ["diffusers==0.35.2", "transformers==4.57.3", "huggingface-hub<1", "tokenizers<0.23"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(tmp_path / "older"), *older], check=True, timeout=300)
    subprocess.run(
        [sys.executable, "-c", CONDITIONING, str(exported), "|".join(CAPTIONS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "older"), "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=300,
    )
    found = torch.load(tmp_path / "hidden.pt", weights_only=True)
    torch.testing.assert_close(found, foundation.generator.encode_captions(CAPTIONS))


def test_text_encoder_and_tokenizer_are_there_for_older_libraries(
    foundation: Foundation, exported: Path
) -> None:
    """By name, as transformers 4 wants them; here they condition as before."""
    names = load_file(exported / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    vocabulary = json.loads((exported / "tokenizer" / "vocab.json").read_text("utf-8"))
    assert vocabulary == foundation.generator.tokenizer.get_vocab()
    assert (exported / "tokenizer" / "merges.txt").read_text("utf-8").startswith("#version")
    loaded = Generator.from_directory(exported)
    expected = foundation.generator.encode_captions(CAPTIONS)
    assert torch.equal(loaded.encode_captions(CAPTIONS), expected)


def test_exported_unet_is_the_merged_one(
    foundation: Foundation, state: dict[str, Tensor], exported: Path
) -> None:
    expected = merged_denoiser(foundation.generator.denoiser, CONFIG, state)
    unet = Generator.from_directory(exported).denoiser
    assert unet.state_dict().keys() == foundation.generator.denoiser.state_dict().keys()
    torch.testing.assert_close(unet(*inputs()).sample, expected(*inputs()).sample)


def test_lora_file_gives_stock_diffusers_the_same_prediction(
    foundation: Foundation, state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_lora(tmp_path / "adapter.safetensors", state)
    pipeline = DiffusionPipeline.from_pretrained(foundation.path)
    before = pipeline.unet(*inputs()).sample
    pipeline.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    expected = merged_denoiser(foundation.generator.denoiser, CONFIG, state)(*inputs()).sample
    torch.testing.assert_close(pipeline.unet(*inputs()).sample, expected)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_export_holds_no_pickle_and_no_code(exported: Path) -> None:
    suffixes = {path.suffix for path in exported.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".md"}


def test_what_no_export_wrote_is_not_deleted(
    foundation: Foundation, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """A folder called ``generator`` was, with what was in it, and one called ``.writing`` too."""
    theirs = (tmp_path / "generator" / "thesis.txt", tmp_path / "generator.writing" / "x.txt")
    for path in theirs:
        path.parent.mkdir()
        path.write_text("precious")
    with pytest.raises(CraftsError, match="generator is there and is no earlier export"):
        save_pipeline(theirs[0].parent, foundation, adapter=CONFIG, state=state, card="# card\n")
    theirs[0].unlink()
    save_pipeline(theirs[0].parent, foundation, adapter=CONFIG, state=state, card="# card\n")
    assert theirs[1].read_text() == "precious"


def test_export_replaces_an_older_one_whole(
    foundation: Foundation, state: dict[str, Tensor], tmp_path: Path
) -> None:
    directory = tmp_path / "generator"
    save_pipeline(directory, foundation, adapter=CONFIG, state=state, card="# old\n")
    (directory / "stale.txt").write_text("old")
    save_pipeline(directory, foundation, adapter=CONFIG, state=state, card="# new\n")
    assert (directory / "README.md").read_text() == "# new\n"
    assert not (directory / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["generator"]


def test_full_weights_are_no_lora_file(foundation: Foundation, tmp_path: Path) -> None:
    state = initial_state(foundation, AdapterConfig(kind="full"), 0)
    with pytest.raises(AdapterError):
        save_lora(tmp_path / "adapter.safetensors", state)
    assert not list(tmp_path.iterdir())


def test_full_weights_export_as_a_pipeline(foundation: Foundation, tmp_path: Path) -> None:
    config = AdapterConfig(kind="full")
    state = initial_state(foundation, config, 0)
    state = {name: tensor * 1.01 for name, tensor in state.items()}
    save_pipeline(tmp_path / "generator", foundation, adapter=config, state=state, card="")
    unet = Generator.from_directory(tmp_path / "generator").denoiser
    torch.testing.assert_close(dict(unet.named_parameters()), state)


def test_the_hub_reads_the_card(foundation: Foundation) -> None:
    about = {"study": "lungs: two", "sites": [], "privacy": "epsilon 8.", "rounds": 4}
    card = ModelCard(model_card(foundation=foundation, **about))
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert card.data.license == "apache-2.0"
    assert hub_licence("Study only") == ("other", "Study only")
    assert card.text.strip().startswith("# lungs: two")


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_are_as_readable_as_the_umask_says(
    foundation: Foundation, state: dict[str, Tensor], tmp_path: Path, umask: int
) -> None:
    """safetensors writes through temporary files that only their owner may read."""
    before = os.umask(umask)
    try:
        save_pipeline(tmp_path / "out", foundation, adapter=CONFIG, state=state, card="")
        save_lora(tmp_path / "adapter.safetensors", state)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


@pytest.fixture
def shared(foundation: Foundation, state: dict[str, Tensor], tmp_path: Path) -> Path:
    """An export of a study, with its record."""
    record = GeneratorRecord(
        study="lungs", plan_hash="ab" * 32, rounds=3, privacy="epsilon at most 3",
        foundation=foundation.manifest.name, foundation_hash=foundation.manifest.hash,
    )  # fmt: skip
    out = tmp_path / "shared"
    save_pipeline(out, foundation, adapter=CONFIG, state=state, card="", record=record)
    return out


def test_images_of_an_export_name_study_plan_and_promise(
    shared: Path, foundation: Foundation
) -> None:
    origin = read_origin(shared)
    assert (origin.generator, origin.study, origin.plan_hash) == ("shared", "lungs", "ab" * 32)
    assert (origin.privacy, origin.foundation_hash) == (
        "epsilon at most 3", foundation.manifest.hash,
    )  # fmt: skip
    assert [p.text for p in trained_prompts(shared)] == [p.text for p in foundation.prompt_bank]
    assert origin.generator_hash == parts_hash(shared) != parts_hash(foundation.path)
    DiffusionPipeline.from_pretrained(shared)  # stock diffusers passes over the record


@pytest.mark.parametrize("damage", ["tokenizer", "scheduler/scheduler_config.json"])
def test_a_copy_that_is_not_whole_draws_nothing(shared: Path, damage: str) -> None:
    """The libraries make a tokenizer that knows no word, and noise of their own defaults."""
    (shared / "README.md").write_text("Ours now.")
    (shared / "note.txt").write_text("Nor does this decide what it draws.")
    assert read_origin(shared).study == "lungs"
    if damage == "tokenizer":
        for path in (shared / damage).iterdir():
            path.unlink()
    else:
        (shared / damage).write_text("{}")
    with pytest.raises(CraftsError, match="not as it was exported"):
        read_origin(shared)


def test_a_generator_whose_tokenizer_has_no_files_is_refused(
    exported: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    for path in (copy / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(FoundationError, match=r"tokenizer cannot be read .*knows no words"):
        Generator.from_directory(copy)


def test_settings_that_are_none_are_asked_of_nobody(exported: Path, tmp_path: Path) -> None:
    """The library would look for others on the hub."""
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    (copy / "unet" / "config.json").write_text("[]")
    with pytest.raises(FoundationError, match=r"unet cannot be read \(config.json holds no sett"):
        Generator.from_directory(copy)


@pytest.mark.parametrize(
    "asked",
    [
        {"_attn_implementation": "evil/kernel@main"},
        {"vision_config": {"attn_implementation": "evil/kernel@main"}},
        {"attn_implementation": {"": "evil/kernel@main"}},
    ],
)
def test_code_that_a_config_names_is_not_fetched(
    exported: Path, tmp_path: Path, asked: dict[str, object]
) -> None:
    """Transformers would, from a repository, where the package ``kernels`` is installed."""
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    path = copy / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    with pytest.raises(FoundationError, match=r"names code to be downloaded, .*evil/kernel@main"):
        Generator.from_directory(copy)


def test_a_folder_that_is_no_generator_names_no_captions(tmp_path: Path) -> None:
    with pytest.raises(CraftsError, match="is no generator"):
        trained_prompts(tmp_path)


def test_a_weight_that_changed_is_another_generator(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    assert parts_hash(copy) == parts_hash(exported)
    (path,) = (copy / "unet").glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert parts_hash(copy) != parts_hash(exported)


def test_a_damaged_record_is_one_line(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    (copy / "generator.json").write_text('{"study": "x"}')
    with pytest.raises(CraftsError, match=r"generator\.json: .*; export it again"):
        read_origin(copy)


def test_the_embedded_foundation_loads_in_stock_diffusers_as_it_lies() -> None:
    """Once "Half and Float" without ``torch_dtype``: only transformers keeps the files' halves."""
    pipeline = DiffusionPipeline.from_pretrained(embedded_path())
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("H&E, lung", num_inference_steps=1, output_type="np").images[0]
    assert np.isfinite(image).all()
    assert image.std() > 0


def test_card_names_study_sites_and_promise(foundation: Foundation) -> None:
    card = model_card(
        study="lungs", foundation=foundation, sites=["north"], privacy="epsilon 8.", rounds=4
    )
    for part in ("lungs", "north", "epsilon 8.", "4 rounds", "synthetic", "our reading"):
        assert part in card
    early = model_card(
        *(), study="s", foundation=foundation, sites=[], privacy="p", rounds=3, planned_rounds=4
    )  # fmt: skip
    assert "3 of its plan's 4 rounds, which are not over" in early
