import stat
from pathlib import Path

import pytest

from crafts_client.errors import HomeError
from crafts_client.home import SiteConfig, SiteHome
from crafts_core.foundation import embedded_path
from support.sites import policy_of


def config(**changes: object) -> SiteConfig:
    values = {
        "name": "north",
        "cohort": "main",
        "declared_patients": 80,
        "device": "cpu",
        "foundation": "embedded",
        "tile_store": "tiles",
        "microbatch_tiles": 64,
    }
    return SiteConfig.model_validate(values | changes)


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    return SiteHome.create(tmp_path / "site", config(), policy_of("key"))


def test_a_home_comes_back_as_it_was_made(home: SiteHome) -> None:
    assert SiteHome.open(home.path) == home


def test_a_home_is_never_made_over_another(home: SiteHome) -> None:
    salt = home.salt_path.read_bytes()

    with pytest.raises(HomeError, match="already"):
        SiteHome.create(home.path, config(name="south"), policy_of("other"))
    assert home.salt_path.read_bytes() == salt
    assert SiteHome.open(home.path) == home


def test_a_home_that_was_interrupted_is_made_again_with_the_same_salt(home: SiteHome) -> None:
    salt = home.salt_path.read_bytes()
    (home.path / "site.toml").unlink()

    SiteHome.create(home.path, config(), policy_of("key"))

    assert home.salt_path.read_bytes() == salt


def test_only_the_owner_enters(home: SiteHome) -> None:
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(home.salt_path.stat().st_mode) == 0o600


def test_a_folder_that_was_there_becomes_the_owners(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    home = SiteHome.create(tmp_path / "open", config(), policy_of("key"))
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700


def test_a_missing_home_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match="crafts-client init"):
        SiteHome.open(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "north"', 'name = "../north"', "name"),
        ("declared_patients = 80", "declared_patients = 0", "declared_patients"),
        ('device = "cpu"', 'device = "tpu"', "device"),
        ('cohort = "main"\n', "", "cohort"),
        ('cohort = "main"', 'cohort = "main"\nsecret = 1', "secret: unknown key"),
        ('answer_every_s = "auto"', "answer_every_s = -1", '"auto" or a number'),
        ('answer_every_s = "auto"', 'answer_every_s = "often"', '"auto" or a number'),
        ('cohort = "main"', "cohort = ", "cannot read"),
    ],
)
def test_a_wrong_key_is_named(home: SiteHome, old: str, new: str, message: str) -> None:
    file = home.path / "site.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))

    with pytest.raises(HomeError, match=message):
        SiteHome.open(home.path)


def test_paths_start_from_the_home(home: SiteHome, tmp_path: Path) -> None:
    assert home.tile_store_path == home.path / "tiles"
    assert home.foundation_path == embedded_path()
    moved = SiteHome(
        path=tmp_path, config=config(foundation="own", tile_store="/data/t"), policy=home.policy
    )
    assert moved.foundation_path == tmp_path / "own"
    assert moved.tile_store_path == Path("/data/t")
