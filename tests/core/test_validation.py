"""A ruler is judged by what it says of real tiles that were spoilt on purpose."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from crafts_core.cli import app
from crafts_core.errors import CraftsError
from crafts_core.evaluation import changes, validation_command
from crafts_core.evaluation.encoder import Features, Images, load_encoder
from crafts_core.evaluation.fidelity import Reference
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.evaluation.validation import (
    LEAST_SHARE,
    Validation,
    ValidationConfig,
    faults,
    validate,
    warning_of,
)
from crafts_core.evaluation.validation_tiles import ValidationTilesError, read_tiles
from support.salts import resalted

CONFIG = ValidationConfig(num_bootstrap=50, seed=3)


class Ruler:
    """An encoder that sees the mean colour, or steps: between neighbours, and at the middle."""

    input_px, mpp = 64, None

    def __init__(self, *, sees: str) -> None:
        self.name = sees
        self.hash = f"{len(sees):064d}"

    def embed(self, images_NHWC: Images, *, mpp: float) -> Features:
        assert mpp == 0.9
        density = -np.log((images_NHWC.astype(np.float64) + 1) / 256)
        if self.name == "colour":
            return density.mean((1, 2))
        standard = density / density.std((1, 2), keepdims=True)
        step = np.abs(np.diff(standard, axis=1)).mean((2, 3))
        return np.stack([step.mean(1), step[:, 31]], axis=1)


def _tiles(patients: int = 24, each: int = 4) -> RealTiles:
    """Smooth fields with grain; patients differ in stain and a little in grain, classes more."""
    rng = np.random.default_rng(0)
    images, names, classes = [], [], []
    for patient in range(patients):
        stain, grain = rng.uniform(0.8, 1.2, 3), rng.uniform(0.04, 0.044) * (1 + patient % 2)
        for _ in range(each):
            y, x = np.mgrid[:64, :64] / 14
            field = np.sin(x + rng.uniform(0, 6)) * np.sin(y + rng.uniform(0, 6))
            field += grain * rng.standard_normal((64, 64))
            density = (0.5 + 0.3 * field)[:, :, None] * stain
            images.append(np.rint(256 * np.exp(-density) - 1).astype(np.uint8))
            names.append(f"p{patient}")
            classes.append("fine" if patient % 2 else "coarse")
    return RealTiles(images_NHWC=np.stack(images), patients=np.array(names), captions=classes)


@pytest.fixture(scope="module")
def by_structure() -> Validation:
    return validate(
        Ruler(sees="structure"), _tiles(), CONFIG, mpp=0.9, reconstruct=lambda images: images
    )


@pytest.fixture(scope="module")
def by_colour() -> Validation:
    return validate(Ruler(sees="colour"), _tiles(), CONFIG, mpp=0.9)


def test_a_ruler_of_structure_passes(by_structure: Validation) -> None:
    assert by_structure.faults == ()
    assert by_structure.share("patches of 32 px shuffled") > 2 * LEAST_SHARE
    assert by_structure.share("recoloured") < by_structure.share("blurred")
    assert by_structure.share("wrong class") > 0.2


def test_a_ruler_of_colour_is_found_out(by_colour: Validation) -> None:
    blind, stain, *_ = by_colour.faults
    assert "structure hardly stands out" in blind
    assert "goes by the stain" in stain


def test_what_is_not_changed_is_at_no_distance(by_structure: Validation) -> None:
    (same,) = (each for each in by_structure.answers if each.change == "through the VAE")
    assert same.distance == pytest.approx(0.0, abs=1e-9)
    assert same.matched_share == pytest.approx(0.0, abs=0.01)
    assert (by_structure.tiles, by_structure.patients, by_structure.classes) == (96, 24, 2)


def test_distances_are_told_in_that_between_two_patients(by_structure: Validation) -> None:
    """Of tiles of one patient as images and of another's as real ones, over all pairs."""
    tiles = _tiles()
    features = Ruler(sees="structure").embed(tiles.images_NHWC, mpp=0.9)
    reference = Reference.fit(features, tiles.patients)
    rows = [np.flatnonzero(reference.patient_M == patient) for patient in range(24)]
    kernel = reference.kernel(reference.features_MD, reference.features_MD)

    def within(own: np.ndarray) -> float:
        return float(np.mean([kernel[a, b] for a, b in itertools.permutations(own, 2)]))

    slow = [
        within(a) + within(b) - 2 * float(np.mean([kernel[i, j] for i in a for j in b]))
        for a, b in itertools.combinations(rows, 2)
    ]
    assert by_structure.two_patients == pytest.approx(np.mean(slow))
    for answer in by_structure.answers:
        assert answer.share == pytest.approx(answer.distance / by_structure.two_patients)


