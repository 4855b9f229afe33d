"""How every page is rendered: markup is escaped, and text of others is made harmless.

Pages look alike by ``core/kit.css``; one without a frame of its own extends ``core/page.html.j2``.
"""

import base64
import io

import numpy as np
import numpy.typing as npt
from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from crafts_core.harmless import harmless


def page_environment(package: str) -> Environment:
    """The templates of a package, and the kit. Only the tags of a ``Markup`` of ours act."""
    return Environment(
        loader=ChoiceLoader(
            [PackageLoader(package), PrefixLoader({"core": PackageLoader("crafts_core")})]
        ),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: object) -> object:
    """A drawing or a macro of ours keeps its tags and lines; text of others within is harmless."""
    if isinstance(value, Markup):
        return Markup("\n").join(Markup(harmless(line)) for line in value.split("\n"))  # noqa: S704
    return harmless(value) if isinstance(value, str) else value


def png_uri(image_HWC: npt.NDArray[np.uint8]) -> str:
    """An image as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG")
    return uri_of_png(buffer.getvalue())


def uri_of_png(content: bytes) -> str:
    """A PNG as a data URI, with all that it says of itself: people save pictures from pages."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
