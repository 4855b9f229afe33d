"""Folders of anybody's images beside folders and stores of real ones: figures, errors, the page."""

import base64
import json
import re
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import crafts
from crafts_core.cli import app
from crafts_core.evaluation.bench import Bench
from crafts_core.evaluation.figures import Comparison
from crafts_core.evaluation.table import remarks
from crafts_core.foundation import Foundation
from crafts_core.pages import png_uri
from crafts_core.provenance import read_provenance
from crafts_core.tiles import TileRecord, TileStore, TileStoreWriter, encode_tile

KINDS = ("lung with glands", "colon with sheets")


def folder(
    path: Path,
    seed: int,
    *,
    patients: int = 10,
    each: int = 3,
    says_patients: bool = True,
    caption: str | None = None,
) -> Path:
    """Images of 32 px in two kinds of other colour and grain, by class; with a table or without."""
    rng, rows = np.random.default_rng(seed), []
    for place in range(patients * each):
        kind = place % 2
        colour = np.array([[200, 120, 170], [140, 110, 190]])[kind]
        grain = rng.normal(0, 25, (32, 32, 1))
        if kind:
            grain = grain[::4, ::4].repeat(4, axis=0).repeat(4, axis=1)
        pixels = (colour + grain).clip(0, 255).astype(np.uint8)
        name = f"{'AB'[kind]}/{place:03}.png"
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / name)
        row = {"file": name, "label": "AB"[kind], "mpp": 1.0}
        row |= {"patient": f"{seed}-{place // each}"} if says_patients else {}
        row |= {"caption": caption or KINDS[kind]} if caption != "" else {}
        rows.append(row)
    if says_patients or caption != "":
        (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def store(path: Path, source: Path) -> Path:
    """A site's store of the images of a folder."""
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    with TileStoreWriter(path, cohort="x", tile_px=32, mpp=1.0) as writer:
        for row in rows:
            with Image.open(source / row["file"]) as image:
                pixels = np.asarray(image)
            tile = TileRecord(
                tile_id=row["file"], patient=row["patient"], case="c", slide="s", x=0, y=0,
                level0_width=1, level0_height=1, mpp=1.0, caption=row["caption"],
                label=row["label"], tissue_fraction=1, sharpness=1,
            )  # fmt: skip
            writer.add(tile, encode_tile(pixels))
    return path


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Paths: real images with patients and captions, the same as a store, images, plain images."""
    root = tmp_path_factory.mktemp("bench")
    real = folder(root / "real", 1)
    return SimpleNamespace(
        root=root,
        real=real,
        store=store(root / "store", real),
        images=folder(root / "images", 2, says_patients=False),
        plain=folder(root / "plain", 3, says_patients=False, caption=""),
        training=folder(root / "training", 4),
    )


def invoke(foundation: Foundation, command: str, *words: object) -> Result:
    options = ["--foundation", foundation.path, "--encoder", "orthogonal", "--num", 16]
    return CliRunner().invoke(app, [command, *map(str, [*words, *options])])


def measured(foundation: Foundation, *words: object) -> dict:
    result = invoke(foundation, "evaluate", *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def one_line(result: Result) -> str:
    assert result.exit_code == 1, result.output
    *warned, line = result.stderr.strip().splitlines()
    assert all("should not give the main figure" in each for each in warned)
    return line


@pytest.mark.slow
def test_plain_folders_are_measured_by_image(foundation: Foundation, at: SimpleNamespace) -> None:
    other = folder(at.root / "other", 5, says_patients=False, caption="")
    found = measured(foundation, other, "--real", at.plain, "--mpp", 1)
    assert [arm["name"] for arm in found["arms"]] == ["real", "images"]
    assert (found["resampled"], found["heldout_patients"], found["n"]) == ("image", 30, 30)
    assert found["arms"][1]["mmd2_interval"][0] <= found["arms"][1]["mmd2"]
    assert found["arms"][1]["alignment"] is None
    assert any("need captions of the real images" in line for line in found["not_measured"])
    told = "\n".join(remarks(Comparison.model_validate(found)))
    assert "nobody says whose the real images are: intervals are by image" in told
    assert "pixels of another" not in told


@pytest.mark.slow
def test_copies_of_an_image_are_no_other_patients(
    foundation: Foundation, at: SimpleNamespace, tmp_path: Path
) -> None:
    """Twice the same real images are as many patients, and intervals no narrower."""
    twice, other = tmp_path / "twice", tmp_path / "other"
    for side in "12":
        shutil.copytree(at.plain, twice / side)
    folder(other, 5, patients=8, says_patients=False, caption="")
    shutil.copy(other / "A/000.png", other / "A/copy.png")
    found = measured(foundation, other, "--real", twice, "--mpp", 1)
    assert (found["n_heldout"], found["heldout_patients"], found["n"]) == (60, 30, 25)
    assert (found["repeated_tiles"], found["repeated_images"]) == (30, 1)
    told = "\n".join(remarks(Comparison.model_validate(found)))
    assert "30 real images and 1 of those measured have the pixels of another one" in told


@pytest.mark.slow
def test_intervals_are_by_patient_where_somebody_says_whose(
    foundation: Foundation, at: SimpleNamespace
) -> None:
    """All figures of the images' row have one, and stand beside the baselines'."""
    pytest.importorskip("sklearn", reason="pip install 'crafts-federated[evaluation]'")
    found = measured(foundation, at.images, "--real", at.real, "--training", at.training)
    assert (found["resampled"], found["heldout_patients"]) == ("patient", 10)
    names = ["real", "foundation", "recoloured", "recoloured_by_caption", "images"]
    assert [arm["name"] for arm in found["arms"]] == names
    images = found["arms"][-1]
    for name in (
        "mmd2", "colour", "structure", "frechet", "kid", "precision", "recall", "density",
        "coverage", "shape_agreement", "colour_agreement", "drift",
    ):  # fmt: skip
        low, high = images[f"{name}_interval"]
        assert low <= images[name] + 1e-9
        assert images[name] <= high + 1e-9
    assert images["cmmd"] is None, "the encoder is no CLIP"
    assert images["alignment"]["captions"] == 2
    assert images["colour_agreement"] == 1.0
    assert images["drift"] == pytest.approx(0.0, abs=0.3)
    assert found["arms"][1]["drift"] > 0.3, "the foundation's weights are random"
    assert any(
        line.startswith("memorisation: needs the generator") for line in found["not_measured"]
    )


@pytest.mark.slow
def test_same_tissue_lies_within_the_floor(foundation: Foundation, at: SimpleNamespace) -> None:
    """Neither side knows the other's patients, and no pair of one image enters."""
    real, *_, images = measured(foundation, at.images, "--real", at.store)["arms"]
    assert images["mmd2_interval"][0] < real["mmd2_interval"][1]


@pytest.mark.slow
def test_the_library_measures_what_the_program_does(
    foundation: Foundation, at: SimpleNamespace, tmp_path: Path
) -> None:
    expected = measured(foundation, at.images, "--real", at.plain, "--mpp", 1)
    with pytest.warns(UserWarning, match="should not give the main figure"):
        found = crafts.evaluate(
            str(at.images), Path(at.plain), foundation=str(foundation.path), mpp=1.0,
            encoder="orthogonal", num=16, page=str(tmp_path / "page.html"),
        )  # fmt: skip
    assert json.loads(found.model_dump_json()) == expected
    assert (tmp_path / "page.html").stat().st_size > 10_000
    with pytest.raises(ValueError, match="max_tiles"):
        crafts.evaluate(at.images, at.real, max_tiles=1)


@pytest.mark.slow
def test_a_generator_is_measured_as_it_draws_for_people(
    foundation: Foundation, at: SimpleNamespace
) -> None:
    assert measured(foundation, at.images, "--real", at.real)["drawn_by"] == (
        "unipc, 10 steps, guidance 3"
    )
    other = ["--steps", 2, "--guidance", 1.5, "--scheduler", "ddim"]
    words = ["evaluate", at.images, "--real", at.real, *other]
    assert "drawn for this: ddim, 2 steps, guidance 1.5" in invoke(foundation, *words).stdout


def test_a_page_that_cannot_be_written_is_told_before_measuring(
    foundation: Foundation, at: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", at.images, "--real", at.real, "--page"]
    monkeypatch.setattr(Bench, "measure", pytest.fail)
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in one_line(
        invoke(foundation, *words, tmp_path / "file" / "page.html")
    )


@pytest.mark.parametrize(
    ("option", "told"),
    [(("--encoder", ""), "encoder"), (("--mpp", "nan"), "mpp")],
)
def test_settings_out_of_range_are_one_line(
    foundation: Foundation, at: SimpleNamespace, option: tuple[str, str], told: str
) -> None:
    words = ["evaluate", str(at.images), "--real", str(at.real), "--foundation"]
    result = CliRunner().invoke(app, [*words, str(foundation.path), *option])
    assert told in one_line(result)


def test_too_little_says_how_much_is_needed(
    foundation: Foundation, at: SimpleNamespace, tmp_path: Path
) -> None:
    few = folder(tmp_path / "few", 6, patients=3)
    told = one_line(invoke(foundation, "evaluate", at.images, "--real", few))
    assert f"{few}: expected tiles of at least 4 held-out patients, got 3" in told
    told = one_line(invoke(foundation, "evaluate", few, "--real", at.real))
    assert f"{few}: expected at least 16 images of at least 2 patients, got 9 of 3" in told
    (tmp_path / "empty").mkdir()
    told = one_line(invoke(foundation, "compare", tmp_path / "empty", "--real", at.real))
    assert "is no generator and holds no images" in told


def test_a_generator_needs_captions_to_draw_from(
    foundation: Foundation, at: SimpleNamespace
) -> None:
    words = ["evaluate", foundation.path, "--real", at.plain, "--mpp", 1]
    told = one_line(invoke(foundation, *words))
    assert "no captions to draw from; add a column caption" in told


def test_real_images_are_not_measured_against_themselves(
    foundation: Foundation, at: SimpleNamespace
) -> None:
    assert "30 images are also among the real ones" in one_line(
        invoke(foundation, "evaluate", at.real, "--real", at.real)
    )
    words = ["evaluate", at.images, "--real", at.real, "--training", at.real]
    assert "have 30 tiles and 10 patients in common" in one_line(invoke(foundation, *words))


@pytest.mark.slow
def test_compare_ranks_folders_beside_generators(
    foundation: Foundation, at: SimpleNamespace
) -> None:
    words = [foundation.path, at.images, "--real", at.real, "--device", "cpu"]
    found = invoke(foundation, "compare", *words)
    assert found.exit_code == 0, found.output
    header, floor, *ranked = found.stdout.splitlines()
    assert "smaller is nearer" in header
    assert "real tiles of other patients" in floor
    assert [line.split()[-2] for line in ranked] == [str(at.images), str(foundation.path)]
    assert one_line(invoke(foundation, "compare", *words[:-1], "warp")).startswith(
        "crafts: device warp cannot be used here"
    )


class TestPage:
    """One file that loads nothing, and whose tissue is shown only where somebody says so."""

    def page(self, foundation: Foundation, out: Path, *words: object) -> str:
        result = invoke(foundation, "evaluate", *words, "--page", out)
        assert result.exit_code == 0, result.output
        return out.read_text()

    def of_real(self, text: str, at: SimpleNamespace) -> int:
        """How many pictures are real tiles, as the store has them or as the folder."""
        kept = TileStore.open(at.store).read_images(np.arange(30))
        uris = {png_uri(image) for image in kept}
        uris |= {png_uri(np.asarray(Image.open(path))) for path in at.real.rglob("*.png")}
        return sum(uri in uris for uri in re.findall(r'src="([^"]+)"', text))

    @pytest.mark.slow
    def test_pictures_of_a_generator_say_what_they_are(
        self, foundation: Foundation, at: SimpleNamespace, tmp_path: Path
    ) -> None:
        """People save them from the page, which may be the first in its folder."""
        out = tmp_path / "new" / "p.html"
        text = self.page(foundation, out, foundation.path, "--real", at.real)
        for number, uri in enumerate(re.findall(r'src="data:image/png;base64,([^"]+)"', text)):
            saved = tmp_path / f"{number}.png"
            saved.write_bytes(base64.b64decode(uri))
            said = read_provenance(saved)
            assert said.origin.foundation_hash == foundation.manifest.hash
            assert (said.synthetic, said.index) == (True, number)

    @pytest.mark.slow
    def test_of_a_store_no_tissue_is_shown_by_itself(
        self, foundation: Foundation, at: SimpleNamespace, tmp_path: Path
    ) -> None:
        """Nor of a folder beside a generator, whose prompts are then public ones."""
        for subject, real in ((at.images, at.store), (foundation.path, at.real)):
            text = self.page(foundation, tmp_path / "p.html", subject, "--real", real)
            assert text.count("<img") == 16
            assert self.of_real(text, at) == 0
            is_folder = subject == at.images  # of anybody's images, patients' perhaps
            mode = stat.S_IMODE((tmp_path / "p.html").stat().st_mode)
            assert bool(mode & 0o077) != is_folder
            assert ("may show anybody" in text) == is_folder
        assert not any(kind in text for kind in KINDS)

    @pytest.mark.slow
    @pytest.mark.parametrize("show", ["real", "nearest"])
    def test_tissue_that_is_asked_for_is_the_owners_alone(
        self, foundation: Foundation, at: SimpleNamespace, tmp_path: Path, show: str
    ) -> None:
        out = tmp_path / "p.html"
        text = self.page(foundation, out, at.images, "--real", at.store, "--show", show)
        assert (text.count("<img"), self.of_real(text, at)) == (32, 16)
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        assert "Keep this page where the real images are kept" in text

    @pytest.mark.slow
    def test_two_folders_stand_side_by_side_and_no_caption_acts_on_the_page(
        self, foundation: Foundation, at: SimpleNamespace, tmp_path: Path
    ) -> None:
        hostile = '"><script src=https://x.example/a.js></script>\u202e'
        images = folder(tmp_path / "images", 7, says_patients=False, caption=hostile)
        text = self.page(foundation, tmp_path / "p.html", images, "--real", at.real)
        assert self.of_real(text, at) == 16
        assert "<script" not in text
        assert "\u202e" not in text
        assert set(re.findall(r'(?:src|href)="(\w+:)', text)) == {"data:"}
        assert "url(" not in text
        assert "@import" not in text


def test_show_goes_with_a_page(foundation: Foundation, at: SimpleNamespace) -> None:
    words = ["evaluate", at.images, "--real", at.real, "--show", "real"]
    assert invoke(foundation, *words).exit_code == 2


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="pip install 'crafts-federated[evaluation]'")
    guide = Path(__file__).parents[2] / "docs/evaluation.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    for seed, name in enumerate(("images-of-theirs", "real-tiles")):
        folder(tmp_path / name, seed, says_patients=False, caption="")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(guide), "exec"), {})
    assert (tmp_path / "evaluation.html").is_file()
    assert "structure" in capsys.readouterr().out
