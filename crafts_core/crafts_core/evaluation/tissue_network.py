"""The network of the embedded tissue encoder: a small residual one that hardly sees the stain.

Each tile's optical density is brought to mean 0 and spread 1 in each colour before anything else,
so that a paler, stronger or shifted stain gives the same numbers. What mixing of colours remains is
trained away (``tissue_training``).

Shape letters: N images, C H W channels and pixels, D features.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = (16, 40, 80, 192)
"""Of the four stages, at a half, quarter, eighth and sixteenth of the side."""
_FAINTEST = 0.05
"""Spread of optical density below which a colour is not amplified further: empty glass."""


class TissueNetwork(nn.Module):
    """Uint8-ranged RGB images (N, 3, H, W) of at least 32 px to maps or features."""

    def __init__(self, *, is_trained: bool) -> None:
        """Build it.

        Args:
            is_trained: With normalisation folded into the convolutions, as weights are published;
                False for training.
        """
        super().__init__()
        pairs = list(itertools.pairwise(CHANNELS))
        self.stem = _convolution(3, CHANNELS[0], size=5, stride=2, is_trained=is_trained)
        self.down = nn.ModuleList(
            _convolution(c, d, stride=2, is_trained=is_trained) for c, d in pairs
        )
        self.first = nn.ModuleList(_convolution(d, d, is_trained=is_trained) for _, d in pairs)
        self.second = nn.ModuleList(_convolution(d, d, is_trained=is_trained) for _, d in pairs)

    def stages(self, images_NCHW: Tensor) -> list[Tensor]:
        """Maps after each of the four stages."""
        maps_NCHW = functional.relu(self.stem(standard_density(images_NCHW)))
        found = [maps_NCHW]
        for down, first, second in zip(self.down, self.first, self.second, strict=True):
            maps_NCHW = functional.relu(down(maps_NCHW))
            maps_NCHW = functional.relu(maps_NCHW + second(functional.relu(first(maps_NCHW))))
            found.append(maps_NCHW)
        return found

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Means of the last three stages over the image, (N, D)."""
        return torch.cat([maps.mean((2, 3)) for maps in self.stages(images_NCHW)[1:]], dim=1)

    def folded(self) -> "TissueNetwork":
        """The same function with normalisation folded into the convolutions."""
        folded = TissueNetwork(is_trained=True)
        for name, module in self.named_modules():
            if isinstance(module, nn.Sequential):
                convolution, norm = module
                assert isinstance(convolution, nn.Conv2d)
                assert isinstance(norm, nn.BatchNorm2d)
                fused = nn.utils.fusion.fuse_conv_bn_eval(convolution, norm)
                folded.get_submodule(f"{name}.0").load_state_dict(fused.state_dict())
        return folded.eval().requires_grad_(False)


def standard_density(images_NCHW: Tensor) -> Tensor:
    """Optical density of pixels 0 to 255, with mean 0 and spread 1 in each colour of each image."""
    density_NCHW = -torch.log((images_NCHW.float() + 1.0) / 256.0)
    centred_NCHW = density_NCHW - density_NCHW.mean((2, 3), keepdim=True)
    return centred_NCHW / centred_NCHW.std((2, 3), keepdim=True).clamp(min=_FAINTEST)


def _convolution(
    inputs: int, outputs: int, *, size: int = 3, stride: int = 1, is_trained: bool
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=is_trained)
    return nn.Sequential(convolution, *([] if is_trained else [nn.BatchNorm2d(outputs)]))
