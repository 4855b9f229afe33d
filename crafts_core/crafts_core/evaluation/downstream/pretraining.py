"""SimCLR (Chen et al. 2020): a small network learns, without labels, which two views are one tile.

The network is that of the embedded encoder, from random weights; views are cropped, turned and
stained at random, as the encoder's training has them.

Letters: N images, V views (two of each image, one below the other), E embedding.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from crafts_core.evaluation.encoder import Features, Images
from crafts_core.evaluation.resampling import Vector
from crafts_core.evaluation.tissue_network import CHANNELS, TissueNetwork
from crafts_core.evaluation.tissue_training import random_view
from crafts_core.pixels import channels_first

_BATCH, _EMBEDDING = 64, 64
_TEMPERATURE, _LEARNING_RATE, _WEIGHT_DECAY = 0.2, 2e-3, 1e-4
_CROP = 0.75
"""Side of a view, beside the image's."""


def pretrained(images_NHWC: Images, share_N: Vector, *, steps: int, seed: int) -> TissueNetwork:
    """A network that has seen such images and no label.

    Args:
        images_NHWC: To learn from.
        share_N: How often each is drawn, beside the others.
        steps: Batches; none for a network of random weights.
        seed: The same gives the same network on the same machine.
    """
    rng, source = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    width = sum(CHANNELS[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TissueNetwork(is_trained=False)
        head = nn.Sequential(
            nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, _EMBEDDING)
        )
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    optimizer = torch.optim.AdamW(
        [*network.parameters(), *head.parameters()], lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
    )
    for _ in range(steps):
        rows = rng.choice(
            len(share_N), min(_BATCH, len(share_N)), replace=False, p=share_N / share_N.sum()
        )
        crop_px = round(_CROP * images_NHWC.shape[1])
        views = [random_view(images_NHWC[rows], crop_px, rng, source) for _ in range(2)]
        loss = contrast(head(network(torch.cat(views))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def contrast(embedding_VE: Tensor, temperature: float = _TEMPERATURE) -> Tensor:
    """NT-Xent: cross-entropy of finding a view's other among all views but itself."""
    unit_VE = functional.normalize(embedding_VE, dim=1)
    alike_VV = (unit_VE @ unit_VE.T / temperature).fill_diagonal_(-torch.inf)
    other_V = torch.arange(len(unit_VE)).roll(len(unit_VE) // 2)
    return functional.cross_entropy(alike_VV, other_V)


@torch.no_grad()
def features(network: TissueNetwork, images_NHWC: Images) -> Features:
    """What a network sees of whole images, (N, D)."""
    images_NCHW = channels_first(images_NHWC)
    parts = [network(part.float()).double().numpy() for part in images_NCHW.split(_BATCH)]
    return np.concatenate(parts)
