"""A site's executor on a real SuperNode, under a coordinator that sends code."""

import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp
from flwr.proto.runtime_pb2 import AcquireTaskResponse
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.servicer.fleet import fleet_handlers

from crafts_client import supernode
from crafts_client.coordinator_record import CoordinatorRecord
from crafts_client.errors import EnrolmentError, HomeError, RevokedError
from crafts_client.home import SiteConfig, SiteHome
from crafts_client.running import is_running
from crafts_client.supernode import BUNDLE_REFUSED, Executor
from crafts_core import bundle
from crafts_server import superlink
from crafts_server.pki import Pki
from crafts_server.superlink import SuperLink
from support.proxy import FAR, Proxy
from support.sites import policy_of

RECORD = CoordinatorRecord(
    site="north",
    signer="A" * 43 + "=",
    registrar_address="localhost:1",
    ca_fingerprint="0" * 64,
    fleet_address="localhost:1",
)
PATIENCE_S = 150.0
"""A SuperNode starts in seconds; on a machine that many share, in a minute."""
EVIL = "import pathlib; pathlib.Path('{marker}').touch()\napp = None\n"


@pytest.fixture
def link(tmp_path: Path) -> Iterator[SuperLink]:
    pki = Pki.create(tmp_path / "pki", ["localhost"])
    link = SuperLink(database=tmp_path / "link.db", pki=pki, host="127.0.0.1", port=0)
    link.start()
    yield link
    link.stop()


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    config = SiteConfig(
        name="north",
        cohort="main",
        declared_patients=6,
        device="cpu",
        foundation="embedded",
        tile_store="tiles",
        microbatch_tiles=1,
    )
    return SiteHome.create(tmp_path / "north", config, policy_of("key"))


@pytest.fixture
def joined(link, home, tmp_path) -> Iterator[list[str]]:
    """A site that takes part; the list grows with every message that its app sees."""
    with taking_part(link, home, tmp_path / "pki" / "ca.crt", "localhost") as seen:
        yield seen


@contextmanager
def taking_part(link: SuperLink, home: SiteHome, ca: Path, host: str) -> Iterator[list[str]]:
    keys = home.path / "keys"
    keys.mkdir()
    shutil.copy(ca, keys / "ca.crt")
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (keys / "node.key").write_bytes(private)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    link.admit("north", public)
    record = RECORD.model_copy(update={"fleet_address": f"{host}:{link.port}"})
    seen: list[str] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(str(context.node_config["site-home"]))
        return Message(RecordDict({"reply": ConfigRecord({"fine": True})}), reply_to=message)

    stop = threading.Event()
    site = threading.Thread(target=supernode.join, args=(home, record, app, stop, lambda: None))
    site.start()
    try:
        yield seen
    finally:
        stop.set()
        site.join(timeout=PATIENCE_S)
    assert not site.is_alive()


