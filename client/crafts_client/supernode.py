"""Flower's SuperNode beside us, and our executor on it.

All of the client's private imports of Flower are here; ``tests/server/test_superlink.py`` is their
contract test. The SuperNode (a stock process, outbound HTTPS only) keeps the connection; it is told
to start nothing (``--isolation process``). This process asks it for work on loopback with a secret
that no other user can read, takes client tasks only, compares the bundle with what is installed,
and calls the installed ClientApp: nothing that came over the network is ever imported.
"""

import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import httpx
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import SubStatus
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import (
    pull_task_input,
    push_message,
    push_task_output,
)

from crafts_client.client_app import HOME_KEY
from crafts_client.coordinator_record import CoordinatorRecord
from crafts_client.home import SiteHome
from crafts_client.proxies import environment_with, proxy_for
from crafts_client.running import the_only_one
from crafts_core import bundle

log = logging.getLogger(__name__)

BUNDLE_REFUSED = Error(115, "the run's bundle is not the installed version's; nothing was loaded")
_POLL_S = 0.5
_BACK_OFF_S = 20.0
"""Flower takes a node for online for a minute after it vanished, and refuses it meanwhile."""
_SILENCE_S = 45.0
"""A SuperNode takes up to half a minute to start on a busy machine."""
_ANSWERS_WITHIN_S = 5.0
_RUNTIME_TIMEOUT_S = 30.0
_RETRY_S = 120.0
"""The SuperNode may be started again while a task is worked on."""
_ANSWER_TOO_LATE = b"Failed to store object"
"""What a SuperNode says of an answer to a round that is over; it goes on."""
_IGNORED = re.compile(rb"Ignoring message ([^\s.]+)")
"""What it says of a message whose run ended before all of it came."""
_DIES_WITH_US = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, where there is one
except AttributeError:
    pass
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""A SuperNode that outlived us would keep the node's place, and no new one could connect."""
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class SuperNodeLog:
    """What the process that runs has written, each line read once: it may run for years."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._read = 0
        self.has_failed = False
        """Whether it wrote of an error: its connection ends then, and the rest lives on."""
        self.ignored: set[bytes] = set()

    def begin(self) -> BinaryIO:
        """The file for a new process to write to."""
        file = self._path.open("ab")
        with self._lock:
            self._read, self.has_failed, self.ignored = file.tell(), False, set()
        return file

    def look(self) -> None:
        """Read what is new."""
        with self._lock, self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._read:
                self._read = 0  # cut off, to save room
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                self.has_failed |= b"Traceback" in line or (
                    b"ERROR" in line and _ANSWER_TOO_LATE not in line
                )
                self.ignored.update(_IGNORED.findall(line))


class SuperNode:
    """The stock SuperNode process, started again whenever it ends."""

    def __init__(self, home: SiteHome, record: CoordinatorRecord) -> None:
        self._home, self._record = home, record
        self._proxy = proxy_for(record.fleet_address, os.environ)
        self.port = _free_port()
        self._secret_path = home.path / "keys" / "executor.secret"
        self.secret = secrets.token_bytes(32)
        self._secret_path.unlink(missing_ok=True)
        descriptor = os.open(self._secret_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.secret)
        self._process: subprocess.Popen[bytes] | None = None
        self._ended_at = -_BACK_OFF_S
        self._heard_at = 0.0
        self._log = SuperNodeLog(home.path / "supernode.log")
        self.silence_s = _SILENCE_S
        self.num_ended = 0
        """How often a process has ended that was not told to."""

    def supervise(self) -> None:
        """Start the process if it is not running or not working; call this every now and then.

        Flower's SuperNode gives up when a link breaks within a TLS handshake or the coordinator
        answers 500, and then hangs at its end: a process that is silent is taken for dead.
        """
        now = time.monotonic()
        if self._process is not None and self._process.poll() is None:
            if self._answers():
                self._heard_at = now
            self._log.look()
            if now - self._heard_at <= self.silence_s and not self._log.has_failed:
                return
            log.warning("the SuperNode failed and did not end (supernode.log); it is killed")
            self._process.kill()
            self._process.wait()
        if self._process is not None:
            log.warning(
                "the SuperNode ended with status %s (supernode.log); starting it again in %.0f s",
                self._process.returncode,
                _BACK_OFF_S,
            )
            self._process, self._ended_at = None, now
            self.num_ended += 1
        if now - self._ended_at < _BACK_OFF_S:
            return
        with self._log.begin() as log_file:
            self._process = subprocess.Popen(  # noqa: S603  # our own words, no shell
                self._command(),
                env=self._environment(),
                stdout=log_file,
                stderr=subprocess.STDOUT,
            )
        self._heard_at = now

    def ignores(self, message_id: str) -> bool:
        """Whether it will never have the whole of a message; its task is there all the same."""
        self._log.look()
        return message_id.encode() in self._log.ignored

    def _answers(self) -> bool:
        """Whether it speaks; one that hangs may keep its port open."""
        try:
            url = f"http://127.0.0.1:{self.port}/health"
            httpx.get(url, timeout=_ANSWERS_WITHIN_S, trust_env=False)
        except httpx.HTTPError:
            return False
        return True

    def stop(self) -> None:
        """End it politely, so that the coordinator knows at once."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _command(self) -> list[str]:
        keys = (self._home.path / "keys").resolve()
        options = {
            "--superlink": self._record.fleet_address,
            "--root-certificates": str(keys / "ca.crt"),
            "--auth-supernode-private-key": str(keys / "node.key"),
            "--isolation": "process",
            "--superexec-auth-secret-file": str(self._secret_path.resolve()),
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--node-config": f'{HOME_KEY}="{self._home.path.resolve()}"',
        }
        program = Path(sys.executable).with_name("flower-supernode")
        words = [str(program), *(word for pair in options.items() for word in pair)]
        return [sys.executable, "-c", _DIES_WITH_US, str(os.getpid()), *words]

    def _environment(self) -> dict[str, str]:
        """Flower reports nothing, looks for no update, installs nothing; our answer on proxies."""
        return environment_with(self._proxy, os.environ) | {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_HOME": str((self._home.path / "flower").resolve()),
        }


