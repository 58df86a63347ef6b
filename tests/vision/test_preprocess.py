"""From pixels to tensors."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from ptq_vision.preprocess import Preprocess, native_size, prepare
from ptqcore import RecipeError
from ptqcore.recipe import validate

SHADES = np.repeat(np.arange(12, dtype=np.uint8), 8 * 3).reshape(12, 8, 3)  # row i is of shade i


def shades(picture, **how):
    return prepare(picture, Preprocess(scale=1.0, **how))[0]


def test_values_are_scaled_and_normalised_a_channel(picture):
    pixels = picture(5, 7)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    found = prepare(pixels, Preprocess(size=None, mean=mean, std=std))
    assert found.shape == (3, 5, 7)
    assert found.dtype == torch.float32
    for channel in range(3):
        expected = (pixels[:, :, channel] / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(found[channel], expected, atol=1e-6)


def test_bgr_puts_blue_first_and_the_mean_belongs_to_the_networks_order():
    red = np.full((2, 2, 3), (255, 0, 0), dtype=np.uint8)
    found = prepare(red, Preprocess(size=None, order="bgr", mean=(0.25, 0.5, 0.75)))
    assert found[:, 0, 0].tolist() == [-0.25, -0.5, 0.25]


def test_a_number_resizes_the_shorter_side_and_cuts_the_centre():
    found = shades(SHADES, size=4, interpolation="nearest")
    assert found.shape == (4, 4)
    assert found[:, 0].tolist() == [3, 5, 7, 9]  # 12 x 8 becomes 6 x 4, rows 1 to 4 are kept


def test_the_crop_is_a_share_of_the_resized_sides():
    found = shades(SHADES, size=4, crop=0.5)  # the shorter side is 8 already
    assert found.shape == (4, 4)
    assert found[:, 0].tolist() == [4, 5, 6, 7]


def test_height_and_width_ignore_the_proportions():
    found = shades(SHADES, size=(6, 8), interpolation="nearest")
    assert found.shape == (6, 8)
    assert found[:, 0].tolist() == [1, 3, 5, 7, 9, 11]


def test_without_a_size_pictures_stay_as_they_are():
    assert shades(SHADES, size=None).shape == (12, 8)
    assert shades(SHADES, size=None, crop=0.5).shape == (12, 8)


def test_bilinear_resizing_is_that_of_an_antialiased_filter(picture):
    pixels = picture(20, 20)
    found = prepare(pixels, Preprocess(size=(9, 7), interpolation="bilinear", scale=1.0))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = interpolate(image, (9, 7), mode="bilinear", antialias=True)[0]
    assert float((found - expected).abs().max()) < 1.5  # Pillow rounds to whole shades, twice


def test_native_size_is_the_size_before_the_crop():
    assert native_size(Preprocess(size=224, crop=0.875)) == (256, 256)
    assert native_size(Preprocess(size=(4, 6))) == (4, 6)
    assert native_size(Preprocess(size=None)) == (224, 224)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sise": 3}, "'task.preprocess.sise' is unknown; did you mean 'size'"),
        ({"size": 0}, "'task.preprocess.size' is not possible: size 0: give a number of pixels"),
        ({"size": [1, 2, 3]}, r"size \[1, 2, 3\]: give a number of pixels, \[height, width\], or null"),
        ({"size": True}, "size True: give"),
        ({"crop": 1.5}, "'task.preprocess.crop' is 1.5: input should be less than or equal to 1"),
        ({"std": [1, 0, 1]}, r"std \[1.0, 0.0, 1.0\]: pixels are divided by it"),
        ({"interpolation": "cubic"}, "'task.preprocess.interpolation' is 'cubic'"),
    ],
)
def test_wrong_keys_are_named(given, sentence):
    from ptq_vision.image_task import ImageOptions

    with pytest.raises(RecipeError, match=sentence):
        validate(ImageOptions, {"preprocess": given}, "task")
