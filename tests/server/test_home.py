"""What other users of the coordinator's machine may read: nothing."""

import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_core import durable
from crafts_core.plan import Plan
from crafts_server.cli import app
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.plan_queue import queue_plan
from crafts_server.service import Service
from support.sites import plan_values

SECRET = "postgresql+nosuchdriver://crafts:hunter2@localhost/crafts"


@pytest.fixture(autouse=True)
def _a_usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def home(tmp_path: Path, foundation) -> CoordinatorHome:
    config = HomeConfig(foundation=str(foundation.path))
    return CoordinatorHome.create(tmp_path / "coordinator", config)


def open_to_others(home: CoordinatorHome) -> set[str]:
    files = {path for path in home.path.iterdir() if path.is_file()}
    return {path.name for path in files | {home.path} if path.stat().st_mode & 0o077}


def test_nobody_else_reads_a_home_that_is_used(home, foundation) -> None:
    queue_plan(home, Plan.parse(plan_values(foundation.manifest.hash)))
    Service(home)._registry.close()
    made = {path.name for path in home.path.iterdir()}
    assert made >= {"coordinator.toml", "registry.db", "superlink.db", "audit.jsonl", "signing.key"}
    assert open_to_others(home) == set()


def test_files_are_closed_from_their_first_byte_on(home, foundation) -> None:
    """Before anything closes what is there."""
    queue_plan(home, Plan.parse(plan_values(foundation.manifest.hash)))
    assert open_to_others(home) == set()


def test_a_home_of_an_older_version_is_closed_by_serve(home) -> None:
    home.registry().close()
    for path in (home.path, home.path / "coordinator.toml", home.path / "registry.db"):
        path.chmod(path.stat().st_mode | 0o055)
    assert open_to_others(home) == {"coordinator.toml", "registry.db", "coordinator"}
    Service(home)._registry.close()
    assert open_to_others(home) == set()


def test_an_init_that_was_killed_anywhere_is_made_up_by_the_next(
    tmp_path: Path, foundation, monkeypatch
) -> None:
    """Half a signing key was taken for the key; a CA key without its certificate was in the way."""

    class KilledError(BaseException):
        pass

    config = HomeConfig(foundation=str(foundation.path))
    for last in range(100):
        path, left = tmp_path / str(last), iter(range(last))

        def killed(descriptor: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    os.ftruncate(descriptor, 0)
                raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "fsync", killed)
            try:
                CoordinatorHome.create(path, config)
                break
            except KilledError:
                pass
        home = CoordinatorHome.create(path, config)
        assert home.public_key
        assert home.pki.ca.not_valid_after_utc > datetime.now(UTC)
    assert last > 10


def test_the_password_of_the_registry_is_not_shown(tmp_path: Path) -> None:
    assert "hunter2" not in repr(HomeConfig(registry=SECRET))


@pytest.mark.parametrize("by", ["variable", "option"])
def test_the_registry_is_named_by_a_variable(tmp_path: Path, by: str) -> None:
    """And by an option, which says what is wrong with that."""
    where, url = ["init", "--home", str(tmp_path / "home")], f"sqlite:///{tmp_path / 'other.db'}"
    if by == "variable":
        done = CliRunner().invoke(app, where, env={"CRAFTS_REGISTRY": url})
    else:
        done = CliRunner().invoke(app, [*where, "--registry", url])
    assert (done.exit_code, done.stderr) == (0, "")
    assert CoordinatorHome.open(tmp_path / "home").config.registry == url


def init(home: Path, *options: str, code: int = 0, **variables: str) -> str:
    done = CliRunner().invoke(app, ["init", "--home", str(home), *options], env=variables)
    assert done.exit_code == code, done.output
    return done.stderr


@pytest.mark.parametrize("host", ["localhost:9000", "münchen.de", "", "a b"])
def test_a_host_that_no_site_could_reach_is_refused(tmp_path: Path, host: str) -> None:
    """A port in it made a coordinator whose invitations named two."""
    told = init(tmp_path / "home", "--host", host, code=1)
    assert "ports are keys of their own" in told
    assert "more)" not in told
    assert not (tmp_path / "home").exists()