class LostTaskError(Exception):
    """The SuperNode has a task whose message never comes."""


class LoopbackClient(RuntimeHttpClient):
    """Speaks to the SuperNode beside us, whatever the environment says of proxies."""

    def __init__(
        self,
        port: int,
        interceptors: Sequence[ProtobufClientInterceptor],
        *,
        retry_s: float = 0.0,
        ignores: Callable[[str], bool] = lambda _message_id: False,
    ) -> None:
        # In place of Flower's own, which gives httpx the environment to read: a proxy for http://
        # would be asked for loopback, and one that httpx cannot read ends in an error here.
        self._base_url = f"http://127.0.0.1:{port}"  # TLS would guard nothing that tokens do not
        self._interceptors = (RuntimeVersionHttpInterceptor("crafts-client"), *interceptors)
        # Flower's own retries never end, and end this process when it is not authorised.
        self._retry_invoker = RetryInvoker(
            lambda: exponential(max_delay=5),
            httpx.TransportError,
            max_tries=None,
            max_time=retry_s,
        )
        self._client = httpx.Client(timeout=_RUNTIME_TIMEOUT_S, trust_env=False)
        self._ignores = ignores

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802  # Flower's
        """A part of a message. One that is not there yet is asked for again for hours.

        Raises:
            LostTaskError: it never will be there.
        """
        response = super().PullObject(request)
        if not response.object_available and self._ignores(request.object_id):
            raise LostTaskError
        return response


