"""PSNR, SSIM and the feature distance, against closed forms and the definition computed pixel by pixel."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq_diffusion.classifier import Classifier, load_classifier
from ptq_diffusion.image_metrics import compare, feature_distance, psnr, ssim
from ptqcore import DataError

Metric = Callable[[Tensor, Tensor], Tensor]


class Pixels(Classifier):
    """A classifier whose feature maps are the images."""

    def feature_maps(self, images: Tensor) -> Tensor:
        return images


def pixel_distance(images: Tensor, references: Tensor) -> Tensor:
    return feature_distance(images, references, Pixels())


def constant(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64)


def noisy_pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator, dtype=torch.float64)
    return images, (images + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


@pytest.mark.parametrize("difference", [1.0, 0.5, 0.1, 1 / 255])
def test_psnr_of_constant_images(difference: float) -> None:
    found = psnr(constant(0, 3, 1, 5, 7), constant(difference, 3, 1, 5, 7))
    torch.testing.assert_close(found, constant(-20 * math.log10(difference), 3))


def test_psnr_is_that_of_each_pair_and_at_most_100() -> None:
    images, references = constant(0.5, 3, 3, 4, 4), constant(0.5, 3, 3, 4, 4)
    references[1] = 0.6
    references[2, 0, 0, 0] = 1.0
    expected = [100, 20, -10 * math.log10(0.25 / 48)]
    torch.testing.assert_close(psnr(images, references), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("pair", [(0.0, 1.0), (0.2, 0.3), (0.7, 0.7)])
@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 5, 30), (2, 1, 1, 1)])
def test_ssim_of_constant_images_compares_their_means(
    pair: tuple[float, float], shape: tuple[int, ...]
) -> None:
    one, other = pair
    expected = (2 * one * other + 1e-4) / (one**2 + other**2 + 1e-4)
    torch.testing.assert_close(ssim(constant(one, *shape), constant(other, *shape)), constant(expected, 2))


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(16, 16, 11), (13, 20, 11), (11, 11, 11), (10, 30, 9), (8, 9, 7), (3, 2, 1)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_its_definition_at_every_position(
    height: int, width: int, side: int, channels: int
) -> None:
    images, references = noisy_pair(2, channels, height, width)
    expected = [slow_ssim(*pair, side) for pair in zip(images.numpy(), references.numpy(), strict=True)]
    torch.testing.assert_close(
        ssim(images, references), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0
    )


def slow_ssim(image: NDArray[np.float64], reference: NDArray[np.float64], side: int) -> float:
    """Wang et al. 2004, equations 13 to 16, one window at a time."""
    offsets = np.arange(side) - side // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for x, y in zip(image, reference, strict=True):
        for top in range(x.shape[0] - side + 1):
            for left in range(x.shape[1] - side + 1):
                a, b = (part[top : top + side, left : left + side] for part in (x, y))
                a_mean, b_mean = (weights * a).sum(), (weights * b).sum()
                a_variance, b_variance = (
                    (weights * (a - a_mean) ** 2).sum(),
                    (weights * (b - b_mean) ** 2).sum(),
                )
                covariance = (weights * (a - a_mean) * (b - b_mean)).sum()
                above = (2 * a_mean * b_mean + 0.01**2) * (2 * covariance + 0.03**2)
                below = (a_mean**2 + b_mean**2 + 0.01**2) * (a_variance + b_variance + 0.03**2)
                values.append(above / below)
    return float(np.mean(values))


def test_ssim_of_equal_images_is_1_and_of_a_negative_is_below_0() -> None:
    image = torch.arange(256).view(1, 1, 16, 16) % 3 / 2
    torch.testing.assert_close(ssim(image, image), constant(1, 1))
    assert ssim(image, 1 - image) < 0


def test_many_pairs_are_measured_like_each_alone() -> None:
    images, references = noisy_pair(300, 1, 12, 12)
    whole = ssim(images, references)
    assert whole.shape == (300,)
    torch.testing.assert_close(
        whole[[0, 299]], torch.cat([ssim(images[[i]], references[[i]]) for i in (0, 299)])
    )


def test_feature_distance_is_one_minus_the_cosine() -> None:
    images = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    references = torch.tensor([[0.3, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    found = pixel_distance(images.view(5, 1, 2, 2), references.view(5, 1, 2, 2))
    torch.testing.assert_close(found, torch.tensor([0, 1 - 0.5**0.5, 1, 0, 0], dtype=torch.float64))


def test_feature_distance_grows_with_noise() -> None:
    classifier = load_classifier()
    images = torch.zeros(8, 1, 16, 16)
    images[..., 3:13, 7:9] = 1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        feature_distance((images + level * noise).clamp(0, 1), images, classifier).mean().item()
        for level in (0, 0.1, 0.4)
    ]
    assert distances[0] == 0
    assert 0 < 2 * distances[1] < distances[2] < 1


def test_compare_gives_means_and_deviations_over_pairs() -> None:
    images = constant(0.5, 2, 1, 2, 2)
    references = images.clone()
    references[0] += 0.1
    references[1] += 0.01
    found = compare(images, references, Pixels())
    assert found["psnr"] == pytest.approx(30)
    assert found["psnr_std"] == pytest.approx(10)
    likenesses = [(2 * 0.5 * x + 1e-4) / (0.25 + x**2 + 1e-4) for x in (0.6, 0.51)]
    assert found["ssim"] == pytest.approx(sum(likenesses) / 2)
    assert found["ssim_std"] == pytest.approx((likenesses[1] - likenesses[0]) / 2)
    assert found["feature_distance"] == pytest.approx(0, abs=1e-12)
    assert set(found) == {
        f"{name}{end}" for name in ("psnr", "ssim", "feature_distance") for end in ("", "_std")
    }


def test_one_pair_has_no_deviation() -> None:
    found = compare(*noisy_pair(1, 1, 16, 16), load_classifier())
    assert [found[f"{name}_std"] for name in ("psnr", "ssim", "feature_distance")] == [0, 0, 0]


@pytest.mark.parametrize("metric", [psnr, ssim, pixel_distance])
@pytest.mark.parametrize(
    ("images", "references", "reason"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5), "one shape"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4), "one shape"),
        (torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 1.1), r"within \[0, 1\]"),
        (torch.full((2, 1, 4, 4), -0.1), torch.zeros(2, 1, 4, 4), r"within \[0, 1\]"),
        (torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), torch.nan), r"within \[0, 1\]"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), "1 or 3, height, width"),
        (torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4), "1 or 3, height, width"),
    ],
)
def test_what_is_no_pair_of_images_is_refused(
    metric: Metric, images: Tensor, references: Tensor, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        metric(images, references)
