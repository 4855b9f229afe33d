"""``crafts-sim plan``: what a scenario's noise will be, before anything is trained."""

from collections.abc import Sequence

from crafts_core.foundation import load
from crafts_core.foundation_manifest import named_path
from crafts_core.progress import Progress, silent
from crafts_privacy.noise_forecast import NoiseForecast, is_measurable, noise_forecast
from crafts_simulations.errors import ScenarioError
from crafts_simulations.scenario import load_scenario


def scenario_forecast(
    name: str,
    patients: Sequence[int],
    *,
    epsilon: float | None,
    device: str,
    progress: Progress = silent,
) -> NoiseForecast:
    """Of the sites that train, by what they declare.

    Raises:
        ScenarioError: the scenario is impossible, promises nothing, or its sites come of tiles and
            no sizes were given.
    """
    scenario = load_scenario(name)
    if epsilon is not None:
        scenario = scenario.changed(epsilon=epsilon)
    declared = {site.name: site.declared_patients for site in scenario.site}
    sizes = tuple(patients) or tuple(declared[each] for each in scenario.participants if declared)
    if not sizes:
        raise ScenarioError(f"the sites of {name} come of tiles; give --patients N for each")
    where = scenario.scenario.foundation
    foundation = load(named_path(where), device=device)
    any_pool = "0" * 64 if scenario.needs_pool else None  # which one, no noise depends on
    plan = scenario.plan(foundation.manifest.hash, any_pool)
    if plan.privacy.target_epsilon is None or not is_measurable(plan):
        raise ScenarioError(f"{name} trains without privacy, or ControlNets alone: nothing to say")
    return noise_forecast(plan, foundation, sizes, progress)
