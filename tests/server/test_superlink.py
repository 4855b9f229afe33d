"""The real programs on loopback with TLS: coordinator, SuperNodes, executors, each a process.

Also the contract test of the private parts of Flower that both sides use.
"""

import io
import json
import sqlite3
import urllib.error
import urllib.request
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from sqlalchemy.exc import OperationalError
from typer import Typer
from typer.testing import CliRunner

from crafts_client.cli import app as crafts_client
from crafts_client.home import SiteHome
from crafts_core import bundle
from crafts_core.plan import Plan
from crafts_privacy.ledger import Ledger
from crafts_server.cli import app as crafts_server
from crafts_server.errors import ServerError
from crafts_server.home import CoordinatorHome
from crafts_server.superlink import SuperLink
from crafts_simulations.processes import Programs, loopback_config
from crafts_simulations.small_study import DECLARED_PATIENTS
from support.disk import fill_disk, full_disk
from support.sites import make_site_home, plan_values
from support.superlinks import admitted_nodes, connected, link, new_key, openssh
from support.toml_text import toml_text

__all__ = ["link"]

pytestmark = [pytest.mark.network, pytest.mark.slow]


def test_a_study_over_the_network_survives_kills(tmp_path, foundation, database) -> None:
    """Two hospitals enrol, approve and train by command; coordinator and a site are killed."""
    config = loopback_config(foundation.path).model_copy(update={"registry": database})
    home = CoordinatorHome.create(tmp_path / "coordinator", config)
    server = ("--home", str(home.path))
    sites = {
        name: make_site_home(
            *(tmp_path / name, foundation, home.public_key),
            name=name,
            seed=seed,
            require_approval=True,
        )
        for seed, name in enumerate(("north", "south"))
    }
    values = plan_values(foundation.manifest.hash)
    values["stage"] = [values["stage"][0] | {"rounds": 2}]
    values["aggregation"] |= {"min_sites": 2, "deadline_s": 300.0}
    plan, file = Plan.parse(values), tmp_path / "plan.toml"
    file.write_text(toml_text(values))
    paths = {name: site.path for name, site in sites.items()}
    with Programs(home, paths, tmp_path / "logs") as programs:
        programs.start_coordinator()
        ports = config.fleet_port, config.enrolment_port, config.registrar_port
        programs.wait(
            lambda: listening(programs.pid("coordinator")) == {*ports, config.metrics_port},
            "other ports than those that it names",
            within_s=60,
        )
        run(crafts_server, "plan", "sign", file, *server)
        for name, site in sites.items():
            invited = run(
                crafts_server,
                "sites",
                "invite",
                name,
                "--patients",
                DECLARED_PATIENTS,
                "--json",
                *server,
            )
            words = json.loads(invited)["command"].split()[1:]
            run(crafts_client, *words, *at(site))
            checked = json.loads(run(crafts_client, "doctor", "--json", *at(site)))
            assert {each["subject"] for each in checked} >= {"fleet", "clock", "registrar"}
            doubts = {each["subject"]: each["verdict"] for each in checked}
            doubts = {name: verdict for name, verdict in doubts.items() if verdict != "ok"}
            # Tests declare another number than the true one, do not wait, and were not audited.
            assert doubts == dict.fromkeys(("data", "answers", "audit"), "warning")
            run(crafts_client, "plan", "approve", plan.hash, *at(site))
            programs.start_site(name)
        run(crafts_server, "train", file, *server)

        def rounds() -> int:
            return len(programs.chain(plan)) - 1

        programs.wait(lambda: rounds() >= 1, "no round", within_s=180)
        programs.kill("coordinator")
        programs.kill("south")
        before = rounds()
        programs.start_coordinator()
        programs.start_site("south")
        programs.wait(lambda: rounds() > before, "no further round", within_s=300)
        programs.wait(lambda: programs.is_finished(plan), "no end", within_s=300)
        assert rounds() == plan.num_rounds
        for name, site in sites.items():
            events = Ledger(site.ledger_path).events("main")
            assert len(events) == plan.num_rounds, f"{name} was charged once for each round"
            told = json.loads(run(crafts_client, "status", "--json", *at(site)))
            assert (told["running"], told["rounds_answered"]) == (True, plan.num_rounds)
        port = home.config.metrics_port
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read()
        assert b"crafts_sites_online 2.0" in metrics
        run(crafts_client, "leave", "--yes", *at(sites["south"]))
        listed = json.loads(run(crafts_server, "sites", "list", "--json", *server))["sites"]
        assert [site["revoked_at"] is None for site in listed] == [True, False]
    events = [entry.event for entry in home.audit_log.verify()]
    assert events.count("round committed") == plan.num_rounds
    assert {"plan signed", "site enrolled", "plan finished", "site left"} <= set(events)
    said = "".join(programs.log(name) for name in ("coordinator", "north", "south"))
    assert "patient0" not in said
    assert "slide0" not in said


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str:
    """PostgreSQL, as a large coordinator has it; SQLite where none can be started."""
    try:
        return request.getfixturevalue("postgres").new_database()
    except pytest.skip.Exception:
        return "sqlite"


