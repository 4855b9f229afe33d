"""What an image file says about where its pixels come from.

Three times, for three kinds of reader: text chunks of the PNG for a person, JSON for ``crafts
provenance``, and XMP with IPTC's ``DigitalSourceType`` for whatever else shows or sorts pictures.
Nothing here is signed: it tells honest users what a file is, and is no proof against forgers.
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self
from xml.sax.saxutils import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, ValidationError

from crafts_core import __version__
from crafts_core.errors import CraftsError

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media that a trained model made."""
_CHUNK, _XMP_CHUNK = "Provenance", "XML:com.adobe.xmp"
_SOURCE_TYPE = re.compile(r"DigitalSourceType[^>]*?(https?://[^\s\"'<]+)")


class ProvenanceError(CraftsError):
    """A file that says nothing of where it comes from, or cannot be read."""


class Origin(BaseModel):
    """The generator that drew an image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generator: str
    generator_hash: str = ""
    foundation: str = ""
    foundation_hash: str = ""
    study: str = ""
    plan_hash: str = ""
    privacy: str = ""
    """What was promised to the patients behind the weights, in words."""
    mpp: float | None = None
    """Microns per pixel, where the generator says them."""


class Provenance(BaseModel):
    """How one image came to be: with the same generator, these values draw it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    synthetic: bool = True
    """Not what was read of a mask or of fluorescence: that may be a patient's own."""
    kind: Literal["image", "contact sheet", "condition"] = "image"
    origin: Origin
    prompts: tuple[str, ...] = ()
    """One; of a contact sheet, each once."""
    negative_prompt: str = ""
    seed: int | None = None
    index: int | None = None
    """With ``seed``, which noise it started from."""
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    dtype: str = "float32"
    control: str = ""
    control_sha256: str = ""
    """Of the mask's file."""
    version: str = __version__

    def of_image(self, prompt: str, *, index: int, **values: str | int) -> Self:
        """That of one image among several that are drawn alike."""
        return self.model_copy(update={"prompts": (prompt,), "index": index, **values})

    def of_sheet(self, prompts: Iterable[str]) -> Self:
        """That of a picture of several of them."""
        return self.model_copy(
            update={"kind": "contact sheet", "prompts": tuple(dict.fromkeys(prompts))}
        )

    def of_condition(self, control: str) -> Self:
        """That of a picture of what steered them, which no generator drew."""
        return self.model_copy(update={"kind": "condition", "control": control, "synthetic": False})

    @property
    def title(self) -> str:
        """For people, whatever shows the file."""
        if not self.synthetic:
            return f"Not synthetic: what was read to steer synthetic images ({self.control})"
        return f"Synthetic histology image, not a patient's: {'; '.join(self.prompts)}"


def encode_png(image: Image.Image, provenance: Provenance) -> bytes:
    """The bytes of a PNG that carries ``provenance``."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=_png_chunks(provenance))
    return buffer.getvalue()


def read_provenance(path: str | Path) -> Provenance:
    """What ``encode_png`` wrote into a file; the pixels are not decoded.

    Raises:
        ProvenanceError: no such file, no image, or nothing of ours in it; what other tools declare
            of it is named.
    """
    try:
        with Image.open(path) as image:
            stored, xmp = image.info.get(_CHUNK), _xmp_text(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ProvenanceError(f"{path} is no image that can be read") from error
    if stored is None:
        declared = _SOURCE_TYPE.search(xmp)
        told = f"; it declares {declared[1]}" if declared else ""
        raise ProvenanceError(f"{path} carries no provenance of a generator's{told}")
    try:
        return Provenance.model_validate_json(stored)
    except ValidationError as error:
        raise ProvenanceError(
            f"{path}: its provenance is damaged, or another version's (this is {__version__})"
        ) from error


def _png_chunks(provenance: Provenance) -> PngInfo:
    chunks = PngInfo()
    chunks.add_itxt("Synthetic", "true" if provenance.synthetic else "false")
    chunks.add_itxt("Description", provenance.title)
    chunks.add_itxt(_CHUNK, provenance.model_dump_json())
    if provenance.synthetic:
        chunks.add_itxt(_XMP_CHUNK, _xmp(provenance))
    return chunks


def _xmp(provenance: Provenance) -> str:
    """XMP packet; the names are of the IPTC Photo Metadata Standard 2025.1 and Dublin Core."""
    origin = provenance.origin
    texts = {
        "Iptc4xmpExt:DigitalSourceType": DIGITAL_SOURCE_TYPE,
        "Iptc4xmpExt:AISystemUsed": f"crafts-federated, generator {origin.generator}",
        "Iptc4xmpExt:AISystemVersionUsed": f"{provenance.version} {origin.generator_hash}".strip(),
        "Iptc4xmpExt:AIPromptInformation": "; ".join(provenance.prompts),
        "xmp:CreatorTool": f"crafts-federated {provenance.version}",
    }
    properties = "".join(f"<{name}>{escape(text)}</{name}>" for name, text in texts.items())
    title = escape(provenance.title)
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        f"{properties}"
        f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{title}</rdf:li></rdf:Alt>'
        "</dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="r"?>'
    )


def _xmp_text(image: Image.Image) -> str:
    raw = image.info.get(_XMP_CHUNK) or image.info.get("xmp") or ""
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
