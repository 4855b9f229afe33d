"""Every drawn file says that it is synthetic, to people, to us and to other tools."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from crafts_core.provenance import (
    DIGITAL_SOURCE_TYPE,
    Origin,
    Provenance,
    ProvenanceError,
    encode_png,
    read_provenance,
)

PROMPT = 'tissue, Gleason 3+4 <5 µm & "pale"'
DRAWN = Provenance(
    origin=Origin(
        generator="lungs", generator_hash="ab" * 32, foundation_hash="cd" * 32, study="lungs",
        plan_hash="ef" * 32, privacy="epsilon at most 3 at delta 1e-5",
    ),
    prompts=(PROMPT,), negative_prompt="necrosis", seed=5, index=3, scheduler="unipc",
    num_inference_steps=7, guidance_scale=2.5, control="nuclei", control_sha256="12" * 32,
)  # fmt: skip


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    image = Image.fromarray(np.full((8, 8, 3), 9, np.uint8))
    (tmp_path / "x.png").write_bytes(encode_png(image, DRAWN))
    return tmp_path / "x.png"


def test_provenance_reads_back_whole(drawn: Path) -> None:
    assert read_provenance(drawn) == DRAWN


def test_a_person_reads_that_it_is_synthetic(drawn: Path) -> None:
    with Image.open(drawn) as image:
        assert image.text["Synthetic"] == "true"
        assert image.text["Description"].endswith(PROMPT)


def test_other_tools_read_it_as_made_by_a_model(drawn: Path) -> None:
    """Well-formed XMP, with the property at the name that the IPTC standard gives it."""
    with Image.open(drawn) as image:
        packet = image.text["XML:com.adobe.xmp"]
    root = ElementTree.fromstring(re.sub(r"<\?xpacket.*?\?>", "", packet))
    namespace = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    found = {
        each.tag.removeprefix(namespace): each.text
        for each in root.iter()
        if each.tag.startswith(namespace)
    }
    assert found["DigitalSourceType"] == DIGITAL_SOURCE_TYPE
    assert found["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert found["AIPromptInformation"] == PROMPT


def test_pillow_finds_the_packet_by_itself(drawn: Path) -> None:
    with Image.open(drawn) as image:
        assert DIGITAL_SOURCE_TYPE.encode() in image.info["xmp"]


def test_an_image_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(ProvenanceError, match="carries no provenance"):
        read_provenance(tmp_path / "plain.png")


def test_what_another_tool_declares_is_named(tmp_path: Path) -> None:
    xmp = f"<x DigitalSourceType='{DIGITAL_SOURCE_TYPE}'/>".encode()
    Image.new("RGB", (4, 4)).save(tmp_path / "other.jpg", xmp=xmp)
    with pytest.raises(ProvenanceError, match=r"it declares http://cv\.iptc\.org"):
        read_provenance(tmp_path / "other.jpg")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ProvenanceError, match="is no image that can be read"):
        read_provenance(tmp_path / "x.png")


def test_an_altered_record_is_refused(drawn: Path) -> None:
    content = drawn.read_bytes().replace(b'"synthetic":true', b'"synthetic":no!!')
    drawn.write_bytes(content)
    with pytest.raises(ProvenanceError):
        read_provenance(drawn)
