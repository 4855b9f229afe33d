"""What Prometheus reads, on loopback: how the study goes, and whether somebody must act."""

import threading
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from crafts_server.errors import ServerError
from crafts_server.receipts import RoundReceipt

LOOPBACK = "127.0.0.1"


class Metrics:
    """The coordinator's numbers. All of them are in receipts or public anyway."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"crafts_{name}", text, labels, registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"crafts_{name}", text, labels, registry=self._registry)

        self.sites_enrolled = gauge("sites_enrolled", "Sites that may connect")
        self.sites_online = gauge("sites_online", "Sites whose node is connected")
        self.plans_queued = gauge("plans_queued", "Plans that wait or are trained")
        self.audit_entries = gauge("audit_entries", "Lines of the audit log")
        self.certificate_expires = gauge(
            "certificate_expires_timestamp_seconds", "When the server certificate ends"
        )
        self._round = gauge("round", "Newest committed round", "run")
        self._margin = gauge("alignment_margin", "On the public probe, after the round", "run")
        self._round_seconds = gauge("round_seconds", "Duration of the newest round", "run")
        self._rounds = counter("rounds", "Rounds committed since the start", "run")
        self._updates = counter("updates", "Answers of sites", "run", "outcome")
        self._rises = counter("weight_rises", "Sites whose weight per share rose at once", "run")
        self._bytes = counter("bytes", "Of adapters and updates", "run", "direction")
        self.short_rounds = counter("short_rounds", "Rounds with too few good updates")
        self.refused_calls = counter("refused_calls", "Calls of the registrar refused", "call")
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def committed(self, receipt: RoundReceipt) -> None:
        """Count a round."""
        run = receipt.run_id
        self._round.labels(run).set(receipt.round)
        self._margin.labels(run).set(receipt.margin_after)
        self._round_seconds.labels(run).set(receipt.seconds)
        self._rounds.labels(run).inc()
        for outcome, number in (
            ("used", len(receipt.sites)),
            ("refused", len(receipt.refused)),
            ("missing", len(receipt.missing)),
        ):
            self._updates.labels(run, outcome).inc(number)
        self._rises.labels(run).inc(len(receipt.rises))
        self._bytes.labels(run, "down").inc(receipt.bytes_down)
        self._bytes.labels(run, "up").inc(receipt.bytes_up)

    def start(self, port: int) -> int:
        """Answer on loopback; the port that was taken.

        Raises:
            ServerError: the port is taken.
        """
        try:
            served: Any = start_http_server(port, addr=LOOPBACK, registry=self._registry)
        except OSError as error:
            raise ServerError(
                f"cannot listen on {LOOPBACK}:{port} for metrics ({error.strerror}); "
                "set metrics_port in coordinator.toml"
            ) from error
        self._server, self._thread = served
        return int(served[0].server_port)

    def stop(self) -> None:
        """Close the port."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
