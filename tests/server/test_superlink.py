"""The real programs on loopback with TLS: coordinator, SuperNodes, executors, each a process.

Also the contract test of the private parts of Flower that both sides use.
"""

import io
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crafts_client.home import SiteHome
from crafts_core import bundle
from crafts_core.plan import Plan
from crafts_privacy.ledger import Ledger
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.pki import Pki
from crafts_server.superlink import MAX_BODY_BYTES, SuperLink
from support.sites import make_site_home, plan_values

pytestmark = [pytest.mark.network, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Programs:
    """The installed programs, started as a user starts them; all end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        roots = os.pathsep.join(path for path in sys.path if path)
        self._environment = os.environ | {
            "PYTHONPATH": roots,
            "OMP_NUM_THREADS": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def command(self, program: str, *arguments: object) -> list[str]:
        module = {"crafts-server": "crafts_server", "crafts-client": "crafts_client"}[program]
        start = f"from {module}.cli import app; app()"
        return [sys.executable, "-c", start, *map(str, arguments)]

    def run(self, program: str, *arguments: object) -> str:
        done = subprocess.run(
            self.command(program, *arguments),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, name: str, program: str, *arguments: object) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                self.command(program, *arguments), env=self._environment, stdout=log, stderr=log
            )

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log")
        )


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    programs = Programs(tmp_path)
    yield programs
    programs.stop()


def wait_for(condition, programs: Programs, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, programs.logs()
        time.sleep(0.5)


def test_a_study_over_the_network_survives_kills(tmp_path, foundation, programs) -> None:
    """Two hospitals enrol, join and train; coordinator and one site are killed in the middle."""
    home = CoordinatorHome.create(
        tmp_path / "coordinator",
        HomeConfig(
            foundation=str(foundation.path),
            hosts=("localhost",),
            listen="127.0.0.1",
            fleet_port=free_port(),
            enrolment_port=free_port(),
            registrar_port=free_port(),
        ),
    )
    server = ["--home", home.path]
    programs.start("coordinator", "crafts-server", "serve", *server)
    wait_for(
        lambda: b'"fleet"' in (tmp_path / "coordinator.log").read_bytes(), programs, seconds=60
    )
    sites = {}
    for index, name in enumerate(("north", "south")):
        site = make_site_home(
            *(tmp_path / name, foundation, home.public_key),
            name=name,
            seed=index,
            require_approval=True,
        )
        invited = json.loads(
            programs.run("crafts-server", "sites", "invite", name, "--json", *server)
        )
        words = invited["command"].split()[1:]
        programs.run("crafts-client", *words, "--home", site.path)
        checked = json.loads(programs.run("crafts-client", "doctor", "--json", *at(site)))
        assert {each["subject"] for each in checked} >= {"fleet", "clock", "registrar", "ledger"}
        assert not json.loads(programs.run("crafts-client", "status", "--json", *at(site)))[
            "running"
        ]
        programs.start(name, "crafts-client", "join", *at(site))
        sites[name] = site

    values = plan_values(foundation.manifest.hash)
    values["stage"][0]["rounds"] = 3
    values["aggregation"] |= {"min_sites": 2, "deadline_s": 300.0}
    plan = Plan.parse(values)
    file = tmp_path / "plan.json"
    file.with_suffix(".toml").write_text(_toml(values))
    programs.run("crafts-server", "train", file.with_suffix(".toml"), *server)
    for site in sites.values():
        programs.run("crafts-client", "plan", "approve", plan.hash[:12], *at(site))

    def rounds() -> int:
        runs = json.loads(programs.run("crafts-server", "runs", "list", "--json", *server))
        return max((run["rounds"] for run in runs), default=0)

    wait_for(lambda: rounds() >= 1, programs, seconds=180)
    programs.kill("coordinator")
    before = rounds()
    programs.start("coordinator", "crafts-server", "serve", *server)
    wait_for(lambda: rounds() > before, programs, seconds=240)
    wait_for(lambda: rounds() == plan.num_rounds, programs, seconds=300)
    wait_for(lambda: not list((home.path / "queue").iterdir()), programs, seconds=30)
    for name, site in sites.items():
        events = Ledger(site.ledger_path).events("main")
        assert len(events) == plan.num_rounds, f"{name} was charged once for each round"
        told = json.loads(programs.run("crafts-client", "status", "--json", *at(site)))
        assert (told["running"], told["rounds_answered"]) == (True, plan.num_rounds)
    programs.run("crafts-client", "leave", *at(sites["south"]))
    left = json.loads(programs.run("crafts-server", "sites", "list", "--json", *server))
    assert [site["revoked_at"] is None for site in left] == [True, False]
    text = programs.logs()
    assert "patient0" not in text
    assert "slide0" not in text


def at(site: SiteHome) -> tuple[str, str]:
    return "--home", str(site.path)


def _toml(values: dict) -> str:
    """Enough TOML for a plan."""
    lines = []
    for section, content in values.items():
        for table in content if isinstance(content, list) else [content]:
            head = f"[[{section}]]" if isinstance(content, list) else f"[{section}]"
            lines.append(head)
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[tuple[SuperLink, ssl.SSLContext]]:
    pki = Pki.create(tmp_path / "pki", ["localhost"])
    link = SuperLink(database=tmp_path / "link.db", pki=pki, host="127.0.0.1", port=0)
    link.start()
    yield link, ssl.create_default_context(cafile=str(pki.ca_path))
    link.stop()


def status(link, path: str, *, method: str = "POST", data: bytes = b"", **headers: str) -> int:
    server, context = link
    url = f"https://localhost:{server.port}{path}"
    body = data if method == "POST" else None
    request = urllib.request.Request(url, data=body, method=method, headers=headers)
    try:
        return urllib.request.urlopen(request, context=context, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_stranger_with_our_authority_finds_the_fleet_path_only(link) -> None:
    """Everything that the SuperLink's own app answers, asked for through the listener."""
    server, _ = link
    routes = [route.path for route in _routes(server)]
    assert any(path.startswith("/v1/control/") for path in routes), "the scan looks at something"
    for path in [*routes, "/", "/docs", "/v1/fleet/../control/list-runs", "/v1/fleet"]:
        if path.startswith("/v1/fleet/") and ".." not in path:
            continue
        assert status(link, path) == status(link, path, method="GET") == 404, path
    for path in ("/v1/fleet/register-node", "/v1/fleet/unregister-node"):
        assert status(link, path) == 404
    # Nodes' own calls ask who it is.
    protobuf = {"Content-Type": "application/protobuf"}
    assert status(link, "/v1/fleet/pull-messages", **protobuf) == 401
    assert status(link, "/v1/fleet/get-fab", **protobuf) == 401


def _routes(server: SuperLink) -> list:
    from fastapi.routing import iter_route_contexts
    from flwr.superlink.main import create_app

    return [context.original_route for context in iter_route_contexts(create_app().routes)]


def test_a_body_without_an_end_or_too_long_is_not_read(link) -> None:
    huge = {"Content-Length": str(MAX_BODY_BYTES + 1)}
    assert status(link, "/v1/fleet/push-object", **huge) == 413


def zipped(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/"), text)
    return buffer.getvalue()


OURS = {"pyproject.toml": bundle.TEXT, ".info__CONTENT": ""}


def saying(text: str) -> bytes:
    return zipped(**OURS | {"pyproject.toml": text})


@pytest.mark.parametrize(
    ("content", "accepted"),
    [
        (zipped(**OURS), True),
        (zipped(**OURS, **{"crafts_client__client_app.py": "import os"}), False),
        (zipped(**OURS, **{"torch.py": ""}), False),
        (
            zipped(**OURS | {"pyproject.toml": bundle.TEXT.replace("crafts_client.", "evil.")}),
            False,
        ),
        (zipped(**OURS | {"pyproject.toml": bundle.TEXT.replace('"0.', '"9.')}), False),
        (
            zipped(**OURS | {"pyproject.toml": bundle.TEXT + "\n[tool.flwr.app.config]\nx = 1"}),
            False,
        ),
        (zipped(**OURS | {".info__CONTENT": "x" * 100_000}), False),
        (b"no archive", False),
        (b"", False),
    ],
)
def test_only_the_installed_versions_bundle_is_ours(content: bytes, accepted: bool) -> None:
    assert bundle.is_ours(content) is accepted
