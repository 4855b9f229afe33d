"""What can go wrong in a simulation beside what can go wrong at a site or a coordinator.

CraftsError
├── ScenarioError    whoever wrote the scenario or the command line
├── WorkspaceError   whoever chose the output folder
├── ProcessError     whoever looks into the logs: a program did not do what it should
└── HospitalError    the same, about one synthetic hospital (``hospital``)
"""

from crafts_core.errors import CraftsError


class ScenarioError(CraftsError):
    """The scenario asks for something impossible."""


class WorkspaceError(CraftsError):
    """The output folder belongs to another run, or cannot be used."""


class ProcessError(CraftsError):
    """A program of the federation did not do in time what it should."""
