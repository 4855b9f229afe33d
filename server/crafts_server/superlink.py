"""Flower's SuperLink inside the coordinator's process, and a Grid on it.

All of the coordinator's private imports of Flower are here; ``tests/server/test_superlink.py`` is
their contract test. Flower's APIs share one port, and most of them would let whoever reaches it
start code at every site. So only what nodes need is reachable at all: one TLS listener that
answers what enrolled nodes POST below ``/v1/fleet/``, and 404 to everything else (``fleet_gate``).
The round loop talks to the same state by function calls: there is no control port and no executor
to protect.
"""

import logging
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import uvicorn
from cryptography.hazmat.primitives import serialization
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    TRANSPORT_TYPE_GRPC_RERE,
    SubStatus,
)
from flwr.server.superlink.linkstate import LinkState, SqlLinkState
from flwr.serverapp import Grid
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.supercore.date import now
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.servicer.runtime import runtime_handlers
from sqlalchemy.exc import OperationalError

from crafts_core import __version__, bundle
from crafts_server.errors import ServerError
from crafts_server.fleet_gate import MAX_CONNECTIONS, FleetGate, PunctualProtocol
from crafts_server.pki import Pki

log = logging.getLogger(__name__)

_HEARTBEAT_S = 20.0
_ADMITTED = [NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE]


