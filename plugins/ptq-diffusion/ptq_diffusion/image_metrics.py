"""How close images are to the reference images that they stand for, pair by pair.

All functions take images and references of one shape [n, c, h, w] in [0, 1], c of 1 or 3, compute in
float64, and give one value per pair, [n]. They raise DataError for anything else.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ptq_diffusion.classifier import Classifier, check_images
from ptqcore import DataError

_MOST_DECIBELS = 100.0
_WINDOW = 11
_SIGMA = 1.5
_C1 = 0.01**2
_C2 = 0.03**2
_BATCH = 256


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: -10 log10 of the mean squared difference.

    At most 100 dB, which stands for equal images too, so that means stay finite; two images that differ in
    a way that bytes can hold have less as long as they have fewer than 150,000 values.
    """
    _check_pairs(images, references)
    error = (images.double() - references.double()).square().mean((1, 2, 3))
    return (-10 * error.log10()).clamp(max=_MOST_DECIBELS)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity, at most 1 (Wang et al., IEEE Transactions on Image Processing 13, 2004).

    Gaussian window of 11 x 11 with σ = 1.5, K1 = 0.01, K2 = 0.03, covariances of the population; the mean
    over channels and over the positions where the window lies within the image. Images with a side below 11
    have a window of the largest odd size that fits.
    """
    _check_pairs(images, references)
    pairs = zip(images.double().split(_BATCH), references.double().split(_BATCH), strict=True)
    return torch.cat([_ssim(*pair) for pair in pairs])


def feature_distance(images: Tensor, references: Tensor, classifier: Classifier) -> Tensor:
    """1 minus the cosine between the classifier's feature maps of the two images, 0 to 1.

    In the manner of LPIPS, but not LPIPS: one layer of a small classifier of digits, and no weights learnt
    from people's judgements. Computed as half the squared distance of the maps scaled to length 1, which is
    exactly 0 for equal images.
    """
    _check_pairs(images, references)
    maps = [F.normalize(classifier.feature_maps(x).double().flatten(1)) for x in (images, references)]
    return (maps[0] - maps[1]).square().sum(1) / 2


def compare(images: Tensor, references: Tensor, classifier: Classifier) -> dict[str, float]:
    """Mean over pairs of `psnr`, `ssim` and `feature_distance`, and their standard deviations, `…_std`.

    The deviation is that of the population: 0 for one pair.
    """
    values = {
        "psnr": psnr(images, references),
        "ssim": ssim(images, references),
        "feature_distance": feature_distance(images, references, classifier),
    }
    means = {name: float(value.mean()) for name, value in values.items()}
    return means | {f"{name}_std": float(value.std(correction=0)) for name, value in values.items()}


def _check_pairs(images: Tensor, references: Tensor) -> None:
    check_images(images)
    check_images(references)
    if images.shape != references.shape:
        shapes = f"{list(images.shape)} and {list(references.shape)}"
        raise DataError(f"images and references must have one shape; got {shapes}")


def _ssim(images: Tensor, references: Tensor) -> Tensor:
    """SSIM of a batch in double precision."""
    count, channels, height, width = images.shape
    window = _window(min(_WINDOW, height, width)).to(images.device)
    products = (images, references, images**2, references**2, images * references)
    flat = torch.cat(products).reshape(-1, 1, height, width)
    smooth = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mean, other, square, other_square, product = smooth.view(5, count, channels, -1)
    covariance = product - mean * other
    variances = square - mean**2 + other_square - other**2
    likeness = (2 * mean * other + _C1) * (2 * covariance + _C2)
    return (likeness / ((mean**2 + other**2 + _C1) * (variances + _C2))).mean((1, 2))


def _window(side: int) -> Tensor:
    """A Gaussian of the largest odd length up to `side`, with sum 1, in double precision."""
    half = (side - 1) // 2
    weights = torch.exp(-(torch.arange(-half, half + 1, dtype=torch.float64) ** 2) / (2 * _SIGMA**2))
    return weights / weights.sum()
