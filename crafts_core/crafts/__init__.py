"""Use a generator of synthetic histology from Python.

>>> import crafts
>>> generator = crafts.Generator.load("runs/quickstart/generator")
>>> image = generator.sample("H&E, lung adenocarcinoma, lung")[0]
>>> image.save("tile.png")
>>> found = crafts.evaluate("samples", "real-tiles", mpp=1.0, page="evaluation.html")
>>> found.arm("images").structure

These names are the public surface; everything below ``crafts_core`` may change without notice.
"""

from crafts_core import __version__
from crafts_core.dataset import Dataset
from crafts_core.errors import CraftsError
from crafts_core.evaluation.figures import Comparison
from crafts_core.library import Generator, SyntheticImage, embedded_foundation, evaluate
from crafts_core.provenance import Origin, Provenance, read_provenance
from crafts_core.sampler_config import SamplerConfig

__all__ = [
    "Comparison",
    "CraftsError",
    "Dataset",
    "Generator",
    "Origin",
    "Provenance",
    "SamplerConfig",
    "SyntheticImage",
    "__version__",
    "embedded_foundation",
    "evaluate",
    "read_provenance",
]
