"""What a process has to run turns of a simulation's sites: one foundation, and a few open sites.

A site that is open answers faster, and takes memory for a model of its own. So the newest few stay
open. Of sums over sites, all do, as what they hold is in memory alone until it is asked for; of
these the others only give up their models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.home import SiteHome
from crafts_client.site import Site
from crafts_core.foundation import Foundation, load
from crafts_core.foundation_manifest import named_path
from crafts_simulations.local_grid import LocalNode, answer, context_of
from crafts_simulations.logs import show_what_goes_wrong
from crafts_simulations.repeatable import RepeatableSite

_MOST_OPEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteWork:
    """The sites of a simulation, for this process or another. Can be pickled."""

    foundation: str
    """``embedded``, or a folder's absolute path."""
    device: str
    homes: Mapping[str, Path]
    """By the site's name."""
    repeatable_seed: int | None
    holds_sums: bool
    """Whether a site has to remember anything between two messages."""
    is_verbose: bool
    """Whether what goes wrong at a site is shown with tracebacks."""

    def bench(self) -> "SiteBench":
        """Load the foundation.

        Raises:
            FoundationError: it is missing or damaged.
        """
        if self.is_verbose:
            show_what_goes_wrong()
        return SiteBench(self, load(named_path(self.foundation), device=self.device))


class SiteBench:
    """Runs turns of any of the sites."""

    def __init__(self, work: SiteWork, foundation: Foundation) -> None:
        """No site is open yet."""
        self._work = work
        self._open_site = opener(foundation, work.repeatable_seed)
        self._places: dict[str, _Place] = {}
        """The newest last."""

    def __call__(self, site: str, message: Message) -> Message:
        """One turn."""
        place = self._places.pop(site, None)
        if place is None:
            place = _Place(self._work.homes[site], self._open_site, message.metadata.dst_node_id)
        self._places[site] = place
        for name in list(self._places)[:-_MOST_OPEN]:
            self._places[name].cool()
            if not self._work.holds_sums:
                del self._places[name]
        return place(message)

    def node(self, site: str) -> LocalNode:
        """One of the sites on a grid in this process."""
        return LocalNode(app=lambda message, _context: self(site, message), node_config={})


class _Place:
    """A site's app and context, as long as it is open."""

    def __init__(self, home: Path, open_site: Callable[[Path], Site], node_id: int) -> None:
        self._site: Site | None = None
        self._app: ClientApp = make_client_app(self._opened)
        self._open_site = open_site
        self._context: Context = context_of(node_id, {HOME_KEY: str(home)})

    def __call__(self, message: Message) -> Message:
        return answer(self._app, message, self._context)

    def cool(self) -> None:
        """Give up the model; the next turn makes it again."""
        if self._site is not None:
            self._site.close()

    def _opened(self, path: Path) -> Site:
        self._site = self._open_site(path)
        return self._site


def opener(foundation: Foundation, repeatable_seed: int | None) -> Callable[[Path], Site]:
    """Opens a simulated site's home; with a seed, as a site that the seed repeats."""

    def open_site(path: Path) -> Site:
        home = SiteHome.open(path)
        if repeatable_seed is None:
            return Site(home, foundation)
        return RepeatableSite(home, foundation, repeatable_seed)

    return open_site
