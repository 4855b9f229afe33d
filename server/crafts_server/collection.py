"""Asking sites and hearing from them until a round may close.

One reply is in memory at a time. The round closes when every site that was asked has answered and
enough updates are good, or at the deadline; sites that appear meanwhile are asked too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from crafts_core.exchange import ExchangeError
from crafts_server.errors import AggregationError, SitesRefuseError, UpdateRefusedError
from crafts_server.grid_calls import LOST_ON_THE_WAY, patiently
from crafts_server.messages import error_sentence
from crafts_server.receipts import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How a round waits. Speed only."""

    poll_s: float = 0.5
    join_wait_s: float = 60.0
    """How long to wait for more sites once all that are there have answered and too few are good;
    never beyond the deadline."""
    sleep: Callable[[float], None] = time.sleep
    """May raise to end the run; committed rounds stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """What is known of a node beside what it says. Nobody is known in a simulation."""

    enrolled_as: Callable[[int], str | None] = lambda _: None
    """The site's name that its key was enrolled under."""
    connected_since: Callable[[int], str | None] = lambda _: None
    """Changes when the node's process is another one."""


@dataclass(slots=True)
class SiteDirectory:
    """Which node is which site, as far as this process has heard."""

    members: Members = field(default_factory=Members)
    names: dict[int, str] = field(default_factory=dict)
    holders: dict[int, str] = field(default_factory=dict)
    """Node -> hash of the stage's first adapter that it is known to hold."""
    replaced: set[int] = field(default_factory=set)
    """Nodes of sites that have enrolled again since, with another key and so as another node."""

    def name(self, node_id: int) -> str | None:
        """The node's site, if that was ever heard."""
        return self.names.get(node_id) or self.members.enrolled_as(node_id)

    def label(self, node_id: int) -> str:
        return self.name(node_id) or f"node {node_id}"

    def bind(self, node_id: int, site: str) -> None:
        """Remember a node's name. Nodes are authenticated by Flower, names are said.

        Raises:
            UpdateRefusedError: the node is enrolled under, or had, another name, or another node
                has this one and nobody enrolled this node under it.
        """
        enrolled = self.members.enrolled_as(node_id)
        if enrolled is not None and enrolled != site:
            raise UpdateRefusedError(f"this node is enrolled as {enrolled} and says {site}")
        if self.names.get(node_id, site) != site:
            raise UpdateRefusedError(f"this node was {self.names[node_id]} before, now {site}")
        others = {node for node, name in self.names.items() if name == site} - {node_id}
        if others and enrolled is None:
            raise UpdateRefusedError(f"another node is site {site}")
        for other in others:
            del self.names[other]
        self.replaced |= others
        self.names[node_id] = site


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """How a round ended."""

    num_asked: int
    num_accepted: int
    refused: tuple[Refusal, ...]
    missing: tuple[str, ...]

    def too_few(self, min_sites: int, message: str) -> AggregationError:
        """The error of a round that needs ``min_sites``, with what would help it."""
        kept = f"{message}. Committed rounds are kept; "
        if self.refused and self.num_asked - len(self.refused) < min_sites:
            return SitesRefuseError(
                f"{kept}it is asked again, and goes on once a person at those sites has acted; "
                "crafts-server stop takes the plan out, to hand over another"
            )
        return AggregationError(f"{kept}it goes on by itself when the sites are back")


class Phase(Protocol):
    """One question to the sites, and what becomes of the answers."""

    def compose(self, node_id: int) -> Message:
        """The message for a node."""
        ...

    def accept(self, node_id: int, message: Message) -> None:
        """Take an answer that is no error.

        Raises:
            ExchangeError: it cannot be parsed.
            UpdateRefusedError: it is not what was asked for.
        """
        ...


