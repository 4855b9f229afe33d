"""What Prometheus reads, on loopback: how the study goes, and whether somebody must act."""

import threading
from collections import Counter as Counts
from collections.abc import Iterable, Mapping
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from crafts_server.errors import ServerError
from crafts_server.past_rounds import PastRun
from crafts_server.receipts import RoundReceipt

LOOPBACK = "127.0.0.1"
_OUTCOMES = ("used", "refused", "missing")


class Metrics:
    """The coordinator's numbers. All of them are in receipts or public anyway.

    Counters begin where ``go_on`` puts them: a restart must not look like a study without rounds,
    and a first refusal after it must look like one more. Refused calls begin at zero, and so do
    the series of a run that has no round yet.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"crafts_{name}", text, labels, registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"crafts_{name}", text, labels, registry=self._registry)

        self._sites_enrolled = gauge("sites_enrolled", "Sites that may connect")
        self._sites_online = gauge("sites_online", "Sites whose node is connected")
        self._site_online = gauge("site_online", "Whether an enrolled site is connected", "site")
        self.plans_queued = gauge("plans_queued", "Plans that wait or are trained")
        self.audit_entries = gauge("audit_entries", "Lines of the audit log")
        self.certificate_expires = gauge(
            "certificate_expires_timestamp_seconds", "When the server certificate ends"
        )
        self._round = gauge("round", "Newest committed round", "run")
        self._margin = gauge("alignment_margin", "On the public probe, after the round", "run")
        self._round_seconds = gauge("round_seconds", "Duration of the newest round", "run")
        self._rounds = counter("rounds", "Rounds committed", "run")
        self._updates = counter("updates", "Answers of sites", "run", "outcome")
        self._rises = counter("weight_rises", "Sites whose weight per share rose at once", "run")
        self._bytes = counter("bytes", "Of adapters and updates", "run", "direction")
        self.short_rounds = counter("short_rounds", "Rounds with too few good updates")
        self.refused_calls = counter("refused_calls", "Calls refused since the start", "call")
        self._known: set[str] = set()
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def committed(self, receipt: RoundReceipt) -> None:
        """Count a round."""
        self._add(
            PastRun(
                run_id=receipt.run_id,
                num_rounds=1,
                bytes_down=receipt.bytes_down,
                bytes_up=receipt.bytes_up,
                outcomes=Counts(
                    used=len(receipt.sites),
                    refused=len(receipt.refused),
                    missing=len(receipt.missing),
                ),
                num_rises=len(receipt.rises),
                newest_round=receipt.round,
                newest_margin=receipt.margin_after,
                newest_seconds=receipt.seconds,
            )
        )

    def began(self, run_id: str) -> None:
        """A run's series from zero on: what a series is born with is no increase to Prometheus."""
        self._rounds.labels(run_id)
        self._rises.labels(run_id)
        for outcome in _OUTCOMES:
            self._updates.labels(run_id, outcome)

    def go_on(self, runs: Iterable[PastRun], *, num_short: int) -> None:
        """Take over what was counted before this start; once, before anything is counted."""
        for past in runs:
            self._add(past)
        self.short_rounds.inc(num_short)

    def connected(self, sites: Mapping[str, bool]) -> None:
        """Which enrolled sites are connected; who is revoked has no series any more."""
        for gone in self._known - sites.keys():
            self._site_online.remove(gone)
        self._known = set(sites)
        for site, is_online in sites.items():
            self._site_online.labels(site).set(is_online)
        self._sites_enrolled.set(len(sites))
        self._sites_online.set(sum(sites.values()))

    def _add(self, rounds: PastRun) -> None:
        run = rounds.run_id
        self._round.labels(run).set(rounds.newest_round)
        self._margin.labels(run).set(rounds.newest_margin)
        self._round_seconds.labels(run).set(rounds.newest_seconds)
        self._rounds.labels(run).inc(rounds.num_rounds)
        for outcome in _OUTCOMES:
            self._updates.labels(run, outcome).inc(rounds.outcomes[outcome])
        self._rises.labels(run).inc(rounds.num_rises)
        self._bytes.labels(run, "down").inc(rounds.bytes_down)
        self._bytes.labels(run, "up").inc(rounds.bytes_up)

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