def ask(grid: Grid, message_type: str = "train") -> Message:
    deadline = time.monotonic() + PATIENCE_S
    while not (nodes := list(grid.get_node_ids())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    content = RecordDict({"request": ConfigRecord({"please": 1})})
    message = Message(content, dst_node_id=nodes[0], message_type=message_type)
    (number,) = grid.push_messages([message])
    while not (replies := list(grid.pull_messages([number]))):  # Flower's own way looks every 3 s
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return replies[0]


def built(folder: Path, **files: str) -> Fab:
    """A bundle as Flower's own command builds it, with these files beside a good declaration."""
    folder.mkdir()
    for name, text in ({"pyproject.toml": bundle.TEXT} | files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    content = build_fab_from_disk(folder)
    return Fab(sha256(content).hexdigest(), content, {})


@pytest.mark.slow
@pytest.mark.network
def test_what_a_coordinator_sends_is_never_run(link, joined, home, tmp_path, monkeypatch) -> None:
    """Bundles with code beside our names; then an honest one, which the same node answers.

    What else is no bundle of ours: ``test_only_the_installed_versions_bundle_is_ours``.
    """
    marker = tmp_path / "code-ran"
    evil = EVIL.format(marker=marker)
    hostile = {
        "code beside a good declaration": built(tmp_path / "a", **{"payload.py": evil}),
        "a module that shadows torch": built(tmp_path / "b", **{"torch.py": evil}),
    }
    for what, fab in hostile.items():
        monkeypatch.setattr(superlink, "_bundle", lambda fab=fab: fab)
        with link.grid() as grid:
            reply = ask(grid)
        assert reply.has_error(), what
        assert reply.error.code == BUNDLE_REFUSED.code, what
    assert joined == []
    assert not marker.exists()
    monkeypatch.undo()
    with link.grid() as grid:
        assert ask(grid).content["reply"]["fine"] is True
    with link.grid() as grid:
        assert ask(grid, "query.something").error.code == 100, "a kind that the app does not have"
    assert joined == [str(home.path.resolve())]
    assert is_running(home)
    with pytest.raises(HomeError, match="another crafts-client join"):
        supernode.join(home, None, None, threading.Event(), lambda: None)
    assert (home.path / "keys" / "executor.secret").stat().st_mode & 0o77 == 0


@pytest.mark.slow
@pytest.mark.network
def test_a_message_whose_run_ends_while_it_is_fetched_is_not_waited_for(
    link, joined, monkeypatch, caplog
) -> None:
    """As when a coordinator is killed in a round: Flower keeps the task, without its message."""
    ended = threading.Event()
    with link.grid() as first:
        run_id = first.run.run_id
        check_abort = fleet_handlers.check_abort

        def over(asked_for: int, *words: object) -> str | None:
            """Finished, for whoever fetches a part of the first run's message."""
            if asked_for == run_id and sys._getframe(1).f_code.co_name == "pull_object":
                ended.set()
                return "Run is finished."
            return check_abort(asked_for, *words)

        monkeypatch.setattr(fleet_handlers, "check_abort", over)
        deadline = time.monotonic() + PATIENCE_S
        while not (nodes := list(first.get_node_ids())):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        content = RecordDict({"request": ConfigRecord({"please": 1})})
        first.push_messages([Message(content, dst_node_id=nodes[0], message_type="train")])
        assert ended.wait(PATIENCE_S)
    monkeypatch.undo()
    with link.grid() as second:
        assert ask(second).content["reply"]["fine"] is True
    assert "a task was lost on the way: LostTaskError" in caplog.text
    assert len(joined) == 1


@pytest.mark.slow
@pytest.mark.network
def test_the_rounds_go_through_a_proxy_and_nothing_on_loopback_does(
    home, tmp_path, monkeypatch
) -> None:
    pki = Pki.create(tmp_path / "named", [FAR])
    link = SuperLink(database=tmp_path / "named.db", pki=pki, host="127.0.0.1", port=0)
    link.start()
    with Proxy() as proxy:
        for variable in ("HTTPS_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, proxy.address)
        monkeypatch.setenv("no_proxy", ".hospital.org")
        with taking_part(link, home, pki.ca_path, FAR) as seen, link.grid() as grid:
            assert ask(grid).content["reply"]["fine"] is True
    assert len(seen) == 1
    assert set(proxy.asked) == {f"{FAR}:{link.port}"}
    link.stop()


@pytest.mark.network
def test_no_proxy_is_asked_for_the_supernode_that_is_awaited_and_one_line_says_so(
    monkeypatch, caplog
) -> None:
    caplog.set_level("INFO", supernode.__name__)
    with socket.create_server(("127.0.0.1", 0)) as nobody, Proxy() as proxy:
        port = nobody.getsockname()[1]
        nobody.close()
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        executor = Executor(port, b"secret", ClientApp())
        assert not executor.work_once()
        assert not executor.work_once()
        assert caplog.messages == [f"waiting for the SuperNode on 127.0.0.1:{port} (ConnectError)"]
        monkeypatch.setattr(
            supernode.RuntimeHttpClient, "AcquireTask", lambda *_: AcquireTaskResponse()
        )
        assert not executor.work_once()
        assert caplog.messages[1:] == [
            "the SuperNode answers; waiting for a round of the coordinator"
        ]
        executor.close()
    assert proxy.asked == []


def test_what_httpx_cannot_read_of_the_environment_harms_no_executor(monkeypatch) -> None:
    for variable in ("http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "socks5://proxy:port")
    monkeypatch.setenv("no_proxy", "[::1]")
    executor = Executor(1, b"secret", ClientApp())
    assert not executor.work_once()
    executor.close()


def test_a_proxy_that_cannot_be_read_is_told_before_anything_starts(home, monkeypatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:port")
    record = RECORD.model_copy(update={"fleet_address": f"{FAR}:1"})
    with pytest.raises(EnrolmentError, match="HTTPS_PROXY cannot be read"):
        supernode.join(home, record, ClientApp(), threading.Event(), lambda: None)
    assert not (home.path / "supernode.log").exists()


def test_no_task_but_a_client_apps_is_ever_asked_for(monkeypatch) -> None:
    """An agent, a connector or a model that a run carries waits for ever."""
    asked = []

    def acquire(_, request) -> AcquireTaskResponse:
        asked.append(list(request.supported_task_types))
        return AcquireTaskResponse()

    monkeypatch.setattr(supernode.RuntimeHttpClient, "AcquireTask", acquire)
    executor = Executor(1, b"secret", ClientApp())
    assert not executor.work_once()
    executor.close()
    assert asked == [[TaskType.CLIENT_APP]]


def test_an_answer_that_comes_too_late_ends_neither_the_site_nor_its_supernode(
    home, monkeypatch
) -> None:
    """The SuperNode forgets a task whose run is over while its answer is handed in."""

    def forgotten(*_: object) -> None:
        raise ObjectPushError("0" * 64, 1, "session")

    task = (None, None, None, Fab("", b"", {}))
    monkeypatch.setattr(
        supernode.RuntimeHttpClient, "AcquireTask", lambda *_: AcquireTaskResponse(token="t")
    )
    monkeypatch.setattr(supernode, "pull_task_input", lambda _: task)
    monkeypatch.setattr(supernode, "Message", lambda *_, **__: None)
    monkeypatch.setattr(supernode, "push_message", forgotten)
    executor = Executor(1, b"secret", ClientApp())
    assert executor.work_once()
    executor.close()

    (home.path / "keys").mkdir()
    node = supernode.SuperNode(home, RECORD)
    monkeypatch.setattr(node, "_answers", lambda: True)
    words = "echo ERROR: Failed to store object 0: not pre-registered; echo done; sleep 600"
    monkeypatch.setattr(node, "_command", lambda: ["sh", "-c", words])
    node.supervise()
    first = node._process
    while b"done" not in (home.path / "supernode.log").read_bytes():
        time.sleep(0.01)
    node.supervise()
    assert node._process is first
    node.stop()


def test_a_supernodes_log_is_read_once_and_may_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "supernode.log"
    path.write_bytes(b"Traceback of the process before\n")
    node = supernode.SuperNodeLog(path)
    with node.begin() as file:

        def look_after(text: bytes) -> tuple[bool, set[bytes]]:
            file.write(text)
            file.flush()
            node.look()
            return node.has_failed, node.ignored

        assert look_after(b"ERROR: Failed to store object 0\nRun ID 7 is gone. ") == (False, set())
        assert look_after(b"Ignoring message abc1.\nERR") == (False, {b"abc1"})
        file.truncate(0)  # as logrotate's copytruncate does
        assert look_after(b"ERROR\n") == (True, {b"abc1"})
    node.begin().close()
    node.look()
    assert (node.has_failed, node.ignored) == (False, set())


def test_a_supernode_that_lives_and_does_not_answer_is_replaced(home, monkeypatch) -> None:
    """As Flower's does when a link breaks within a TLS handshake."""
    (home.path / "keys").mkdir()
    node = supernode.SuperNode(home, RECORD)
    listener = socket.create_server(("127.0.0.1", node.port))  # open, and nobody accepts
    monkeypatch.setattr(supernode, "_ANSWERS_WITHIN_S", 0.2)
    monkeypatch.setattr(node, "_command", lambda: ["sleep", "600"])
    node.supervise()
    first = node._process
    node.supervise()
    assert node._process is first, "it may still be starting"
    node.silence_s = 0.0
    node.supervise()
    assert first.returncode == -9
    monkeypatch.setattr(supernode, "_BACK_OFF_S", 0.0)
    node.silence_s = 600.0
    words = "echo ERROR: SSL/TLS handshake error detected.; sleep 600"
    monkeypatch.setattr(node, "_command", lambda: ["sh", "-c", words])
    node.supervise()
    second = node._process
    assert second.poll() is None
    deadline = time.monotonic() + PATIENCE_S
    while second.poll() is None:
        assert time.monotonic() < deadline, "its connection has failed, and it stays"
        time.sleep(0.1)
        node.supervise()
    node.stop()
    listener.close()


@pytest.mark.slow
def test_a_site_that_is_revoked_while_it_takes_part_ends(home, monkeypatch) -> None:
    """Its SuperNode ends, as a revoked one does; whether it was for that, the registrar says."""
    (home.path / "keys").mkdir()
    monkeypatch.setattr(supernode.SuperNode, "_command", lambda _: ["false"])
    monkeypatch.setattr(supernode, "_BACK_OFF_S", 0.0)
    asked: list[int] = []

    def revoked_at_the_second_time() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise RevokedError("this certificate is revoked")

    with pytest.raises(RevokedError):
        supernode.join(home, RECORD, ClientApp(), threading.Event(), revoked_at_the_second_time)
    assert not is_running(home)
