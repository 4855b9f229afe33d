"""The Flower ServerApp of the coordinator.

``app`` is what a SuperLink starts: the run configuration names the coordinator's home and the
signed plan. ``make_server_app`` gives the same app around a coordinator that is in memory already.
"""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from crafts_server.coordinator import Coordinator
from crafts_server.errors import HomeError

HOME_KEY = "coordinator-home"
PLAN_KEY = "plan-hash"


def make_server_app(coordinator: Coordinator) -> ServerApp:
    """A ServerApp that runs this coordinator's plan."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001  # Flower passes both by name
        coordinator.run(grid)

    return app


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Open the home that the run configuration names and run its plan."""
    values = [context.run_config.get(key) for key in (HOME_KEY, PLAN_KEY)]
    home, plan_hash = (value if isinstance(value, str) else "" for value in values)
    if not home or not plan_hash:
        raise HomeError(f"the run configuration must name {HOME_KEY} and {PLAN_KEY}")
    Coordinator.open(Path(home), plan_hash).run(grid)