def test_colours_are_matched_beforehand_in_a_column_of_their_own(by_colour: Validation) -> None:
    """A ruler of colour then sees neither a stain nor a class that is one."""
    for answer in by_colour.answers:
        if answer.change in ("recoloured", "restained"):
            assert answer.matched_share is not None
            assert answer.matched_share < answer.share / 10
    assert [each.change for each in by_colour.answers if each.matched_share is None] == [
        "duplicates"
    ]


@pytest.mark.slow
def test_the_answer_does_not_depend_on_how_many_patients_there_are(
    by_structure: Validation,
) -> None:
    """Told in what halves of the patients differ by, four times the patients made it fourfold."""
    config = ValidationConfig(num_bootstrap=20, max_tiles=1000)
    many = validate(Ruler(sees="structure"), _tiles(96, each=2), config, mpp=0.9)
    assert (many.patients, by_structure.patients) == (96, 24)
    for change in ("patches of 32 px shuffled", "blurred", "wrong class"):
        assert by_structure.share(change) == pytest.approx(many.share(change), rel=0.2)


def test_too_few_patients_get_no_verdict() -> None:
    """Nor do many patients with one tile each: how far two lie apart is unknown."""
    with pytest.raises(ValueError, match=r"too few patients: expected 20 .* got 19"):
        validate(Ruler(sees="colour"), _tiles(patients=19), CONFIG, mpp=0.9)
    with pytest.raises(ValueError, match=r"too few patients: expected 20 .* got 0"):
        validate(Ruler(sees="colour"), _tiles(patients=60, each=1), CONFIG, mpp=0.9)


@pytest.mark.slow
def test_a_verdict_does_not_depend_on_the_sites_salt() -> None:
    """Another salt: other pseudonyms, hence another order of patients and rows."""
    tiles = _tiles(patients=30, each=3)
    config = ValidationConfig(num_bootstrap=20, max_tiles=72)
    found = [
        validate(Ruler(sees="structure"), each, config, mpp=0.9)
        for each in (tiles, resalted(tiles, 7))
    ]
    assert found[0].tiles == 72
    assert found[0] == found[1]


def test_copies_of_few_tiles_are_further_than_all_of_them(by_structure: Validation) -> None:
    assert by_structure.share("duplicates") > 0.02


@pytest.mark.parametrize(
    "shares, words",
    [
        ({}, []),
        ({"patches of 32 px shuffled": 0.019}, ["structure"]),
        ({"recoloured": 0.061}, ["stain"]),
        ({"restained": 0.061, "patches of 32 px shuffled": 0.002}, ["structure", "stain"]),
    ],
)
def test_the_gate(shares: dict[str, float], words: list[str]) -> None:
    answers = {
        "patches of 32 px shuffled": 0.021, "recoloured": 0.05, "restained": 0.05, "blurred": 0.06,
    }  # fmt: skip
    found = faults(answers | shares)
    assert len(found) == len(words)
    assert all(word in fault for word, fault in zip(words, found, strict=True))


def test_patients_that_do_not_differ_are_no_measure() -> None:
    """Each has the same four tiles, mirrored or not."""
    tiles = _tiles(patients=1)
    four = tiles.images_NHWC
    images = np.concatenate([four[:, ::-1], four] * 12)
    names = np.repeat([f"p{place}" for place in range(24)], 4)
    same = RealTiles(images_NHWC=images, patients=names, captions=["fine"] * 96)
    with pytest.raises(ValueError, match="patients do not differ"):
        validate(Ruler(sees="colour"), same, CONFIG, mpp=0.9)


def test_a_patient_gives_at_most_so_many_tiles() -> None:
    few = ValidationConfig(num_bootstrap=20, tiles_per_patient=2)
    assert validate(Ruler(sees="colour"), _tiles(), few, mpp=0.9).tiles == 48


