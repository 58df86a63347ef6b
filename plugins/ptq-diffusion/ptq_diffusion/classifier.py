"""A small classifier of digits: features for distances between sets of images, and confidence in images."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ptq_diffusion import embedded
from ptqcore import DataError, ModelError, read_tensor_header

WEIGHTS = "model.safetensors"
SIDE = 16
CLASSES = 10
_CHANNELS = (16, 32, 64)
_BATCH = 512


class Classifier(nn.Module):
    """Three convolutions with ReLU, halving between them, mean over positions, and one linear layer.

    All methods take images [n, c, h, w] in [0, 1] with 1 or 3 channels and of any size. They are brought to
    what the network was trained on: the mean of the channels, resized to 16 x 16 (bilinear, antialiased).
    The methods that measure need no gradient and go through the images in batches.

    Raises:
        DataError: images of another shape, or with values outside [0, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        widths = zip((1, *_CHANNELS), _CHANNELS, strict=False)
        self.convolutions = nn.ModuleList(nn.Conv2d(above, below, 3, padding=1) for above, below in widths)
        self.head = nn.Linear(_CHANNELS[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10]."""
        return self.head(self._maps(images).mean((2, 3)))

    def feature_maps(self, images: Tensor) -> Tensor:
        """Output of the last convolution, after ReLU: [n, 64, 4, 4], never negative."""
        return _in_batches(self._maps, images)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features [n, 64]: the mean of the feature maps over positions."""
        return self.feature_maps(images).mean((2, 3))

    def probabilities(self, images: Tensor) -> Tensor:
        """Softmax of the logits: [n, 10]."""
        return _in_batches(self, images).softmax(1)

    def _maps(self, images: Tensor) -> Tensor:
        maps = _prepared(images).to(self.head.weight)
        for index, convolution in enumerate(self.convolutions):
            maps = F.relu(convolution(maps if index == 0 else F.max_pool2d(maps, 2)))
        return maps


def load_classifier(folder: Path | None = None) -> Classifier:
    """The classifier in a folder, by default the embedded one, ready to measure.

    Raises:
        ModelError: no weights lie there, or those of another network.
    """
    file = (folder or embedded.path(embedded.CLASSIFIER)) / WEIGHTS
    classifier = Classifier()
    try:
        read_tensor_header(file)
        classifier.load_state_dict(load_file(file))
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{file} holds no weights of the classifier of tools/train_denoiser.py") from error
    return classifier.eval().requires_grad_(False)


def check_images(images: Tensor) -> None:
    """Raises DataError unless images are [n, 1 or 3, h, w] floats in [0, 1]."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise DataError(f"images must be [n, 1 or 3, height, width], n > 0; got {list(images.shape)}")
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise DataError(
            "images must be floats within [0, 1], none NaN; divide bytes by 255, halve [-1, 1] and add 0.5"
        )


def _prepared(images: Tensor) -> Tensor:
    check_images(images)
    grey = images.float().mean(1, keepdim=True)
    return F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)


@torch.no_grad()
def _in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(batch) for batch in images.split(_BATCH)])
