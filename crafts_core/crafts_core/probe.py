"""The probe: public tiles with captions, on which alignment may be measured at no privacy cost.

Shape letters: N tiles, C H W channels and pixels, K anchors.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crafts_core.aligner import Aligner, pearson, profile
from crafts_core.foundation_manifest import FoundationError

_TILES, _CAPTIONS = "probe.safetensors", "captions.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Public tiles (uint8, N x 3 x H x W) and what each one shows."""

    tiles_NCHW: Tensor
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = tuple(self.tiles_NCHW.shape)
        if self.tiles_NCHW.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"expected uint8 tiles (N, 3, H, W), got {shape}")
        if len(self.captions) != shape[0]:
            raise ValueError(f"expected {shape[0]} captions, got {len(self.captions)}")
        if len(set(self.captions)) < 2:
            raise ValueError("a probe needs at least two different captions")

    @property
    def mismatched_captions(self) -> tuple[str, ...]:
        """For each tile a caption of another tile that says something else, far away first."""
        count = len(self.captions)
        chosen = []
        for row, own in enumerate(self.captions):
            others = (self.captions[(row + count // 2 + step) % count] for step in range(count))
            chosen.append(next(caption for caption in others if caption != own))
        return tuple(chosen)


def save_probe(directory: Path, probe: Probe) -> None:
    """Write ``probe.safetensors`` and ``captions.json`` into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"tiles": probe.tiles_NCHW.contiguous()}, directory / _TILES)
    text = json.dumps(list(probe.captions), indent=1) + "\n"
    (directory / _CAPTIONS).write_text(text, encoding="utf-8")


def load_probe(directory: Path) -> Probe:
    """Read what ``save_probe`` wrote.

    Raises:
        FoundationError: the files are missing or do not fit together.
    """
    try:
        captions = tuple(json.loads((directory / _CAPTIONS).read_text(encoding="utf-8")))
        return Probe(tiles_NCHW=load_file(directory / _TILES)["tiles"], captions=captions)
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise FoundationError(f"cannot read the probe in {directory}: {error}") from error


def correlation_range(
    aligner: Aligner, probe: Probe, anchors_KD: Tensor, *, max_shifts: int = 7
) -> tuple[float, float]:
    """(r_lo, r_hi) of the alignment gate, from public pairs only.

    r_lo is the mean correlation of tiles with other tiles' captions, r_hi the median with their
    own: at r_lo a caption says nothing about its tile, at r_hi it says what captions usually say.
    They are kept apart by at least 0.05.
    """
    tile_NK = profile(aligner.embed_images(probe.tiles_NCHW), anchors_KD)
    caption_NK = profile(aligner.embed_captions(list(probe.captions)), anchors_KD)
    shifts = range(1, min(max_shifts, len(probe.captions) - 1) + 1)
    mismatched = [pearson(tile_NK, caption_NK.roll(shift, 0)).mean() for shift in shifts]
    r_lo = min(float(torch.stack(mismatched).mean()), 0.95)
    r_hi = max(float(pearson(tile_NK, caption_NK).median()), r_lo + 0.05)
    return round(r_lo, 4), round(r_hi, 4)
