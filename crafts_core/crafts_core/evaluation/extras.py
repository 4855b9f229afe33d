"""Figures that need more than this package always has, and how to say so in one line."""

import importlib
from types import ModuleType

from crafts_core.errors import CraftsError
from crafts_core.installing import how_to_install


class NotMeasurableError(CraftsError):
    """A figure cannot be measured here; the message says which, why, and what would help."""


def optional(name: str, figure: str) -> ModuleType:
    """A module of the optional extra ``evaluation``.

    Raises:
        NotMeasurableError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotMeasurableError(f"{figure}: {how_to_install('evaluation')}") from error


def scikit_learn(figure: str) -> ModuleType:
    """scikit-learn with the parts that are used here.

    Raises:
        NotMeasurableError: it is not installed.
    """
    module = optional("sklearn", figure)
    for part in (
        "ensemble",
        "linear_model",
        "model_selection",
        "pipeline",
        "preprocessing",
        "feature_extraction.text",
    ):
        optional(f"sklearn.{part}", figure)
    return module
