"""Pictures that show a site what ingest saw on a slide. They are of patients: owner only.

Shape letters: H and W thumbnail pixels, N frames.
"""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from crafts_client.ingest.report import MAX_DENSITY, Stain
from crafts_client.ingest.tissue import Mask, Pixels, TissueMask
from crafts_core.durable import write_file
from crafts_core.stains import stain_amounts

MAX_PX = 1024
OVERLAY_COLOURS = {
    "tissue": (24, 56, 150),
    "kept": (20, 140, 75),
    "rejected": (225, 110, 10),
    "pen": (245, 225, 20),
    "fold": (0, 190, 225),
}
"""What the overlay's colours mean; the page's legend is made from this."""
NUM_DENSITY_STEPS = 16
_MAX_ENLARGEMENT = 4
_JPEG_QUALITY = 80
OVERLAY_ENDING = "-overlay"


def draw_overlay(
    thumbnail: Pixels,
    mask: TissueMask,
    frames_N4: npt.NDArray[np.float64],
    kept_N: npt.NDArray[np.bool_],
) -> Image.Image:
    """The thumbnail with tissue outlined, ink and folds tinted, and every tile that was judged.

    Args:
        thumbnail: RGB, shape (H, W, 3), at most 1024 pixels a side; a small one is enlarged.
        mask: Of this thumbnail.
        frames_N4: Places (x, y, width, height) in level-0 pixels. Of those that gave no tile, only
            the ones with tissue or ink are drawn.
        kept_N: Which of them gave a tile.
    """
    height, width = mask.is_tissue_HW.shape
    scale = max(1, min(_MAX_ENLARGEMENT, MAX_PX // max(height, width)))
    tinted = thumbnail.copy()
    _tint(tinted, mask.is_pen_HW, OVERLAY_COLOURS["pen"])
    _tint(tinted, mask.is_fold_HW, OVERLAY_COLOURS["fold"])
    picture = Image.fromarray(tinted).resize((width * scale, height * scale))
    _draw_frames(picture, _shown_boxes(mask, frames_N4, kept_N, scale))
    _outline(picture, mask.is_tissue_HW)
    return picture


def stain_densities(thumbnail: Pixels, is_tissue_HW: Mask) -> Stain | None:
    """Optical densities of hematoxylin and eosin in one slide's tissue; None without tissue.

    The stain matrix is fixed: nothing is fitted, so slides and scanners can be compared.
    """
    # Every second pixel each way is enough for means and shares.
    tissue_N3 = thumbnail[::2, ::2][is_tissue_HW[::2, ::2]].astype(np.float32)
    if not len(tissue_N3):
        return None
    hematoxylin_N, eosin_N, _ = np.maximum(stain_amounts(tissue_N3), 0).T
    return Stain(
        hematoxylin=round(float(hematoxylin_N.mean()), 4),
        eosin=round(float(eosin_N.mean()), 4),
        hematoxylin_shares=_shares(hematoxylin_N),
        eosin_shares=_shares(eosin_N),
    )


def write_pictures(
    folder: Path, name: str, thumbnail: Pixels, overlay: Image.Image
) -> tuple[Path, Path]:
    """Write both pictures of a slide as JPEG that only the owner may read; gives their paths.

    ``name`` is what ``SourceOutcome.picture`` keeps: a pseudonym, never a file's or patient's name.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    paths = picture_paths(folder, name)
    for path, picture in zip(paths, (thumbnail, np.asarray(overlay)), strict=True):
        write_file(path, _encode(picture), mode=0o600)
    return paths


def picture_name(slide_id: str) -> str:
    """Of a slide's pictures: a part of its pseudonym."""
    return slide_id[:16]


def picture_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Where the thumbnail and the overlay of a slide lie."""
    return folder / f"{name}.jpg", folder / f"{name}{OVERLAY_ENDING}.jpg"


def _tint(pixels: Pixels, where_HW: Mask, colour: tuple[int, int, int]) -> None:
    pixels[where_HW] = (0.4 * pixels[where_HW] + 0.6 * np.array(colour)).astype(np.uint8)


def _shown_boxes(
    mask: TissueMask,
    frames_N4: npt.NDArray[np.float64],
    kept_N: npt.NDArray[np.bool_],
    scale: int,
) -> list[tuple[tuple[float, ...], str]]:
    """Corners in picture pixels, rejected places first, so that kept ones are drawn over them."""
    fractions = mask.fractions(frames_N4)
    rejected_N = ~kept_N & (fractions.tissue_N + fractions.pen_N > 0)
    to_picture = scale / np.array([mask.scale_x, mask.scale_y] * 2)
    corner_N2, extent_N2 = frames_N4[:, :2], frames_N4[:, 2:]
    box_N4 = np.concatenate([corner_N2, corner_N2 + extent_N2], axis=1) * to_picture
    return [
        (tuple(box), name)
        for name, shown_N in (("rejected", rejected_N), ("kept", kept_N))
        for box in box_N4[shown_N].tolist()
    ]


def _draw_frames(picture: Image.Image, boxes: list[tuple[tuple[float, ...], str]]) -> None:
    layer = Image.new("RGBA", picture.size)
    draw = ImageDraw.Draw(layer)
    for (left, top, right, bottom), name in boxes:
        colour = OVERLAY_COLOURS[name]
        # A pixel of room between neighbours keeps small tiles apart.
        corners = (left + 1, top + 1, max(left + 1, right - 1), max(top + 1, bottom - 1))
        draw.rectangle(corners, fill=(*colour, 50 if name == "kept" else 25), outline=colour)
    picture.paste(layer, mask=layer.getchannel("A"))


def _outline(picture: Image.Image, is_tissue_HW: Mask) -> None:
    whole = Image.fromarray(is_tissue_HW).resize(picture.size, Image.Resampling.NEAREST)
    tissue_HW = np.asarray(whole)
    edge_HW = tissue_HW & ~ndimage.binary_erosion(tissue_HW, iterations=2)
    picture.paste(OVERLAY_COLOURS["tissue"], mask=Image.fromarray(edge_HW))


def _shares(density_N: npt.NDArray[np.float64]) -> tuple[float, ...]:
    counts, _ = np.histogram(
        np.minimum(density_N, MAX_DENSITY), bins=NUM_DENSITY_STEPS, range=(0, MAX_DENSITY)
    )
    return tuple(round(float(share), 4) for share in counts / len(density_N))


def _encode(picture: Pixels) -> bytes:
    image = Image.fromarray(picture)
    image.thumbnail((MAX_PX, MAX_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
