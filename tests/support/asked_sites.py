"""A coordinator that asks whichever home it likes for a round."""

from pathlib import Path

from crafts_client.home import SiteHome
from crafts_client.site import Site
from crafts_core.errors import CraftsError
from support.sites import Coordinator


class Study:
    """One plan, and the adapter that it begins with."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator, self.plan = coordinator, coordinator.plan()
        self.state = coordinator.start(self.plan)

    def ask(self, home: Path, round: int) -> str | CraftsError:
        """The hash of what is answered, or what is said instead."""
        request = self.coordinator.request(self.plan, self.state, number=round)
        message = self.coordinator.message(self.plan, self.state, request=request)
        try:
            return Site(SiteHome.open(home), self.coordinator.foundation).answer(message).hash
        except CraftsError as error:
            return error