class TestChanges:
    def test_shuffling_moves_whole_patches(self) -> None:
        images = np.random.default_rng(0).integers(256, size=(3, 70, 64, 3), dtype=np.uint8)
        mixed = changes.shuffled(images, 32, np.random.default_rng(1))
        assert mixed.shape == (3, 64, 64, 3)

        def patches(image: np.ndarray) -> list[bytes]:
            corners = [(y, x) for y in (0, 32) for x in (0, 32)]
            return [image[y : y + 32, x : x + 32].tobytes() for y, x in corners]

        for before, after in zip(images, mixed, strict=True):
            assert sorted(patches(before)) == sorted(patches(after))
        assert any(patches(a) != patches(b) for a, b in zip(images, mixed, strict=True))
        with pytest.raises(ValueError, match="at least two patches of 32 px"):
            changes.shuffled(images[:, :40, :40], 32, np.random.default_rng(1))

    @pytest.mark.parametrize("change", [changes.recoloured, changes.restained])
    def test_stain_changes_are_affine_in_density(self, change: object) -> None:
        rng = np.random.default_rng(0)
        shade = rng.integers(100, 180, size=(2, 32, 32, 1))
        images = (shade + rng.integers(-8, 9, size=(2, 32, 32, 3))).astype(np.uint8)
        before, after = (
            -np.log((each.reshape(-1, 3).astype(float) + 1) / 256)
            for each in (images, change(images))
        )
        design = np.c_[before, np.ones(len(before))]
        fitted = design @ np.linalg.lstsq(design, after, rcond=None)[0]
        np.testing.assert_allclose(fitted, after, atol=0.02)  # rounding to whole values
        assert np.abs(after - before).mean() > 0.05

    def test_blur_has_its_size_in_microns(self) -> None:
        edge = np.zeros((1, 96, 96, 3), np.uint8)
        edge[:, :, 48:] = 255
        for mpp in (0.35, 0.175):
            spread = np.diff(changes.blurred(edge, mpp=mpp)[0, 48, :, 0].astype(float))
            offset = np.arange(95) - 47
            sigma_px = np.sqrt((spread * offset**2).sum() / spread.sum())
            assert sigma_px * mpp == pytest.approx(changes.BLUR_UM, rel=0.05)


class TestTiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("a.png", "b.png", "c.png"):
            Image.new("RGB", (200, 160), "white").save(tmp_path / name)
        (tmp_path / "tiles.tsv").write_text(
            "file\tcase\torgan\tmpp\tsplit\n"
            "a.png\tone\tlung\t0.5\theld-out\n"
            "b.png\ttwo\tcolon\t\theld-out\n"
            "c.png\tthree\tcolon\t0.5\tbuild\n"
        )
        return tmp_path

    def test_a_folder_comes_at_one_scale_without_what_encoders_saw(self, folder: Path) -> None:
        """160 px at 0.5 are 80 at 1.0, of which 64 are whole patches."""
        tiles, scale = read_tiles(folder, mpp=1.0, at_mpp=1.0, largest_px=128)
        assert tiles.images_NHWC.shape == (2, 64, 64, 3)
        assert tiles.patients.tolist() == ["one", "two"]
        assert tiles.classes == ["lung", "colon"]
        assert scale == 1.0

    def test_what_is_missing_is_said(self, folder: Path) -> None:
        with pytest.raises(ValidationTilesError, match="give --mpp"):
            read_tiles(folder, mpp=None, at_mpp=1.0, largest_px=128)
        with pytest.raises(ValidationTilesError, match="at least 64 px"):
            read_tiles(folder, mpp=0.5, at_mpp=2.0, largest_px=128)
        (folder / "b.png").write_bytes(b"no image")
        with pytest.raises(ValidationTilesError, match=r"b\.png cannot be read"):
            read_tiles(folder, mpp=0.5, at_mpp=1.0, largest_px=128)
        (folder / "other.csv").write_text("file\n")
        with pytest.raises(CraftsError, match=r"needs one TSV or CSV, got other\.csv, tiles\.tsv"):
            read_tiles(folder, mpp=0.5, at_mpp=1.0, largest_px=128)


@pytest.mark.slow
def test_the_command_tells_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = _tiles(patients=20, each=2)
    rows = ["file\tpatient\tclass"]
    for place, image in enumerate(tiles.images_NHWC):
        Image.fromarray(image).save(tmp_path / f"{place}.png")
        rows.append(f"{place}.png\t{tiles.patients[place]}\t{tiles.captions[place]}")
    (tmp_path / "tiles.tsv").write_text("\n".join(rows))
    arguments = ["evaluate", "--validate", "--real", str(tmp_path), "--mpp", "1.0"]
    as_json = CliRunner().invoke(app, [*arguments, "--encoder", "orthogonal", "--json"])
    found = Validation.model_validate_json(as_json.stdout)
    assert found.faults
    monkeypatch.setattr(validation_command, "validate_on", lambda *_, **__: found)
    told = CliRunner().invoke(app, [*arguments, "--encoder", "orthogonal"])
    assert told.exit_code == 0, told.output
    assert "40 tiles of 20 patients in 2 classes, 64 px" in told.stdout
    assert "through the VAE" in told.stdout
    assert "colours matched" in told.stdout
    assert "not to be used as the main figure" in told.stdout


def test_what_is_known_of_an_encoder_is_told() -> None:
    warning = warning_of(load_encoder("orthogonal"))
    assert warning is not None
    assert "embedded-orthogonal-256 should not give the main figure" in warning
    assert warning_of(load_encoder("embedded")) is None