def test_init_again_refuses_what_it_would_not_apply(tmp_path: Path) -> None:
    """It printed success, and the coordinator went on to say localhost to sites."""
    home = tmp_path / "home"
    init(home)
    before = (home / "coordinator.toml").read_text()
    init(home)
    init(home, "--host", "localhost")
    told = init(home, "--host", "coordinator.example.org", code=1)
    assert told.count("\n") == 1
    for words in ('hosts = ["coordinator.example.org"]', 'listen = "0.0.0.0"', "coordinator.toml"):
        assert words in told
    assert (home / "coordinator.toml").read_text() == before


def test_init_again_shows_no_password(tmp_path: Path) -> None:
    init(tmp_path / "home")
    told = init(tmp_path / "home", code=1, CRAFTS_REGISTRY=SECRET)
    assert "for another registry edit" in told
    assert "hunter2" not in told


def test_a_home_whose_listening_was_edited_starts_again(tmp_path: Path) -> None:
    """As in a container, where `init` comes before every start."""
    init(tmp_path / "home", "--host", "a.org")
    path = tmp_path / "home" / "coordinator.toml"
    path.write_text(path.read_text().replace("0.0.0.0", "10.0.0.5"))
    init(tmp_path / "home", "--host", "a.org")
    assert CoordinatorHome.open(tmp_path / "home").config.listen == "10.0.0.5"


def test_a_registry_that_cannot_be_opened_is_not_kept(tmp_path: Path) -> None:
    """Else a wrong password stayed for ever, whatever was said later."""
    init(tmp_path / "home", code=1, CRAFTS_REGISTRY=f"sqlite:///{tmp_path / 'none' / 'r.db'}")
    init(tmp_path / "home")
    assert CoordinatorHome.open(tmp_path / "home").config.registry == "sqlite"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "listen"),
    [
        ([], "127.0.0.1"),
        (["--host", "127.0.0.1", "--host", "localhost"], "127.0.0.1"),
        (["--host", "localhost", "--host", "10.0.0.5"], "0.0.0.0"),
        (["--host", "coordinator"], "0.0.0.0"),
        (["--listen", "0.0.0.0"], "0.0.0.0"),
        (["--host", "a.org", "--listen", "10.0.0.5"], "10.0.0.5"),
    ],
)
def test_only_who_is_reached_from_elsewhere_listens_there(
    tmp_path: Path, options: list[str], listen: str
) -> None:
    init(tmp_path / "home", *options)
    assert CoordinatorHome.open(tmp_path / "home").config.listen == listen


@pytest.mark.parametrize(
    "options",
    [["--host", "::1"], ["--host", "[::1]"], ["--listen", "::"], ["--listen", "bogus host"]],
)
def test_an_address_that_cannot_be_served_makes_no_home(tmp_path: Path, options: list[str]) -> None:
    """It made one that listened elsewhere, or could not be served, and stayed."""
    init(tmp_path / "home", *options, code=1)
    assert not (tmp_path / "home" / "coordinator.toml").exists()


def test_a_cluster_without_an_encoding_will_do(tmp_path: Path, postgres) -> None:
    """As initdb makes one where no locale is set, in a bare container."""
    bare = "TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'"
    config = HomeConfig(foundation="embedded", registry=postgres.new_database(bare))
    home = CoordinatorHome.create(tmp_path / "home", config)
    with home.registry() as registry:
        assert registry.runs() == []


def test_a_password_on_the_command_line_is_warned_of(tmp_path: Path, postgres) -> None:
    where, url = ["init", "--home", str(tmp_path / "home")], postgres.new_database()
    url = url.replace("postgres:@", "postgres:hunter2@")
    assert "hunter2" in url
    done = CliRunner().invoke(app, [*where, "--registry", url])
    assert done.exit_code == 0
    assert "give the URL by CRAFTS_REGISTRY" in done.stderr
    assert "hunter2" not in done.output
    quiet = CliRunner().invoke(app, where, env={"CRAFTS_REGISTRY": url})
    assert (quiet.exit_code, quiet.stderr) == (0, "")
