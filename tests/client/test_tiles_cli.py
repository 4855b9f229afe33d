"""Looking at the tile store: counts, hashes and pictures that stay at the site."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from crafts_client.cli import app
from crafts_client.home import SiteHome
from crafts_client.ingest.deidentify import Salt
from crafts_core.foundation import Foundation
from support.sites import make_site_home


@pytest.fixture
def home(tmp_path: Path, foundation: Foundation) -> SiteHome:
    return make_site_home(tmp_path / "site", foundation, "key")


def run(home: SiteHome, *words: object):
    return CliRunner().invoke(app, ["tiles", *map(str, words), "--home", str(home.path)])


def test_tiles_are_counted_by_patient_and_label(home: SiteHome) -> None:
    told = json.loads(run(home, "stats", "--json").stdout)
    assert (told["tiles"], told["patients"]) == (18, 6)
    assert told["tiles_by_label"] == {"-": 18}
    assert "fewest_tiles_of_a_patient  3" in run(home, "stats").stdout


def test_a_changed_shard_is_named(home: SiteHome) -> None:
    assert run(home, "check").exit_code == 0
    shard = next(home.tile_store_path.rglob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(bytes(content))
    told = run(home, "check")
    assert told.exit_code == 1
    assert f"{shard.name} was changed" in told.output


def test_a_sheet_of_tiles_is_drawn_for_the_operator_alone(home: SiteHome, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    assert "9 of 18 tiles" in run(home, "show", out, "--number", 9).stdout
    assert out.stat().st_mode & 0o77 == 0
    with Image.open(out) as sheet:
        width, height = sheet.size
        assert width == height
        assert not sheet.info.get("Description")


def test_one_patients_tiles(home: SiteHome, tmp_path: Path, monkeypatch) -> None:
    """The operator says the hospital's name of the patient; the store knows the pseudonym."""
    monkeypatch.setattr(Salt, "patient_id", lambda _, name: {"Jane": "patient0002"}.get(name, "?"))
    out = tmp_path / "sheet.png"
    assert "3 of 3 tiles" in run(home, "show", out, "--patient", "Jane").stdout
    unknown = run(home, "show", out, "--patient", "Joe")
    assert unknown.exit_code == 1
    assert "no tile of patient Joe" in unknown.output
