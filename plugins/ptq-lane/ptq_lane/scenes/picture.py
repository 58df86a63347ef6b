"""The picture of a scene: backdrop, ground, vehicles, light and the camera's electronics."""

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ptq_lane.lanes import Frame
from ptq_lane.scenes.backdrop import paint_backdrop, sky_colours
from ptq_lane.scenes.camera import Camera
from ptq_lane.scenes.ground import ground_seen, paint_ground
from ptq_lane.scenes.road import Road
from ptq_lane.scenes.sensor import recorded
from ptq_lane.scenes.weather import Weather

_FINER = 2


def picture(
    frame: Frame, camera: Camera, road: Road, weather: Weather, random: Generator
) -> NDArray[np.uint8]:
    """The picture [height, width, 3], red, green, blue."""
    fine = Frame(_FINER * frame.width, _FINER * frame.height)
    high, low = sky_colours(weather, random)
    canvas = paint_backdrop(fine, camera, weather, high, low, random)
    ground = ground_seen(fine, camera, road)
    colours = paint_ground(ground, road, weather, random)
    hidden = 1 - np.exp(np.float32(-weather.haze) * ground.z)
    mirrored = np.float32(weather.wet) * np.clip(ground.z / 30, 0, 1)
    veil = np.maximum(hidden, mirrored)
    for channel, colour, far in zip(canvas[:, ground.top :], colours, low, strict=True):
        np.copyto(channel, colour + veil * (far - colour), where=ground.seen)
    image = cv2.resize(cv2.merge(list(canvas)), (frame.width, frame.height), interpolation=cv2.INTER_AREA)
    return recorded(image, weather, random)
