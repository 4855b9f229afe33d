"""Training of the embedded tissue encoder on open real tiles.

    python -m crafts_core.evaluation.tissue_training --tiles TABLE --out DIR

A network learns to name organ, diagnosis and slide of tiles whose colours are mixed at random each
time, so that only structure helps. Slides are cut in many tiles; naming the slide teaches what
makes its tissue look as it does. It learns, too, to tell whole tissue from disarranged: some tiles
are blended with themselves turned round, in blobs with soft borders (never in squares, which the
validation shuffles). Sharpness is never touched: blur must stay visible.

Shape letters: N tiles, C H W channels and pixels, D features, K classes.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from crafts_core.command_line import say
from crafts_core.devices import autocast_where_faster
from crafts_core.durable import write_file
from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.tissue_encoder import WEIGHTS, TissueEncoder
from crafts_core.evaluation.tissue_network import CHANNELS, TissueNetwork
from crafts_core.foundation_build.tiles_table import read_open_tiles, read_table
from crafts_core.pixels import channels_first

Labels = npt.NDArray[np.str_]
FEWEST_TILES = 20
"""A class with fewer is not asked for."""
_IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class TissueTrainingConfig:
    """How long, and how."""

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    crop_px: int = 112
    disarranged: float = 0.3
    """Share of tiles that are; those are not asked for organ, diagnosis or slide."""
    disarranged_weight: float = 2.0
    """Of telling them, beside one for each other question."""
    seed: int = 0


LossProgress = Callable[[int, float], None]
"""Called after each step with its number and loss."""


def train(
    images_NHWC: Images,
    groups: Labels,
    labels: Sequence[Labels],
    config: TissueTrainingConfig,
    progress: LossProgress | None = None,
) -> TissueNetwork:
    """A network, its normalisation folded, that tells structure.

    Args:
        images_NHWC: Square tiles at one micron per pixel.
        groups: The case of each tile; large ones are drawn less often for each tile.
        labels: What is asked for: one array for each question, empty where unknown.
        config: How long, and how. The same seed gives the same network on the same machine.
        progress: Told after each step.

    Raises:
        ValueError: a question has no class with enough tiles.
    """
    rng, source = np.random.default_rng(config.seed), torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = TissueNetwork(is_trained=False)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
        targets = [_targets(each) for each in labels]
        heads = nn.ModuleList(
            nn.Linear(sum(CHANNELS[1:]), num) for num in (*(num for _, num in targets), 1)
        )
    parameters = [*network.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    share_N = _shares(groups)
    for step in range(config.steps):
        rows = rng.choice(len(images_NHWC), config.batch_size, p=share_N)
        batch_NCHW = random_view(images_NHWC[rows], config.crop_px, rng, source)
        is_mixed_N = torch.rand(len(rows), generator=source) < config.disarranged
        batch_NCHW[is_mixed_N] = disarranged(batch_NCHW, source)[is_mixed_N]
        with autocast_where_faster(torch.device("cpu")):
            features_ND = network(batch_NCHW).float()
        asked = [torch.from_numpy(target_N[rows]) for target_N, _ in targets]
        loss = config.disarranged_weight * functional.binary_cross_entropy_with_logits(
            heads[-1](features_ND)[:, 0], is_mixed_N.float()
        )
        for head, target_N in zip(heads, asked, strict=False):
            answer_N = target_N.masked_fill(is_mixed_N, _IGNORED)
            if bool((answer_N != _IGNORED).any()):
                loss = loss + functional.cross_entropy(
                    head(features_ND), answer_N, ignore_index=_IGNORED, label_smoothing=0.1
                )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, float(loss.detach()))
    return network.eval().folded()


def recoloured(images_NCHW: Tensor, source: torch.Generator) -> Tensor:
    """Each image's optical densities mixed at random, as no two laboratories would differ more.

    A random matrix near the identity, a shift, for one in five all colours to one, and a power.
    """
    num = len(images_NCHW)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *shape, generator=source)

    density_NCHW = -torch.log((images_NCHW.float() + 1.0) / 256.0)
    mixing_NCC = torch.eye(3) * uniform(0.7, 1.3, 1, 3)
    mixing_NCC = mixing_NCC + 0.15 * torch.randn(num, 3, 3, generator=source)
    density_NCHW = torch.einsum("ncd,ndhw->nchw", mixing_NCC, density_NCHW)
    weight_NC11 = uniform(0.1, 1.1, 3, 1, 1)
    grey_N1HW = (density_NCHW * weight_NC11).sum(1, keepdim=True) / weight_NC11.sum(1, keepdim=True)
    density_NCHW = torch.where(uniform(0, 1, 1, 1, 1) < 0.2, grey_N1HW, density_NCHW)
    density_NCHW = (density_NCHW + uniform(0.0, 0.1, 3, 1, 1)).clamp(min=0.0)
    density_NCHW = density_NCHW ** uniform(0.75, 1.33, 1, 1, 1)
    return (256.0 * torch.exp(-density_NCHW) - 1.0).clamp(0.0, 255.0)


def disarranged(images_NCHW: Tensor, source: torch.Generator) -> Tensor:
    """Square images, each blended with itself turned round, in random blobs with soft borders."""
    num, _, height_px, width_px = images_NCHW.shape
    blobs, turns = (
        int(torch.randint(low, high, (), generator=source)) for low, high in ((3, 9), (1, 4))
    )
    coarse_N1HW = torch.randn(num, 1, blobs, blobs, generator=source)
    field_N1HW = functional.interpolate(coarse_N1HW, (height_px, width_px), mode="bicubic")
    share_N1HW = torch.sigmoid(20.0 * field_N1HW)
    turned_NCHW = torch.rot90(images_NCHW, turns, (2, 3))
    return share_N1HW * images_NCHW + (1.0 - share_N1HW) * turned_NCHW


def random_view(
    images_NHWC: Images, crop_px: int, rng: np.random.Generator, source: torch.Generator
) -> Tensor:
    """Cropped, turned and mirrored (the batch as one), then recoloured (each on its own)."""
    top, left = rng.integers(images_NHWC.shape[1] - crop_px + 1, size=2)
    cut_NHWC = images_NHWC[:, top : top + crop_px, left : left + crop_px]
    turned_NHWC = np.rot90(cut_NHWC, int(rng.integers(4)), axes=(1, 2))
    if rng.integers(2):
        turned_NHWC = turned_NHWC[:, :, ::-1]
    batch_NCHW = channels_first(turned_NHWC)
    return recoloured(batch_NCHW, source).contiguous(memory_format=torch.channels_last)


def _targets(labels: Labels) -> tuple[npt.NDArray[np.int64], int]:
    """Number of each tile's class, ignored where it is unknown or rare; and how many there are."""
    names, class_N, count_K = np.unique(labels, return_inverse=True, return_counts=True)
    is_asked_K = (count_K >= FEWEST_TILES) & (names != "")
    if not is_asked_K.any():
        raise ValueError(f"expected classes of at least {FEWEST_TILES} tiles, got none")
    number_K = np.where(is_asked_K, np.cumsum(is_asked_K) - 1, _IGNORED)
    return number_K[class_N].astype(np.int64), int(is_asked_K.sum())