class SuperLink:
    """The SuperLink, listening from ``start`` to ``stop``."""

    def __init__(self, *, database: Path, pki: Pki, host: str, port: int) -> None:
        """Open the state; nothing listens yet.

        Args:
            database: SQLite file of nodes, runs and messages under way.
            pki: Whose server certificate is shown.
            host: Address to bind.
            port: 0 takes a free one.
        """
        if not database.exists():
            database.touch(mode=0o600)
        config = SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host=host,
            port=port,
            insecure=False,
            certificates=None,
            superexec_auth_secret=None,
            authn_plugin=NoOpControlAuthnPlugin(),
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=True,
            fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            database=str(database),
            isolation="process",
            runtime_dependency_install=False,
        )
        app = create_app(config, _NothingElse)  # type: ignore[arg-type]  # our stand-in, see below
        self._factory = app.state.linkstate_factory
        _count_if_possible(self.state)
        self.gate = FleetGate(app, self._is_node)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self.gate,
                host=host,
                port=port,
                ssl_certfile=str(pki.folder / "server.crt"),
                ssl_keyfile=str(pki.folder / "server.key"),
                http=PunctualProtocol,
                ws="none",
                limit_concurrency=MAX_CONNECTIONS,
                log_config=None,
                access_log=False,
                server_header=False,
            )
        )
        self._thread = threading.Thread(target=self._server.run, name="superlink", daemon=True)

    @property
    def state(self) -> SqlLinkState:
        """Flower's state; its objects are safe to use from any thread."""
        return cast(SqlLinkState, self._factory.state())

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Listen.

        Raises:
            ServerError: the port is taken, or the certificate cannot be used.
        """
        self._thread.start()
        deadline = time.monotonic() + timeout_s
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                config = self._server.config
                raise ServerError(
                    f"cannot listen on {config.host}:{config.port} for sites; is another "
                    "coordinator running, or listen in coordinator.toml no address of this machine?"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """Finish what is being answered and close."""
        self._server.should_exit = True
        self._thread.join(timeout=30)

    def admit(self, site: str, node_public_key: str) -> None:
        """Let the node with this key (a line as in OpenSSH) connect. Again is fine.

        Raises:
            ServerError: the key was dismissed before.
        """
        key = _as_flower_has_it(node_public_key)
        if self.state.get_node_id_by_public_key(key) is None:
            try:
                self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=site)
            except ValueError as error:  # Flower never takes a key twice
                raise ServerError(f"the node key of {site} was revoked; enroll again") from error

    def admit_only(self, sites: Mapping[str, str]) -> None:
        """Let these sites' nodes (name to key) connect, and no other any more."""
        for site, key in sites.items():
            with suppress(ServerError):  # said when it enrolled; the others come in
                self.admit(site, key)
        keys = {_as_flower_has_it(key) for key in sites.values()}
        for node in self.state.get_node_info(statuses=_ADMITTED):
            if node.public_key not in keys:
                self.state.delete_node(NOOP_FLWR_AID, node.node_id)

    def site_of(self, node_id: int) -> str | None:
        """The name that a node was admitted under."""
        nodes = self.state.get_node_info(node_ids=[node_id])
        return nodes[0].name if nodes else None

    def connected_since(self, node_id: int) -> str | None:
        """When the node's present process said that it is there."""
        nodes = self.state.get_node_info(node_ids=[node_id])
        return nodes[0].last_activated_at if nodes else None

    @property
    def online(self) -> frozenset[str]:
        """Sites that are connected."""
        nodes = self.state.get_node_info(statuses=[NodeStatus.ONLINE])
        return frozenset(node.name for node in nodes if node.name)

    @contextmanager
    def grid(self) -> Iterator[Grid]:
        """A Grid for one run of the code-free bundle; the run ends with the context."""
        state = self.state
        fab = _bundle()
        state.store_app(
            fab=fab,
            federation_id=NOOP_FEDERATION_ID,
            app_id=f"@{bundle.PUBLISHER}/{bundle.NAME}",
            app_type=TaskType.SERVER_APP,
            added_by=NOOP_FLWR_AID,
        )
        run_id = state.create_run(
            f"{bundle.PUBLISHER}/{bundle.NAME}",
            __version__,
            fab.hash_str,
            {},
            NOOP_FEDERATION_ID,
            None,
            NOOP_FLWR_AID,
            TaskType.SERVER_APP,
        )
        (run,) = state.get_run_info(run_ids=[run_id])
        task_id = cast(int, run.primary_task_id)
        if not (state.claim_task(task_id) and state.activate_task(task_id)):
            raise ServerError("Flower did not start the run; see the log")
        TaskIdentity.task_id, TaskIdentity.run_id = task_id, run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        over = threading.Event()
        beating = threading.Thread(
            target=self._heartbeats, args=(task_id, over), name="run heartbeat", daemon=True
        )
        beating.start()
        grid = _StateGrid(state, task_id)
        grid.set_run(run)
        try:
            yield grid
        except BaseException:
            with suppress(
                OperationalError
            ):  # what is raised says more; heartbeats end the run, too
                state.finish_task(task_id, SubStatus.FAILED, "")
            raise
        else:
            state.finish_task(task_id, SubStatus.COMPLETED, "")
        finally:
            over.set()
            beating.join()

    def _is_node(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether an admitted node signed these headers just now.

        Flower asks the same, and for the node's number, once it has read the whole body.
        """
        try:
            key, signature = (
                b64decode(headers[name.lower().encode()], validate=True)
                for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
            )
            timestamp = headers[TIMESTAMP_HEADER.lower().encode()]
            age_s = (now() - datetime.fromisoformat(timestamp.decode("ascii"))).total_seconds()
        except (KeyError, ValueError, TypeError):
            return False
        if not -SYSTEM_TIME_TOLERANCE < age_s < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return False
        if self.state.get_node_id_by_public_key(key) is None:
            return False
        return verify_signature(bytes_to_public_key(key), timestamp, signature)

    def _heartbeats(self, task_id: int, over: threading.Event) -> None:
        while not over.wait(_HEARTBEAT_S):
            try:
                self.state.acknowledge_task_heartbeat(task_id)
            except Exception:  # a busy database now is answered by the next beat
                log.exception("a heartbeat of the run failed")


class _NothingElse:
    """Stands where Flower starts executors and older servers of its own: there are none."""

    def __init__(self, *_: object) -> None:
        pass

    def startup(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _count_if_possible(state: LinkState) -> None:
    """Let Flower's counting of bytes and seconds fail by itself.

    It comes last in a call, in a transaction of its own. A message that was delivered before would
    be lost with it.
    """

    def made_optional(count: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any, **kwargs: Any) -> None:
            with suppress(OperationalError):
                count(*args, **kwargs)

        return counted

    for name in ("store_traffic", "add_clientapp_runtime"):
        setattr(state, name, made_optional(getattr(state, name)))


class _StateGrid(HttpGrid):
    """Flower's Grid with function calls where it makes HTTP requests."""

    def __init__(self, state: SqlLinkState, task_id: int) -> None:
        super().__init__(token="in this process")  # noqa: S106  # no token is ever sent
        self._state, self._task_id = state, task_id

    @property
    def _runtime_client(self) -> Any:
        (task,) = self._state.get_tasks(task_ids=[self._task_id])
        return _InProcess(self._state, task)


class _InProcess:
    """The calls that the Grid makes, answered by the handlers that HTTP would reach."""

    def __init__(self, state: SqlLinkState, task: Any) -> None:
        self._state, self._task = state, task

    def GetNodes(self, request: Any) -> Any:  # noqa: N802
        return self._answer(runtime_handlers.get_nodes, request)

    def PushMessages(self, request: Any) -> Any:  # noqa: N802
        return self._answer(runtime_handlers.push_messages, request)

    def PushObject(self, request: Any) -> Any:  # noqa: N802
        return self._answer(runtime_handlers.push_object, request)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        return self._answer(runtime_handlers.pull_messages, request)

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        return self._answer(runtime_handlers.pull_object, request)

    def ConfirmMessageReceived(self, request: Any) -> Any:  # noqa: N802
        return self._answer(runtime_handlers.confirm_message_received, request)

    def _answer(self, handler: Callable[..., Any], request: Any) -> Any:
        """In one transaction: a reply that was claimed and not handed out would be lost."""
        with self._state.session():
            return handler(request, self._state, self._task)


def _as_flower_has_it(node_public_key: str) -> bytes:
    key = serialization.load_ssh_public_key(node_public_key.encode())
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _bundle() -> Fab:
    with TemporaryDirectory() as folder:
        (Path(folder) / bundle.FILE).write_text(bundle.TEXT, encoding="utf-8")
        content = build_fab_from_disk(Path(folder))
    return Fab(sha256(content).hexdigest(), content, {})
