"""What the camera's lens and electronics make of light."""

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ptq_lane.scenes.weather import Weather


def recorded(image: NDArray[np.float32], weather: Weather, random: Generator) -> NDArray[np.uint8]:
    """The picture [h, w, 3] of light [h, w, 3]: blur, dark corners, exposure, noise and JPEG."""
    sigma = weather.blur * len(image)
    if sigma > 0.2:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)
    black, gain = random.uniform(-0.02, 0.06), random.uniform(0.85, 1.15)
    image = np.float32(black) + np.float32(gain) * _corners(image.shape, random.uniform(0, 0.2)) * image
    image += np.float32(weather.noise) * random.standard_normal(image.shape, dtype=np.float32)
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    written = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, weather.quality])[1]
    return np.ascontiguousarray(np.asarray(cv2.imdecode(written, cv2.IMREAD_COLOR), np.uint8)[..., ::-1])


def _corners(shape: tuple[int, ...], darkness: float) -> NDArray[np.float32]:
    """How much of the light the lens lets through [h, w, 1], least in the corners."""
    rows, columns = np.linspace(-1, 1, shape[0])[:, None], np.linspace(-1, 1, shape[1])
    return (1 - darkness * (rows**2 + columns**2) / 2)[..., None].astype(np.float32)
