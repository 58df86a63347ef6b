"""The picture of a scene: backdrop, ground, what stands on it, lights and the camera's electronics."""

from functools import partial

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ptq_lane.lanes import Frame
from ptq_lane.scenes.backdrop import paint_backdrop, sky_colours
from ptq_lane.scenes.camera import Camera
from ptq_lane.scenes.ground import ground_seen
from ptq_lane.scenes.lighting import add_glow
from ptq_lane.scenes.noise import Field
from ptq_lane.scenes.road import Road
from ptq_lane.scenes.roadside import random_roadside
from ptq_lane.scenes.sensor import recorded
from ptq_lane.scenes.stage import Stage
from ptq_lane.scenes.surface import paint_surface
from ptq_lane.scenes.vehicles import paint_vehicle, random_vehicles
from ptq_lane.scenes.weather import Weather

_FINER = 2


def picture(
    frame: Frame, camera: Camera, road: Road, weather: Weather, random: Generator
) -> NDArray[np.uint8]:
    """The picture [height, width, 3], red, green, blue."""
    fine = Frame(_FINER * frame.width, _FINER * frame.height)
    high, low = sky_colours(weather, random)
    canvas = paint_backdrop(fine, camera, weather, high, low, random)
    _lay_ground(canvas, fine, camera, road, weather, low, random)
    stage = Stage(np.asarray(cv2.merge(list(canvas)), np.float32), fine, camera, road, weather, low)
    _fill_stage(stage, random)
    size = (frame.width, frame.height)
    image = np.asarray(cv2.resize(stage.image, size, interpolation=cv2.INTER_AREA), np.float32)
    if weather.glare:
        _dazzle(image, camera, frame, weather, random)
    return recorded(image, weather, random)


def _lay_ground(
    canvas: Field, frame: Frame, camera: Camera, road: Road, weather: Weather, air: Field, random: Generator
) -> None:
    """Paint the ground over a backdrop [3, h, w] through the haze, a mirror where wet, in place."""
    ground = ground_seen(frame, camera, road)
    colours = paint_surface(ground, road, weather, random)
    veil = np.maximum(
        1 - np.exp(np.float32(-weather.haze) * ground.z),
        np.float32(weather.wet) * np.clip(ground.z / 30, 0, 1),
    )
    for channel, colour, far in zip(canvas[:, ground.top :], colours, air, strict=True):
        np.copyto(channel, colour + veil * (far - colour), where=ground.seen)


def _fill_stage(stage: Stage, random: Generator) -> None:
    """Paint what stands on the ground, far things first."""
    things = random_roadside(random, stage.road)
    for vehicle in random_vehicles(random, stage.road, stage.weather.vehicles):
        things.append((vehicle.z, partial(paint_vehicle, vehicle=vehicle)))
    for _, paint in sorted(things, key=lambda thing: -thing[0]):
        paint(stage)


def _dazzle(
    image: NDArray[np.float32], camera: Camera, frame: Frame, weather: Weather, random: Generator
) -> None:
    """Let a low sun or a lamp ahead blind the camera and mirror in the road, in place."""
    x, above, warm = random.uniform(0.2, 0.8), random.uniform(0.02, 0.25), random.uniform(0.6, 1)
    light = np.array([1, 0.55 + 0.45 * warm, 0.2 + 0.75 * warm]) * weather.glare
    column, height = x * frame.width, frame.height
    horizon = float(camera.horizon(frame, np.array([column]))[0])
    image *= np.float32(1 - 0.35 * weather.glare)
    for reach, strength in ((0.035, 1.6), (0.12, 0.6), (0.6, 0.45)):
        add_glow(image, column, horizon - above * height, reach * height, strength * light)
    aside = np.abs(np.arange(frame.width, dtype=np.float32) - np.float32(column)) * 2 / frame.width
    below = (np.arange(height, dtype=np.float32)[:, None] - np.float32(horizon)) / height
    streak = np.exp(-aside / np.float32(0.07) - 3 * np.clip(below, 0, 1)) * np.clip(below * 20, 0, 1)
    image += streak[..., None] * (0.35 * light).astype(np.float32)
