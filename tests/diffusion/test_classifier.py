"""The embedded classifier of digits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor

from ptq_diffusion.classifier import WEIGHTS, Classifier, load_classifier
from ptqcore import DataError, ModelError


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


def random_images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def printed_digits(side: int) -> Tensor:
    """The digits 0 to 9 in print: [10, 1, side, side]."""
    font = ImageFont.load_default(round(0.8 * side))
    images = []
    for digit in range(10):
        image = Image.new("L", (side, side))
        ImageDraw.Draw(image).text((side / 2, side / 2), str(digit), fill=255, font=font, anchor="mm")
        images.append(torch.from_numpy(np.array(image)).float() / 255)
    return torch.stack(images)[:, None]


@pytest.mark.parametrize("side", [16, 64])
def test_most_printed_digits_are_read_though_it_learnt_from_handwriting(
    classifier: Classifier, side: int
) -> None:
    found = classifier.probabilities(printed_digits(side)).argmax(1)
    assert (found == torch.arange(10)).sum() >= 6


@pytest.mark.parametrize("spread", [0.2, 1.0, 5.0])
def test_noise_is_no_confident_digit(classifier: Classifier, spread: float) -> None:
    noise = (0.5 + spread * torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(1))).clamp(
        0, 1
    )
    assert classifier.probabilities(noise).amax(1).mean() < 0.3


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (3, 3, 16, 16), (2, 1, 28, 28), (1, 3, 5, 40)])
def test_shapes(classifier: Classifier, shape: tuple[int, ...]) -> None:
    images = random_images(*shape)
    assert classifier.feature_maps(images).shape == (shape[0], 64, 4, 4)
    assert classifier.features(images).shape == (shape[0], 64)
    probabilities = classifier.probabilities(images)
    assert probabilities.shape == (shape[0], 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(shape[0]))
    assert not probabilities.requires_grad


def test_features_are_the_mean_of_the_maps_and_feed_the_last_layer(classifier: Classifier) -> None:
    images = random_images(4, 1, 16, 16)
    features = classifier.features(images)
    torch.testing.assert_close(features, classifier.feature_maps(images).mean((2, 3)))
    torch.testing.assert_close(classifier.head(features).softmax(1), classifier.probabilities(images))


def test_three_channels_count_as_their_mean(classifier: Classifier) -> None:
    images = random_images(4, 3, 16, 16)
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(classifier.features(images), classifier.features(grey))
    torch.testing.assert_close(classifier.features(grey.expand(-1, 3, -1, -1)), classifier.features(grey))


@pytest.mark.parametrize("side", [1, 8, 33, 100])
def test_a_plain_image_is_the_same_at_any_size(classifier: Classifier, side: int) -> None:
    found = classifier.features(torch.full((1, 1, side, side), 0.4))
    torch.testing.assert_close(found, classifier.features(torch.full((1, 1, 16, 16), 0.4)))


def test_many_images_are_measured_like_few(classifier: Classifier) -> None:
    images = random_images(1100, 1, 16, 16)
    some = torch.tensor([0, 511, 512, 1099])
    torch.testing.assert_close(classifier.features(images)[some], classifier.features(images[some]))


def test_double_precision_images_are_welcome(classifier: Classifier) -> None:
    images = random_images(2, 1, 16, 16)
    torch.testing.assert_close(classifier.features(images.double()), classifier.features(images))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.zeros(1, 16, 16), "1 or 3, height, width"),
        (torch.zeros(2, 4, 16, 16), "1 or 3, height, width"),
        (torch.zeros(0, 1, 16, 16), "n > 0"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "divide bytes by 255"),
        (torch.full((2, 1, 16, 16), -1.0), "halve"),
        (torch.full((2, 1, 16, 16), 1.5), "within"),
        (torch.full((2, 1, 16, 16), torch.nan), "within"),
    ],
)
def test_what_are_no_images_is_refused(classifier: Classifier, images: Tensor, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        classifier.features(images)


def test_a_folder_without_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=WEIGHTS):
        load_classifier(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="holds no weights of the classifier"):
        load_classifier(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="holds no weights of the classifier"):
        load_classifier(tmp_path)
