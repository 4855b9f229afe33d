"""What an operator chooses between when slides are cut."""

from enum import StrEnum


class Artefact(StrEnum):
    """What is left out, unless it is to be kept."""

    PEN = "pen"
    """Marker ink, or a stain of its colours."""
    FOLD = "fold"
    BLURRED = "blurred"


class TissueMethod(StrEnum):
    """How tissue is told from glass."""

    OTSU = "otsu"
    """Otsu's split of the saturation, within bounds."""
    FIXED = "fixed"
    """One low saturation for all slides: keeps pale fat, and needs clean glass."""
    LUMINANCE = "luminance"
    """Otsu's split of the darkness, within bounds: for stains that are pale or grey."""
    ALL = "all"
    """Everything is tissue: for cores and images without glass."""
