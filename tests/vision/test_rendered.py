"""Pictures of a seed."""

import numpy as np
import pytest

from ptq_vision.rendered import rendered_images

SIDE = 128


@pytest.fixture(scope="module")
def pictures():
    images = rendered_images(8, SIDE, SIDE, seed=0)
    return np.stack([images.read(index) for index in range(8)])


def test_the_same_seed_gives_the_same_pixels(pictures):
    again = rendered_images(3, SIDE, SIDE, seed=0)
    assert np.array_equal(again.read(2), pictures[2])
    assert len(again) == 3


@pytest.mark.parametrize(("seed", "series", "index"), [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_seed_series_and_number_make_other_pictures(pictures, seed, series, index):
    other = rendered_images(2, SIDE, SIDE, seed, series).read(index)
    assert np.abs(other.astype(int) - pictures[0]).mean() > 10


def test_any_size():
    picture = rendered_images(1, 30, 47, seed=3).read(0)
    assert picture.shape == (30, 47, 3)
    assert picture.dtype == np.uint8


def test_power_falls_with_frequency_as_in_photographs(pictures):
    """Between f^-2 and f^-3.5 over four octaves; white noise would be flat."""
    grey = pictures.mean(-1)
    window = np.outer(np.hanning(SIDE), np.hanning(SIDE))
    centred = (grey - grey.mean((1, 2), keepdims=True)) * window
    power = np.abs(np.fft.fft2(centred)) ** 2
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)) * SIDE
    octaves = [3, 6, 12, 24, 48]
    mean = [power[:, (frequency >= f) & (frequency < 1.5 * f)].mean() for f in octaves]
    slope = np.polyfit(np.log(octaves), np.log(mean), 1)[0]
    assert -3.5 < slope < -2


def test_light_and_colour_are_those_of_photographs(pictures):
    shades = pictures.reshape(8, -1, 3) / 255
    assert 0.3 < shades.mean() < 0.6
    assert 0.15 < shades.std(1).mean() < 0.35
    assert 0.02 < np.abs(shades - shades.mean(-1, keepdims=True)).mean() < 0.12
    assert shades.mean((1, 2)).std() > 0.02  # dark and bright pictures