class Executor:
    """Takes the site's tasks one after the other; the ClientApp and its model stay warm."""

    def __init__(
        self,
        port: int,
        secret: bytes,
        app: ClientApp,
        ignores: Callable[[str], bool] = lambda _message_id: False,
    ) -> None:
        self._port = port
        self._app = app
        self._ignores = ignores
        acquiring = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({_ACQUIRE})
        )
        self._waiting = LoopbackClient(port, [acquiring])
        self._is_cut_off = False

    def close(self) -> None:
        """Close the connection to the SuperNode."""
        self._waiting.close()

    def work_once(self) -> bool:
        """Do one task if there is one; whether there was.

        A SuperNode that is not up yet, or gone, has no task; that is logged when it begins and
        when it is over.
        """
        try:
            # Never an agent, a connector or a model: only what this module runs.
            wanted = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
            token = self._waiting.AcquireTask(wanted).token
        except httpx.HTTPError as error:
            self._log_link(error)
            return False
        self._log_link(None)
        if not token:
            return False
        working = [RuntimeTokenHttpInterceptor(token)]
        client = LoopbackClient(self._port, working, retry_s=_RETRY_S, ignores=self._ignores)
        pulse = LoopbackClient(self._port, working)  # a beat is waited for at the end
        heartbeat = HeartbeatSender(lambda: _beat(pulse))
        heartbeat.start()
        try:
            self._answer(client)
        except Exception as error:  # of many kinds: the SuperNode forgets tasks of runs that ended
            # The answer is sealed in the outbox: asked again, the site sends the same.
            log.warning("a task was lost on the way: %s", type(error).__name__)
        finally:
            heartbeat.stop()
            pulse.close()
            client.close()
        return True

    def _log_link(self, error: httpx.HTTPError | None) -> None:
        """Log that the SuperNode is away, or back: once, as it is asked twice a second."""
        if error is not None and not self._is_cut_off:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else ""
            what = status or type(error).__name__
            log.info("waiting for the SuperNode on 127.0.0.1:%d (%s)", self._port, what)
        if error is None and self._is_cut_off:
            log.info("the SuperNode answers; waiting for a round of the coordinator")
        self._is_cut_off = error is not None

    def _answer(self, client: RuntimeHttpClient) -> None:
        message, context, _run, fab = pull_task_input(client)
        if bundle.is_ours(fab.content):
            reply = self._call(message, context)
        else:
            log.warning("refused code=%d error=Bundle", BUNDLE_REFUSED.code)
            reply = Message(BUNDLE_REFUSED, reply_to=message)
        push_message(client, reply, context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
        log.info("sent; waiting for a round of the coordinator")

    def _call(self, message: Message, context: Context) -> Message:
        """The installed app; it answers every error itself, except that it lacks a handler."""
        try:
            return self._app(message, context)
        except Exception as error:  # its text stays here
            log.warning("refused error=%s", type(error).__name__)
            return Message(Error(100, "the site cannot answer this"), reply_to=message)


def _beat(client: RuntimeHttpClient) -> bool:
    """Say that the task is worked on. That its run is over meanwhile is seen with the answer."""
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPError:
        return False
    return True


def join(
    home: SiteHome,
    record: CoordinatorRecord,
    app: ClientApp,
    stop: threading.Event,
    end_if_revoked: Callable[[], None],
) -> None:
    """Take part until ``stop`` is set.

    Args:
        home: Whose keys and outbox.
        record: Where the coordinator is.
        app: What answers.
        stop: Set when a person or the system ends the program.
        end_if_revoked: Asked whenever a SuperNode ended, which is how a revoked one fares; it
            raises what ends this call.
    """
    with the_only_one(home):
        node = SuperNode(home, record)
        executor = Executor(node.port, node.secret, app, node.ignores)
        # In a thread, because a task may take hours and the connection must last that long. The
        # thread stays to the end: the kernel ends the SuperNode with the thread that started it.
        over = threading.Event()
        keeper = threading.Thread(target=_keep, args=(node, over), name="SuperNode", daemon=True)
        keeper.start()
        num_ended = 0
        try:
            while not stop.is_set():
                if node.num_ended > num_ended:
                    num_ended = node.num_ended
                    end_if_revoked()
                if not executor.work_once():
                    stop.wait(_POLL_S)
        finally:
            over.set()
            keeper.join()
            executor.close()


def _keep(node: SuperNode, over: threading.Event) -> None:
    try:
        while not over.is_set():
            node.supervise()
            over.wait(_POLL_S)
    finally:
        node.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
