"""A small network that knows tissue by its structure: what the VAE is taught to keep.

It learns to tell cases and what they show apart under stains that change at every look, so colour
is of no use to it. Distances between its feature maps then weigh what histology is made of, nuclei
and their arrangement, more than pixels do (Johnson et al. 2016, arXiv 1603.08155; Zhang et al.
2018, arXiv 1801.03924). It is part of the build only and judges nothing.

Shape letters: B tiles, C H W channels and pixels, K classes.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from crafts_core.devices import autocast_where_faster
from crafts_core.foundation_build.training import Recipe, train
from crafts_core.foundation_build.views import other_stains, turned
from crafts_core.pixels import to_pixels

WIDTHS = (24, 48, 96, 160)


class StructureNet(nn.Module):
    """Four stages, each of half the resolution; a linear classifier on the mean of the last."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        inputs = (3, *WIDTHS[:-1])
        self.stages = nn.ModuleList(
            _stage(before, after) for before, after in zip(inputs, WIDTHS, strict=True)
        )
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)

    def maps(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Feature maps of every stage, finest first."""
        found = []
        for stage in self.stages:
            pixels_BCHW = stage(pixels_BCHW)
            found.append(pixels_BCHW)
        return found

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits_BK: Tensor = self.classifier(self.maps(pixels_BCHW)[-1].mean((2, 3)))
        return logits_BK


def _stage(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=2, padding=1),
        nn.GroupNorm(8, after),
        nn.SiLU(),
        nn.Conv2d(after, after, 3, padding=1),
        nn.GroupNorm(8, after),
        nn.SiLU(),
    )


def train_structure_net(
    image_NHWC: npt.NDArray[np.uint8], class_N: npt.NDArray[np.int64], recipe: Recipe
) -> StructureNet:
    """Classification of ``class_N`` under random stains, flips and turns."""
    torch.manual_seed(recipe.seed)
    net = StructureNet(int(class_N.max()) + 1).to(recipe.device)

    def loss_of(rows: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        pixels_BCHW = turned(to_pixels(image_NHWC[rows]), rng)
        pixels_BCHW = other_stains(pixels_BCHW, strength=2.0, grey=0.25).to(recipe.device)
        target_B = torch.from_numpy(class_N[rows]).to(recipe.device)
        with autocast_where_faster(recipe.device):
            logits_BK = net(pixels_BCHW)
        return functional.cross_entropy(logits_BK.float(), target_B, label_smoothing=0.1)

    train(net, loss_of, len(class_N), recipe)
    return net.eval().requires_grad_(False)


def perceptual_loss(net: StructureNet) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean squared distance of unit feature vectors at three scales (LPIPS without weights)."""

    def loss(drawn_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = [functional.normalize(maps, dim=1) for maps in net.maps(real_BCHW)]
        found = [functional.normalize(maps, dim=1) for maps in net.maps(drawn_BCHW)]
        parts = [
            (one - other).square().sum(1).mean() for one, other in zip(found, wanted, strict=True)
        ]
        return torch.stack(parts).mean()

    return loss