def _shares(groups: Labels) -> npt.NDArray[np.float64]:
    """A group of n tiles is drawn in proportion to the root of n."""
    _, group_N, count_G = np.unique(groups, return_inverse=True, return_counts=True)
    weight_N = 1.0 / np.sqrt(count_G[group_N])
    shares: npt.NDArray[np.float64] = weight_N / weight_N.sum()
    return shares


def main() -> None:
    """Train on the ``build`` tiles of a table (docs/foundation.md) and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=Path, required=True, help="table of open tiles")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--steps", type=int, default=TissueTrainingConfig().steps)
    arguments = parser.parse_args()
    rows = [row for row in read_table(arguments.tiles) if row.split == "build"]
    tiles = read_open_tiles(rows, tile_px=TissueEncoder.input_px, mpp=1.0)
    questions = [
        np.asarray([getattr(row, name) for row in rows])[tiles.row_N]
        for name in ("organ", "caption", "case")
    ]
    images, cases = tiles.image_NHWC, tiles.cases()
    network = train(
        images, cases, questions, TissueTrainingConfig(steps=arguments.steps), _print_progress
    )
    write_weights(network, arguments.out)


def write_weights(network: TissueNetwork, directory: Path) -> Path:
    """In half precision, as safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: each.half().contiguous() for name, each in network.state_dict().items()}
    write_file(directory / WEIGHTS, save(weights))
    return directory / WEIGHTS


def _print_progress(step: int, loss: float) -> None:
    if step % 50 == 0:
        say(f"step {step}, loss {loss:.3f}", err=True)


if __name__ == "__main__":
    main()