def listening(pid: int) -> set[int]:
    """The TCP ports that a process listens on (Linux)."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            links.append(str(descriptor.readlink()))
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return {
        int(fields[1].rpartition(":")[2], 16)
        for fields in lines
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in links
    }


def run(program: Typer, *words: object) -> str:
    """A command beside the running programs."""
    done = CliRunner().invoke(program, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


def at(site: SiteHome) -> tuple[str, str]:
    return "--home", str(site.path)


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


def test_a_dismissed_key_never_comes_back_and_keeps_nobody_out(link) -> None:
    server, _ = link
    old, other, new = (openssh(new_key()) for _ in range(3))
    server.admit_only({"north": old})
    server.admit_only({})
    with pytest.raises(ServerError, match="north was revoked"):
        server.admit("north", old)
    server.admit_only({"north": old, "south": other})
    assert admitted_nodes(server) == {"south"}
    server.admit_only({"north": new, "south": other})
    nodes = {n.name: n.node_id for n in server.state.get_node_info(statuses=["registered"])}
    assert nodes.keys() == {"north", "south"}
    assert server.site_of(nodes["north"]) == "north"


def asked(grid: Grid, node_id: int) -> str:
    """The id of a message to a node."""
    content = RecordDict({"request": ConfigRecord({"please": 1})})
    (message_id,) = grid.push_messages(
        [Message(content, dst_node_id=node_id, message_type="train")]
    )
    return message_id


def test_a_node_waits_for_a_coordinator_whose_disk_is_full(link) -> None:
    """It tries again after 503; after Flower's own 500 it would end."""
    server, _ = link
    with connected(server) as calls, server.grid() as grid:
        node_id, receive, *_ = calls
        message_id = asked(grid, node_id)
        timer = fill_disk(for_s=0.5)
        message, _ = receive()
        timer.join()
        assert message.metadata.message_id == message_id


def test_what_was_delivered_is_not_lost_with_its_count(link) -> None:
    server, _ = link
    with server.grid() as grid, full_disk():
        server.state.store_traffic(grid.run.run_id, bytes_sent=1, bytes_recv=1)
        server.state.add_clientapp_runtime(grid.run.run_id, 1.0)


def test_a_reply_that_was_not_handed_out_is_there_the_next_time(link, monkeypatch) -> None:
    """The state fails between the claim of a reply and its end."""
    server, _ = link
    with connected(server) as calls, server.grid() as grid:
        node_id, receive, send, _run, _fab, _pull, push_object, _confirm = calls
        message_id = asked(grid, node_id)
        message, _ = receive()
        reply = Message(Error(100, "no"), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        _, session = send(reply, get_object_tree(reply), 1.0)
        push_object(grid.run.run_id, session, reply.object_id, reply.deflate())

        def busy(message_ins_ids: set[str]) -> None:
            if message_ins_ids:
                raise OperationalError("DELETE", {}, sqlite3.OperationalError("database is locked"))

        with monkeypatch.context() as patch:
            patch.setattr(server.state, "delete_messages", busy)
            with pytest.raises(OperationalError):
                grid.pull_messages([message_id])
        (answer,) = grid.pull_messages([message_id])
        assert answer.error.code == 100


def zipped(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/"), text)
    return buffer.getvalue()


OURS = {"pyproject.toml": bundle.TEXT, ".info__CONTENT": ""}


@pytest.mark.parametrize(
    ("content", "accepted"),
    [
        (zipped(**OURS), True),
        (zipped(**OURS, **{"crafts_client__client_app.py": "import os"}), False),
        (zipped(**OURS, **{"torch.py": ""}), False),
        (zipped(**OURS, **{"payload.py": ""}), False),
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