class Collection:
    """The questions and answers of one phase of a round."""

    def __init__(
        self,
        grid: Grid,
        sites: SiteDirectory,
        phase: Phase,
        *,
        patience: Patience,
        only: Callable[[int], bool] = lambda _: True,
    ) -> None:
        """Prepare.

        Args:
            grid: Flower's.
            sites: Who is who; nodes that refuse are no longer trusted to hold anything.
            phase: What is asked and who takes the answers.
            patience: How to wait.
            only: Whether to ask a node; asked again for those that appear meanwhile.
        """
        self._grid = grid
        self._sites = sites
        self._phase = phase
        self._patience = patience
        self._only = only
        self._asked: set[int] = set()
        self._pending: dict[str, int] = {}
        self._lost: set[int] = set()
        self._connected_since: dict[int, str | None] = {}
        self._num_accepted = 0
        self._refused: list[Refusal] = []

    def run(self, *, deadline_s: float, min_sites: int = 0, expected: int = 0) -> Replies:
        """Ask and listen until the phase may close.

        Args:
            deadline_s: Then it closes, whoever is missing.
            min_sites: With fewer good answers it stays open a while for sites that join.
            expected: With fewer answers, good or not, it stays open: these sites have to be there,
                and one whose line is cut comes back.
        """
        last_news = time.monotonic()
        deadline = last_news + deadline_s
        while True:
            if self._ask_newcomers() + self._listen() > 0:
                last_news = time.monotonic()
            now = time.monotonic()
            waits_for_joiners = now - last_news < self._patience.join_wait_s
            is_open = (
                self._pending
                or self._away
                or (self._num_accepted < min_sites and waits_for_joiners)
                or self._num_accepted + len(self._refused) < expected
            )
            if not is_open or now >= deadline:
                return self._replies()
            self._patience.sleep(min(self._patience.poll_s, deadline - now))

    def _ask_newcomers(self) -> int:
        """Send the request to every node that has not had it; how many were asked.

        Flower delivers a request once, so a node whose process has died with it is asked again
        when it is back; it sends the same sealed reply.
        """
        for asked_by, node_id in list(self._pending.items()):
            if self._since(node_id) != self._connected_since[node_id]:
                del self._pending[asked_by]
                self._asked.discard(node_id)
        newcomers = sorted(set(patiently(self._node_ids)) - self._asked)
        for node_id in newcomers:
            self._lost.discard(node_id)
            self._connected_since[node_id] = self._since(node_id)
            self._asked.add(node_id)
            pushed = patiently(partial(self._grid.push_messages, [self._phase.compose(node_id)]))
            message_id = next(iter(pushed), None)
            if message_id:
                self._pending[message_id] = node_id
            else:
                self._refuse(node_id, "the request could not be delivered")
        return len(newcomers)

    def _listen(self) -> int:
        """Take the replies that are there, one at a time; how many there were."""
        heard = 0
        for message_id, node_id in list(self._pending.items()):
            for message in patiently(partial(self._grid.pull_messages, [message_id])):
                self._pending.pop(message_id, None)
                self._take(node_id, message)
                heard += 1
        return heard

    def _take(self, node_id: int, message: Message) -> None:
        if message.has_error() and message.error.code in LOST_ON_THE_WAY:
            self._lost.add(node_id)
            self._asked.discard(node_id)
            return
        if message.has_error():
            self._refuse(node_id, error_sentence(message))
            return
        try:
            self._phase.accept(node_id, message)
        except (UpdateRefusedError, ExchangeError) as error:
            self._refuse(node_id, str(error))
        else:
            self._num_accepted += 1

    def _refuse(self, node_id: int, reason: str) -> None:
        self._sites.holders.pop(node_id, None)
        self._refused.append(Refusal(site=self._sites.label(node_id), reason=reason))

    @property
    def _away(self) -> set[int]:
        """Nodes that were lost and may come back."""
        return self._lost - self._sites.replaced

    def _replies(self) -> Replies:
        return Replies(
            num_asked=len(self._asked | self._away),
            num_accepted=self._num_accepted,
            refused=tuple(sorted(self._refused, key=lambda each: each.site)),
            missing=tuple(
                sorted(self._sites.label(node) for node in {*self._pending.values(), *self._away})
            ),
        )

    def _since(self, node_id: int) -> str | None:
        return patiently(partial(self._sites.members.connected_since, node_id))

    def _node_ids(self) -> list[int]:
        nodes = self._grid.get_node_ids()
        return [node for node in nodes if self._only(node)]
